"""The page of the examples: it lists all of them, and each line of its tables runs as it stands."""

import ast
import functools
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Answer, Seen, Server, openai_answer
from test_readme import JAX, everywhere  # noqa: F401  a fixture

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
NAMES = ROOT.parent / "shared" / "docs" / "capabilities.md"
LATER = "ember_accel."
MODULES = (  # that a line may use as if they were imported
    "asyncio", "dataclasses", "functools", "httpx", "importlib", "inspect", "json", "logging", "os",
    "pydantic", "random", "tenacity", "tomllib", *["jax"] * JAX,
)  # fmt: skip
OF_JAX = re.compile(r"\b(?:jax\.|pmap\(score|sharded|vmap\(score)")

Row = tuple[str, str]


def tables(text: str, heading: str) -> Iterator[list[Row]]:
    """The first two cells of each row of each table that begins so."""
    for found in re.finditer(rf"^\| {heading} \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE):
        rows = [line.strip("|").split("|") for line in found[1].splitlines()]
        yield [(cells[0].strip(), "|".join(cells[1:]).strip()) for cells in rows]


SECTIONS = [*tables(PAGE, r"capability \| in Ember")]
ROWS = [row for section in SECTIONS for row in section]


def spans(cell: str) -> list[str]:
    """What is marked as code; of a decorator the expression."""
    return [span.removeprefix("@") for span in re.findall(r"`([^`]+)`", cell)]


def parsed(span: str) -> ast.Module:
    """A line of code, in which `await` may stand by itself."""
    tree = compile(span, "README.md", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert isinstance(tree, ast.Module)
    return tree


# ── The list ───


def test_every_example_is_listed_once_and_every_one_listed_is_there() -> None:
    listed = re.findall(r"^- \[(\S+)\]\((\S+)\): ", PAGE, re.MULTILINE)
    assert all(name == link for name, link in listed)
    assert [name for name, _ in listed] == sorted(
        path.name for path in (ROOT / "examples").glob("*.py")
    )


def test_every_link_leads_to_a_file() -> None:
    links = set(re.findall(r"\]\(([^)#]+)\)", PAGE))
    assert {link for link in links if not (ROOT / "examples" / link).exists()} == set()


# ── The tables ───


def test_every_line_of_code_parses() -> None:
    wrong = []
    for name, cell in ROWS:
        for span in spans(cell):
            try:
                parsed(span)
            except SyntaxError as error:
                wrong.append((name, span, str(error)))
    assert wrong == []


def test_every_row_has_code_or_a_link_or_says_why_not() -> None:
    says = ("not there: ", "plain Python: ")
    assert [
        name for name, cell in ROWS
        if not (spans(cell) or "](" in cell or cell.startswith(says))
    ] == []  # fmt: skip


def test_no_line_uses_what_is_private() -> None:
    nodes = [node for _, cell in ROWS for span in spans(cell) for node in ast.walk(parsed(span))]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert {name for name in names if name.startswith("_")} == set()


@functools.cache
def is_there(path: str) -> bool:
    """Whether a dotted name of ember_accel can be had."""
    home, _, name = path.rpartition(".")
    try:
        return hasattr(importlib.import_module(home), name)
    except ModuleNotFoundError:
        return False


def test_what_is_not_there_yet_is_not_there() -> None:
    later = {(span, cell) for _, cell in ROWS for span in spans(cell) if span.startswith(LATER)}
    assert [cell for _, cell in later if "not there yet" not in cell] == []
    landed = {span for span, _ in later if is_there(span)}
    assert landed == set(), "it is there: show it in examples/README.md"


def value(schema: Any, whole: Any) -> Any:
    """A value that a JSON schema allows."""
    if ref := schema.get("$ref"):
        return value(whole["$defs"][ref.rpartition("/")[2]], whole)
    for key in ("anyOf", "allOf", "oneOf"):
        if key in schema:
            return value(schema[key][0], whole)
    if "const" in schema or "enum" in schema:
        return schema.get("const", *schema.get("enum", ())[:1])
    match schema.get("type"):
        case "object":
            return {name: value(part, whole) for name, part in schema["properties"].items()}
        case "array":
            return [value(schema["items"], whole)]
        case kind:
            number = max(1, schema.get("minimum", 1))
            return {"string": "text", "boolean": True, "integer": number, "number": number}[kind]


def provider(seen: Seen) -> Answer:
    """A server that answers anything, on both wires, as the schema says that it is sent."""
    body = seen.json
    if seen.path == "/v1/embeddings":
        data = [{"index": n, "embedding": [0.5]} for n, _ in enumerate(body["input"])]
        return Answer({"data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}})
    if seen.path == "/v1/messages":
        schema = body.get("output_config", {}).get("format", {}).get("schema")
        text = json.dumps(value(schema, schema)) if schema else "a text"
        return Answer({
            "content": [{"type": "text", "text": text}], "stop_reason": "end_turn",
            "usage": {"input_tokens": 3, "output_tokens": 3},
        })  # fmt: skip
    form = body.get("response_format", {}).get("json_schema", {}).get("schema")
    return Answer(openai_answer(json.dumps(value(form, form)) if form else "a text"))


async def run(code: str, names: dict[str, Any]) -> None:
    """Run code as a notebook does; of an expression the value is looked at."""
    result = eval(compile(code, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    if inspect.isawaitable(result):
        await result


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section[0][0][:20])
async def test_every_line_runs_below_the_first_block(
    section: list[Row], everywhere: Server, tmp_path: Path,  # noqa: F811
) -> None:  # fmt: skip
    everywhere.play(provider)
    (tmp_path / "rows.jsonl").write_text('["2 + 2", "4"]\n' * 5)
    [block] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {name: importlib.import_module(name) for name in MODULES}
    await run(block, names)
    wrong = []
    for name, cell in section:
        for span in spans(cell):
            if span.startswith(LATER) or (OF_JAX.search(span) and not JAX):
                continue
            try:
                await run(span, names)
            except Exception as error:  # all that is wrong with the page at once
                wrong.append((name, span, repr(error)))
    assert wrong == []
    assert len(everywhere.requests) > 0


# ── What it maps, where that list is at hand ───


def words(text: str) -> set[str]:
    """The words that tell: names of code whole, others from four letters on."""
    found = re.findall(r"[A-Za-z][A-Za-z0-9_]*", text)
    return {
        word.lower() for word in found
        if len(word) > 3 or "_" in word or any(letter.isupper() for letter in word[1:])
    }  # fmt: skip


NO_NAMES = {"readme", "left", "empty"}  # a remark of the list's own


@pytest.mark.skipif(not NAMES.is_file(), reason="the list of capabilities is not here")
def test_every_capability_has_its_counterpart() -> None:
    given = [*tables(NAMES.read_text(encoding="utf-8"), r"Named in the design \| Proposal")]
    assert len(given) == len(SECTIONS) == 5
    for mine, theirs in zip(SECTIONS, given, strict=True):
        said = words(" ".join(name for name, _ in mine))
        missing = {name: left for name, _ in theirs if (left := words(name) - said - NO_NAMES)}
        assert missing == {}
        assert len(mine) >= len(theirs)
