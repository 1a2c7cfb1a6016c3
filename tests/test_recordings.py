"""Recorded traffic of real providers, through a real call, against what their SDKs read from it.

The recordings are not part of the repository: they stand beside it, or these tests are skipped.
"""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server import Answer, Server

import ember

pytestmark = pytest.mark.filterwarnings("ignore:.* has retired")  # the recordings are of their time

FILE = Path(__file__).parents[2] / "shared" / "data" / "wire_dev.jsonl"
APIS = ("chat/completions", "messages", "embeddings")
PIECES = (1, 7, 37, 0)  # bytes that arrive at once; 0: all
TRANSIENT = (408, 409, 429, 500, 502, 503, 504, 529)


def recordings(*, streams: bool = False) -> list[Any]:
    """The recordings that an answer is expected for, or the whole streams of them, one a test."""
    lines = FILE.read_text(encoding="utf8").splitlines() if FILE.exists() else []
    rows = [row for row in map(json.loads, lines) if row["api"] in APIS and row["expected"]]
    rows = [row for row in rows if not streams or (is_stream(row) and row["expected"]["ok"])]
    skip = pytest.param({}, id="none", marks=pytest.mark.skip("the recordings are not here"))
    return [pytest.param(row, id=row["id"]) for row in rows] or [skip]


def is_stream(row: Any) -> bool:
    """Whether the answer came as a stream."""
    return "event-stream" in row["headers"].get("content-type", "")


def model(row: Any, **options: Any) -> ember.Model:
    """The model that was asked, at another address."""
    provider = "vllm" if row["provider"] == "local" else row["provider"]
    name = row["request"]["model"]
    options = {"base_url": "http://127.0.0.1:1", "api_key": "k", "retries": 0, **options}
    options |= {"api_version": "2024-02-01"} if provider == "azure" else {}
    return ember.model(f"{provider}:{name}", **options)


async def ask(called: ember.Model, row: Any) -> ember.Reply[Any]:
    """The reply, by the way it was recorded."""
    if row["api"] == "embeddings":
        await called.embed(["text"])
        pytest.fail("an error was recorded")
    if not is_stream(row):
        return await called("a question")
    async with called.stream("a question") as stream:
        pieces = [piece async for piece in stream]
    assert "".join(pieces) == stream.reply.text
    return stream.reply


def mocked(row: Any, piece: int) -> httpx.MockTransport:
    """A transport that gives the recorded answer, in pieces."""
    body = row["body"].encode()

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), piece or len(body)):
            yield body[at : at + (piece or len(body))]

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(row["status"], headers=row["headers"], content=pieces())

    return httpx.MockTransport(answer)


def written_to_caches(row: Any) -> int:
    """Input tokens that Anthropic counts apart: read from a cache and written to one."""
    counts = [re.findall(rf'"{name}": ?(\d+)', row["body"]) for name in CACHES]
    return sum(int(found[-1]) for found in counts if found)


CACHES = ("cache_read_input_tokens", "cache_creation_input_tokens")


def check(reply: ember.Reply[Any], row: Any) -> None:
    """Compare a reply field by field with what the provider's SDK reads."""
    expected = row["expected"]
    assert reply.text == (expected["text"] or "")
    assert reply.finish == expected["finish"]
    calls = [(call.name, call.arguments) for call in reply.tool_calls]
    if expected["tools"] or expected["finish"] != "tool_calls":
        asked = [(tool["name"], tool["args"] or {}) for tool in expected["tools"]]
        assert [(name, arguments or {}) for name, arguments in calls] == asked
    else:  # OpenAI's SDK drops Mistral's tool calls, for they have no type
        assert calls == re.findall(r'"arguments": "({})", "name": "(\w+)"', row["body"]) or calls
    counts = expected["usage"] or {"in": 0, "out": 0}
    extra = written_to_caches(row) if row["api"] == "messages" else 0
    assert (reply.usage.tokens_in, reply.usage.tokens_out) == (counts["in"] + extra, counts["out"])


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("row", recordings())
async def test_a_recorded_answer_is_read_as_the_providers_sdk_reads_it(
    row: Any, piece: int
) -> None:
    """However the answer is cut into pieces."""
    called = model(row, transport=mocked(row, piece))
    if "status" in row["expected"].get("error", {}):
        with pytest.raises(ember.CallError) as caught:
            await ask(called, row)
        assert caught.value.status == row["expected"]["error"]["status"] == row["status"]
        assert caught.value.transient == (row["status"] in TRANSIENT)
        assert caught.value.attempts == 1
    else:
        reply = await ask(called, row)
        if row["expected"]["ok"]:
            check(reply, row)
        else:  # OpenAI's SDK cannot read Mistral's list content; we can
            assert reply.finish and reply.text and reply.usage.tokens_out


@pytest.mark.parametrize("row", recordings())
async def test_a_recorded_answer_comes_through_the_connection_pool(
    server: Server, row: Any
) -> None:
    """The same over a socket, chunked, and without `content-length`."""
    kind = row["headers"].get("content-type", "application/json")
    server.play(
        Answer(row["body"], row["status"], type=kind, framing="chunked", piece=301),
    )
    called = model(row, base_url=server.url)
    if row["expected"]["ok"]:
        check(await ask(called, row), row)
    elif row["status"] != 200:
        with pytest.raises(ember.CallError, match=str(row["status"])):
            await ask(called, row)
    assert len(server.requests) <= 1


@pytest.mark.parametrize("row", recordings(streams=True))
async def test_a_recorded_stream_cut_short_is_an_error_with_the_partial_text(row: Any) -> None:
    """Cut anywhere before the finish reason: never taken for the end."""
    mark = '"stop_reason":"' if row["api"] == "messages" else '"finish_reason":"'
    end = row["body"].index(mark)
    for cut in (end // 3, end // 2, end):
        whole = {**row, "body": row["body"][:cut]}
        with pytest.raises(ember.CallError) as caught:
            await ask(model(row, transport=mocked(whole, 37)), whole)
        assert (row["expected"]["text"] or "").startswith(caught.value.partial)
