"""Streams: every way to write, cut, break and leave one."""

import asyncio
import functools
import gc
import itertools
import json
import random
import re
import zlib
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from conftest import Connect
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server import WIRES, Answer, Server, Wire, openai_events, sse, until
from test_faults import STATUSES, TRANSIENT, add, check, mutants, reply_or_error

import ember

pytestmark = pytest.mark.usefixtures("no_backoff", "transport")

TEXTS = (
    "Zwölf ",
    "“Boxkämpfer”",
    "\u2028 jagen\u0085",
    "\x0b\x0c\x1c 🜂",
    " \r\n\r\ndata: [DONE]\n\n",
    "!",
)
WHOLE = "".join(TEXTS)


async def read(model: ember.Model, **options: Any) -> tuple[list[str], ember.Reply]:
    """The pieces of a stream, and its reply."""
    with anyio.fail_after(10):
        async with model.stream("hi", **options) as stream:
            pieces = [piece async for piece in stream]
    return pieces, stream.reply


async def broken(model: ember.Model, **options: Any) -> tuple[list[str], ember.CallError]:
    """The pieces of a stream that has to fail, and its error."""
    pieces: list[str] = []
    with anyio.fail_after(10), pytest.raises(ember.CallError) as caught:
        async with model.stream("hi", **options) as stream:
            async for piece in stream:
                pieces.append(piece)
    check(caught.value)
    return pieces, caught.value


# ── Good streams ───


async def test_a_stream_yields_the_text_as_it_comes_and_ends_with_the_reply(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream(*TEXTS))
    pieces, reply = await read(connect(wire, price=(1, 2)))
    assert pieces == list(TEXTS)
    assert reply.text == WHOLE
    assert reply.finish == {"openai": "stop", "anthropic": "end_turn"}[wire.provider]
    assert (reply.usage.tokens_in, reply.usage.tokens_out) == (11, 7)
    assert reply.cost == pytest.approx((11 * 1 + 7 * 2) / 1e6)
    assert len(server.requests) == 1
    assert server.requests[0].json["stream"] is True


def variants(wire: Wire) -> dict[str, Answer]:
    """The same stream, written in all the ways the standard and the servers know."""
    events = wire.events(*TEXTS)
    plain = sse(events)
    first, _, rest = plain.partition(b"\n\n")
    put = functools.partial(Answer, type="text/event-stream", framing="chunked")
    return {
        "lf": put(plain),
        "crlf": put(sse(events, "\r\n")),
        "cr": put(sse(events, "\r")),
        "bom": put(b"\xef\xbb\xbf" + plain),
        "comments": put(b": hello\n\n:\n" + plain.replace(b"\n\n", b"\n: ping\n\n: PING\n\n")),
        "blank lines": put(b"\n\n\n" + plain.replace(b"\n\n", b"\n\n\n\n")),
        "no space": put(re.sub(rb"(?m)^data: ", b"data:", plain)),
        "other fields": put(
            re.sub(rb"(?m)^data: ", b"id: 7\nretry: 10\nfoo: x\nfoo\ndata: ", plain)
        ),
        "no event names": put(re.sub(rb"(?m)^event: \w+\n", b"", plain)),
        "multi-line data": put(multi_line(events)),
        "no last blank line": put(plain.rstrip(b"\n")),
        "byte by byte": put(plain, piece=1),
        "byte by byte, crlf": put(sse(events, "\r\n"), piece=1),
        "gzip": put(plain, zipped=True, piece=5),
        "with a length": put(plain, framing="length"),
        "until the end of the connection": put(plain, framing="close"),
        "content type with charset": put(plain, type="text/event-stream; charset=utf-8"),
        "content type in capitals": put(plain, type="Text/Event-Stream"),
        "content type of json": put(plain, type="application/json"),
        "content type of text": put(plain, type="text/plain"),
        "content type of nothing": put(plain, type=""),
        "after a 103": put(plain, first=b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        "first event alone": put([first + b"\n", b"\n", rest]),
        "reset after the end": put(plain, framing="length", fault="reset", at=1.0),
    }


def multi_line(events: list[Any]) -> bytes:
    """The events with their JSON over many data lines."""
    out = ""
    for event in events:
        text = event if isinstance(event, str) else json.dumps(event, indent=1, ensure_ascii=False)
        out += "".join(f"data: {line}\n" for line in text.split("\n")) + "\n"
    return out.encode()


@pytest.mark.parametrize("how", variants(WIRES["openai"]))
async def test_a_stream_is_read_however_it_is_written(
    server: Server, connect: Connect, wire: Wire, how: str
) -> None:
    server.play(variants(wire)[how])
    pieces, reply = await read(connect(wire, retries=0))
    assert "".join(pieces) == reply.text == WHOLE
    assert all(pieces)
    assert reply.usage.tokens_out == 7


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), end=st.sampled_from(["\n", "\r\n", "\r"]))
@pytest.mark.parametrize("name", WIRES)
def test_a_stream_may_be_cut_into_pieces_anywhere(
    server: Server, connect: Connect, name: str, data: st.DataObject, end: str
) -> None:
    body = sse(WIRES[name].events(*TEXTS), end)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=30)))
    ends = [0, *cuts, len(body)]
    pieces = [body[a:b] for a, b in itertools.pairwise(ends)]
    server.play(Answer(pieces, type="text/event-stream", framing="chunked"))
    got, reply = asyncio.run(read(connect(WIRES[name], retries=0)))
    assert "".join(got) == reply.text == WHOLE


@pytest.mark.parametrize("end", ["\n", "\r\n"])
async def test_a_stream_may_be_cut_at_every_byte(
    server: Server, connect: Connect, wire: Wire, end: str
) -> None:
    body = sse(wire.events("ü\u2028", "🜂"), end)
    model = connect(wire, retries=0)
    for cut in range(1, len(body), 3 if end == "\n" else 5):
        server.play(Answer([body[:cut], body[cut:]], type="text/event-stream", framing="chunked"))
        _, reply = await read(model)
        assert reply.text == "ü\u2028🜂"


@pytest.mark.parametrize("size", [1, 10, 10_000])
async def test_a_compressed_stream_may_be_flushed_anywhere(
    server: Server, connect: Connect, wire: Wire, size: int
) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    body = sse(wire.events(*TEXTS))
    pieces = [b""]
    for at in range(0, len(body), 37):
        pieces += [packer.compress(body[at : at + 37]), packer.flush(zlib.Z_SYNC_FLUSH)]
    packed = b"".join([*pieces, packer.flush()])
    server.play(
        Answer(packed, type="text/event-stream", framing="chunked", piece=size,
               headers={"content-encoding": "gzip"})
    )  # fmt: skip
    _, reply = await read(connect(wire, retries=0))
    assert reply.text == WHOLE


async def test_pieces_arrive_before_the_stream_goes_on(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("one", "two", fault="hang", at=0.75))
    async with connect(wire).stream("hi") as stream:
        with anyio.fail_after(5):
            assert await anext(stream) == "one"
    await until(lambda: server.open == 0)


async def test_a_missing_done_after_the_finish_reason_is_fine(
    server: Server, connect: Connect
) -> None:
    wire = WIRES["openai"]
    server.play(wire.stream(events=wire.events("right")[:-1]))
    _, reply = await read(connect(wire))
    assert (reply.text, reply.finish, reply.usage.tokens_out) == ("right", "stop", 7)
    assert len(server.requests) == 1


async def test_a_missing_message_stop_after_the_stop_reason_is_fine(
    server: Server, connect: Connect
) -> None:
    wire = WIRES["anthropic"]
    server.play(wire.stream(events=wire.events("right")[:-1]))
    _, reply = await read(connect(wire))
    assert (reply.text, reply.finish) == ("right", "end_turn")


async def test_nothing_after_done_is_waited_for(server: Server, connect: Connect) -> None:
    events = sse(openai_events("right"))
    server.play(
        Answer(
            [events, b"x"],
            type="text/event-stream",
            framing="chunked",
            pause=0.002,
            fault="hang",
            at=len(events) / (len(events) + 1),
        )
    )
    _, reply = await read(connect(WIRES["openai"]))
    assert reply.text == "right"


COUNT = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


@pytest.mark.parametrize("where", range(6))
async def test_usage_is_read_from_any_chunk(server: Server, connect: Connect, where: int) -> None:
    events = openai_events("a", "b", usage=False)
    extra = {"choices": [{"index": 0, "delta": {}, "finish_reason": None}], "usage": COUNT}
    if where < 4:
        events[where] = {**events[where], "usage": COUNT}
    else:
        events.insert(where - 4, extra)
    server.play(WIRES["openai"].stream(events=events))
    _, reply = await read(connect(WIRES["openai"]))
    assert (reply.text, reply.usage.tokens_in, reply.usage.tokens_out) == ("ab", 11, 7)


async def test_usage_that_grows_with_the_chunks_is_not_added_up(
    server: Server, connect: Connect
) -> None:
    events = [
        {**event, "usage": {"prompt_tokens": 11, "completion_tokens": n, "total_tokens": 11 + n}}
        for n, event in enumerate(openai_events("a", "b", usage=False)[:-1], 4)
    ]
    server.play(WIRES["openai"].stream(events=[*events, "[DONE]"]))
    _, reply = await read(connect(WIRES["openai"]))
    assert (reply.usage.tokens_in, reply.usage.tokens_out) == (11, 7)


async def test_usage_of_null_in_the_other_chunks_takes_nothing_away(
    server: Server, connect: Connect
) -> None:
    events = openai_events("a", usage=False)
    events[1] = {**events[1], "usage": COUNT}
    events = [{"usage": None, **event} if isinstance(event, dict) else event for event in events]
    server.play(WIRES["openai"].stream(events=events))
    _, reply = await read(connect(WIRES["openai"]))
    assert reply.usage.tokens_out == 7


EMPTY: list[Any] = [
    {"choices": []},
    {"choices": None},
    {},
    {"choices": [{"index": 0}]},
    {"choices": [{"index": 0, "delta": None}]},
    {"choices": [{"index": 0, "delta": {}}]},
    {"choices": [{"index": 0, "delta": {"content": ""}}]},
    {"choices": [{"index": 0, "delta": {"content": None, "tool_calls": None}}]},
    {"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": ""}]},
    {"prompt_filter_results": [], "choices": [], "usage": None},
    {"choices": [{"index": 0, "delta": {"content": "", "tool_calls": []}, "finish_reason": None}]},
]


@pytest.mark.parametrize("number", range(len(EMPTY)))
async def test_empty_chunks_are_no_pieces(server: Server, connect: Connect, number: int) -> None:
    events = openai_events("a", "b")
    many = [item for event in events[:-1] for item in (EMPTY[number], event)]
    server.play(WIRES["openai"].stream(events=[*many, EMPTY[number], "[DONE]"]))
    pieces, reply = await read(connect(WIRES["openai"], retries=0))
    assert (pieces, reply.text, reply.finish) == (["a", "b"], "ab", "stop")


async def test_unknown_events_of_anthropic_are_passed_over(
    server: Server, connect: Connect
) -> None:
    wire = WIRES["anthropic"]
    odd = [{"type": "ping"}, {"type": "surprise", "x": [1]}]
    odd += [{"type": "content_block_delta", "index": 0, "delta": {"type": "citations_delta"}}]
    events = wire.events("a", "b")
    server.play(wire.stream(events=[*events[:2], *odd, *events[2:-1], *odd[:2], events[-1]]))
    pieces, reply = await read(connect(wire, retries=0))
    assert (pieces, reply.text) == (["a", "b"], "ab")


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream", "text/plain", ""])
async def test_a_complete_json_answer_to_a_stream_request_is_one_piece(
    server: Server, connect: Connect, wire: Wire, kind: str
) -> None:
    server.play(wire.good("right", type=kind))
    pieces, reply = await read(connect(wire))
    assert (pieces, reply.text, reply.usage.tokens_out) == (["right"], "right", 7)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("name", "finish"),
    [
        ("openai", "length"),
        ("openai", "content_filter"),
        ("anthropic", "max_tokens"),
        ("anthropic", "refusal"),
    ],
)
async def test_a_truncated_or_filtered_stream_is_a_reply(
    server: Server, connect: Connect, name: str, finish: str
) -> None:
    server.play(WIRES[name].stream(events=WIRES[name].events("par", finish=finish)))
    _, reply = await read(connect(WIRES[name]))
    assert (reply.text, reply.finish) == ("par", finish)
    assert len(server.requests) == 1


async def test_a_refusal_in_pieces_is_no_text(server: Server, connect: Connect) -> None:
    events = openai_events()
    events[1:1] = [{"choices": [{"index": 0, "delta": {"refusal": "I can"}}]}] * 2
    server.play(WIRES["openai"].stream(events=events))
    pieces, reply = await read(connect(WIRES["openai"]))
    assert (pieces, reply.text) == ([], "")


# ── Tool calls in fragments ───


def fragment(index: int | None, name: str | None, arguments: str | None, id: str | None) -> Any:
    """One fragment of a tool call."""
    function = {"name": name, "arguments": arguments}
    call = {"index": index, "id": id, "type": "function", "function": function}
    call["function"] = {key: value for key, value in function.items() if value is not None}
    return {key: value for key, value in call.items() if value is not None}


TWO = {
    "one after the other": [
        [fragment(0, "add", "", "a")],
        [fragment(0, None, '{"x": ', None)],
        [fragment(0, None, "1}", None)],
        [fragment(1, "sub", "", "b")],
        [fragment(1, None, '{"x": 2}', None)],
    ],
    "both in each chunk": [
        [fragment(0, "add", "", "a"), fragment(1, "sub", "", "b")],
        [fragment(0, None, '{"x":', None), fragment(1, None, '{"x"', None)],
        [fragment(1, None, ": 2}", None), fragment(0, None, "1}", None)],
    ],
    "second first": [[fragment(1, "sub", '{"x": 2}', "b")], [fragment(0, "add", '{"x": 1}', "a")]],
    "without index": [
        [fragment(None, "add", '{"x": 1}', "a")],
        [fragment(None, "sub", '{"x": 2}', "b")],
    ],
    "without index, in one chunk": [
        [fragment(None, "add", '{"x": 1}', "a"), fragment(None, "sub", '{"x": 2}', "b")],
    ],
    "without index, in fragments": [
        [fragment(None, "add", '{"x"', "a")],
        [fragment(None, None, ": 1}", None)],
        [fragment(None, "sub", '{"x"', "b")],
        [fragment(None, None, ": 2}", None)],
    ],
    "all with index 0": [
        [fragment(0, "add", '{"x": 1}', "a")],
        [fragment(0, "sub", '{"x": 2}', "b")],
    ],
    "all with index 0, in fragments": [
        [fragment(0, "add", "", "a")],
        [fragment(0, None, '{"x": 1}', None)],
        [fragment(0, "sub", "", "b")],
        [fragment(0, None, '{"x": 2}', None)],
    ],
    "empty ids later": [
        [fragment(0, "add", '{"x"', "a")],
        [fragment(0, "", ": 1}", "")],
        [fragment(1, "sub", '{"x"', "b")],
        [fragment(1, "", ": 2}", "")],
    ],
    "the same id in each fragment": [
        [fragment(0, "add", '{"x"', "a")],
        [fragment(0, "add", ": 1}", "a")],
        [fragment(1, "sub", '{"x"', "b")],
        [fragment(1, "sub", ": 2}", "b")],
    ],
    "index 1 and 3": [[fragment(1, "add", '{"x": 1}', "a")], [fragment(3, "sub", '{"x": 2}', "b")]],
    "null fields": [
        [{"index": 0, "id": "a", "type": None, "function": {"name": "add", "arguments": None}}],
        [{"index": 0, "id": None, "function": {"name": None, "arguments": '{"x": 1}'}}],
        [fragment(1, "sub", '{"x": 2}', "b")],
    ],
}


@pytest.mark.parametrize("how", TWO)
async def test_tool_calls_in_fragments_are_put_together(
    server: Server, connect: Connect, how: str
) -> None:
    events = openai_events(finish="tool_calls")
    events[1:1] = [
        {"choices": [{"index": 0, "delta": {"tool_calls": calls}}]} for calls in TWO[how]
    ]
    server.play(WIRES["openai"].stream(events=events))
    pieces, reply = await read(connect(WIRES["openai"], retries=0))
    calls = sorted((call.id, call.name, call.arguments) for call in reply.tool_calls)
    assert pieces == []
    assert calls == [("a", "add", {"x": 1}), ("b", "sub", {"x": 2})]


@pytest.mark.parametrize("empty", ["", None])
async def test_tool_calls_without_any_id_stay_two(
    server: Server, connect: Connect, empty: str | None
) -> None:
    events = openai_events(finish="tool_calls")
    deltas = [
        [fragment(0, "add", '{"x": 1}', empty)],
        [fragment(1, "add", '{"x": ', empty)],
        [fragment(1, None, "2}", empty)],
    ]
    events[1:1] = [{"choices": [{"index": 0, "delta": {"tool_calls": calls}}]} for calls in deltas]
    server.play(WIRES["openai"].stream(events=events))
    _, reply = await read(connect(WIRES["openai"]))
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [
        ("add", {"x": 1}),
        ("add", {"x": 2}),
    ]


def anthropic_tools(*parts: tuple[str, list[str]]) -> list[Any]:
    """The events of a message that calls tools, with their arguments in pieces."""
    events = WIRES["anthropic"].events("let me see", finish="tool_use")
    made: list[Any] = []
    for number, (name, pieces) in enumerate(parts, 1):
        block = {"type": "tool_use", "id": f"t{number}", "name": name, "input": {}}
        made += [{"type": "content_block_start", "index": number, "content_block": block}]
        made += [
            {
                "type": "content_block_delta",
                "index": number,
                "delta": {"type": "input_json_delta", "partial_json": piece},
            }
            for piece in pieces
        ]
        made += [{"type": "content_block_stop", "index": number}]
    return [*events[:-2], *made, *events[-2:]]


async def test_anthropic_tool_calls_in_fragments_are_put_together(
    server: Server, connect: Connect
) -> None:
    events = anthropic_tools(
        ("add", ["", '{"x"', ": ", "1}"]), ("now", [""]), ("sub", ['{"x": 2}'])
    )
    server.play(WIRES["anthropic"].stream(events=events))
    _, reply = await read(connect(WIRES["anthropic"]))
    assert [(call.id, call.name, call.arguments) for call in reply.tool_calls] == [
        ("t1", "add", {"x": 1}),
        ("t2", "now", {}),
        ("t3", "sub", {"x": 2}),
    ]
    assert reply.text == "let me see"
    assert reply.finish == "tool_use"


# ── Broken streams ───


def cuts(wire: Wire) -> dict[str, Answer]:
    """Streams that end before their time, after the text "one"."""
    events = wire.events("one", "two")
    at = next(n for n, event in enumerate(events) if "'one'" in str(event)) + 1
    begun, event = sse(events[:at]), sse(events[at : at + 1])
    stream: dict[str, Any] = {"type": "text/event-stream", "framing": "chunked"}
    error = {**wire.problem("overloaded_error", "too many of you"), "x": 1}
    half = len(begun) / len(begun + event)
    last = sse(events[-3:-2] if wire.provider == "anthropic" else events[-1:])
    return {
        "cut cleanly": Answer(begun, **stream),
        "cut cleanly without a finish reason": Answer(begun + last, **stream),
        "cut in an event": Answer(begun + event[:-20], **stream),
        "cut in a character": Answer(begun + 'data: {"x": "ü'.encode()[:-1], **stream),
        "closed": Answer([begun, event], **stream, fault="close", at=half),
        "closed in an event": Answer(begun + event[:-20], **stream, fault="close", at=1.0),
        "reset": Answer([begun, event], **stream, fault="reset", at=half),
        "closed, with a length": Answer(
            [begun, event], type="text/event-stream", fault="close", at=half
        ),
        "closed, without framing": Answer(begun, type="text/event-stream", framing="close"),
        "stalled": Answer([begun, event], **stream, fault="hang", at=half),
        "garbage": Answer(begun + b"data: {this is no JSON}\n\n", **stream),
        "binary": Answer(begun + b"\x00\xff\xfe\x80 garbage\n\n", **stream),
        "invalid utf-8": Answer(begun + event.replace(b"two", b"t\xffo"), **stream),
        "an error event": Answer(begun + sse([error]), **stream),
        "an error in words": Answer(begun + b"event: error\ndata: it broke\n\n", **stream),
        "an error text": Answer(begun + b'data: {"error": "it broke"}\n\n', **stream),
        "html": Answer(begun + b"<html>502</html>", **stream),
    }


@pytest.mark.parametrize("how", cuts(WIRES["openai"]))
async def test_a_stream_that_breaks_after_a_piece_raises_with_the_partial_text_and_is_not_retried(
    server: Server, connect: Connect, wire: Wire, how: str
) -> None:
    server.play(cuts(wire)[how], wire.stream("right"))
    pieces, error = await broken(connect(wire, stall=0.1))
    assert "".join(pieces) in ("one", "onetwo", "onet\ufffdo")
    assert error.partial == "".join(pieces)
    assert len(server.requests) == 1
    await until(lambda: server.open <= 1)


@pytest.mark.parametrize("how", cuts(WIRES["openai"]))
async def test_a_broken_stream_stays_broken(
    server: Server, connect: Connect, wire: Wire, how: str
) -> None:
    server.play(cuts(wire)[how])
    stream = connect(wire, stall=0.1).stream("hi")
    with anyio.fail_after(5):
        with pytest.raises(ember.CallError):
            async for _ in stream:
                pass
        with pytest.raises((ember.EmberError, StopAsyncIteration)) as again:
            await anext(stream)
        assert not isinstance(again.value, StopAsyncIteration), "silence after a fault"
        with pytest.raises(ember.EmberError):
            assert stream.reply
    await stream.aclose()


async def test_an_error_event_is_told_in_the_provider_s_words(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(cuts(wire)["an error event"])
    _, error = await broken(connect(wire))
    check(error, "too many of you")


@pytest.mark.parametrize("name", WIRES)
async def test_an_event_with_any_part_of_the_wrong_kind_is_a_reply_or_a_typed_error(
    server: Server, connect: Connect, name: str
) -> None:
    good = anthropic_tools(("add", ['{"x": 1}'])) if name == "anthropic" else openai_events("a")
    if name == "openai":
        calls = [fragment(0, "add", '{"x": 1}', "a")]
        good.insert(2, {"choices": [{"index": 0, "delta": {"tool_calls": calls}}]})
    cases = [
        [*good[:at], mutant, *good[at + 1 :]]
        for at, event in enumerate(good)
        for mutant in mutants(event)
    ]
    model = connect(WIRES[name], retries=0, price=(1, 2))

    async def streamed(**options: Any) -> ember.Reply:
        return (await read(model, **options))[1]

    for events in random.Random(7).sample(cases, 100):
        lines = [event if event == "[DONE]" else json.dumps(event) for event in events]
        for options in ({}, {"tools": [add]}):
            server.play(WIRES[name].stream(events=lines), WIRES[name].stream("done"))
            await reply_or_error(streamed, lines, **options)
            assert 1 <= len(server.requests) <= 8  # a tool that is called for ever has its steps


@pytest.mark.parametrize("fault", TRANSIENT)
async def test_a_fault_before_the_first_piece_is_retried(
    server: Server, connect: Connect, wire: Wire, fault: str
) -> None:
    bad = TRANSIENT[fault](wire)
    server.play(bad, wire.stream("right"))
    pieces, reply = await read(connect(wire))
    assert (pieces, reply.text) == (["right"], "right")
    assert len(server.requests) == 2
    server.play(bad)
    with anyio.fail_after(10), pytest.raises(ember.EmberError) as caught:
        await read(connect(wire))
    check(caught.value)
    assert len(server.requests) == 3


def before(wire: Wire) -> dict[str, Answer]:
    """Event streams that fail before their first text."""
    events = wire.events("one")
    begun = sse(events[:1])
    stream: dict[str, Any] = {"type": "text/event-stream", "framing": "chunked"}
    error = {**wire.problem("overloaded_error", "too many of you", 529)}
    return {
        "nothing": Answer(b"", **stream),
        "cut": Answer(begun, **stream),
        "reset": Answer(begun, **stream, fault="reset", at=1.0),
        "closed": Answer(begun, **stream, fault="close", at=1.0),
        "error": Answer(sse([error]), **stream),
        "error after the beginning": Answer(begun + sse([error]), **stream),
        "garbage": Answer(b"data: {\n\n", **stream),
        "html": Answer("<html></html>", **stream),
    }


@pytest.mark.parametrize("how", before(WIRES["openai"]))
async def test_an_event_stream_that_breaks_before_the_first_piece_is_retried(
    server: Server, connect: Connect, wire: Wire, how: str
) -> None:
    server.play(before(wire)[how], wire.stream("right"))
    pieces, _ = await read(connect(wire))
    assert pieces == ["right"]
    assert len(server.requests) == 2
    server.play(before(wire)[how])
    with anyio.fail_after(10), pytest.raises(ember.EmberError) as caught:
        await read(connect(wire))
    check(caught.value)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 307])
async def test_a_final_status_ends_a_stream_after_one_request(
    server: Server, connect: Connect, wire: Wire, status: int
) -> None:
    headers = {"location": "/x"} if status == 307 else {}
    server.play(Answer(wire.problem("bad", "no luck"), status, headers=headers), wire.stream("x"))
    _, error = await broken(connect(wire))
    assert (error.status, error.transient) == (status, False)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", STATUSES)
async def test_a_status_of_a_stream_is_kept_in_the_error(
    server: Server, connect: Connect, wire: Wire, status: int
) -> None:
    server.play(Answer(wire.problem("bad"), status))
    _, error = await broken(connect(wire, retries=1))
    assert (error.status, error.attempts, error.transient) == (status, 2, True)


async def test_a_stream_that_never_begins_stalls_and_is_not_sent_twice(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("x", fault="hang"))
    pieces, error = await broken(connect(wire, stall=0.05))
    assert pieces == []
    assert len(server.requests) == 1
    check(error, "0.05")
    await until(lambda: server.open == 0)


async def test_comments_keep_a_stream_from_stalling(
    server: Server, connect: Connect, wire: Wire
) -> None:
    body = [b": ping\n\n"] * 30 + [sse(wire.events("right"))]
    server.play(Answer(body, type="text/event-stream", framing="chunked", pause=0.01))
    assert (await read(connect(wire, stall=0.25)))[0] == ["right"]


async def test_a_slow_consumer_does_not_stall_the_stream(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("a", "b", "c", piece=50))
    pieces: list[str] = []
    async for piece in connect(wire, stall=0.04).stream("hi"):
        pieces.append(piece)
        await asyncio.sleep(0.05)
    assert pieces == ["a", "b", "c"]


# ── Leaving ───


def endless(wire: Wire) -> Answer:
    """A stream that gives "one" and "two", then hangs."""
    events = wire.events("one", "two", "three")
    at = next(n for n, event in enumerate(events) if "'two'" in str(event)) + 1
    begun, rest = sse(events[:at]), sse(events[at:])
    share = (len(begun) + 0.5) / len(begun + rest)
    return wire.stream(events=events, fault="hang", at=share)


async def test_leaving_early_closes_the_connection_at_once(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(endless(wire))
    async with connect(wire).stream("hi") as stream:
        async for piece in stream:
            assert piece == "one"
            break
    await until(lambda: server.open == 0)
    assert len(server.requests) == 1


@pytest.mark.filterwarnings("error")
async def test_a_stream_that_is_dropped_closes_its_connection_in_silence(
    server: Server, connect: Connect, wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    server.play(endless(wire))

    async def first() -> str:
        async for piece in connect(wire).stream("hi"):
            return piece
        return ""

    assert await first() == "one"
    gc.collect()
    await until(lambda: server.open == 0)
    assert caplog.records == []


async def test_a_stream_that_was_left_can_be_closed_by_hand_twice(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(endless(wire))
    stream = connect(wire).stream("hi")
    assert await anext(stream) == "one"
    await stream.aclose()
    await stream.aclose()
    await until(lambda: server.open == 0)
    with pytest.raises((ember.EmberError, StopAsyncIteration)):
        await anext(stream)


async def test_a_stream_that_was_never_begun_can_be_closed(
    server: Server, connect: Connect, wire: Wire
) -> None:
    stream = connect(wire).stream("hi")
    await stream.aclose()
    async with connect(wire).stream("hi"):
        pass
    assert server.requests == []


async def test_a_finished_stream_keeps_its_reply_and_its_end(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("right"))
    stream = connect(wire).stream("hi")
    assert [piece async for piece in stream] == ["right"]
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await stream.aclose()
        assert stream.reply.text == "right"
    assert len(server.requests) == 1


async def test_a_finished_stream_gives_its_connection_back(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("right"))
    model = connect(wire)
    for _ in range(4):
        await read(model)
    assert server.opened == 1


async def test_the_reply_before_the_end_is_an_error_that_speaks(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("one", "two"))
    async with connect(wire).stream("hi") as stream:
        with pytest.raises(ember.EmberError):
            assert stream.reply
        assert await anext(stream) == "one"
        with pytest.raises(ember.EmberError, match="stream"):
            assert stream.reply


async def consume(stream: ember.Stream, pieces: list[str]) -> None:
    """Read a stream to its end, in whichever task."""
    async for piece in stream:
        pieces.append(piece)


async def no_silence(stream: ember.Stream) -> None:
    """A stream that was cancelled never ends as if it were whole."""
    with anyio.fail_after(2):
        with pytest.raises(ember.EmberError):
            await anext(stream)
        with pytest.raises(ember.EmberError):
            assert stream.reply


@pytest.mark.parametrize("given", [0, 1, 2])
async def test_a_cancelled_stream_closes_and_never_ends_in_silence(
    server: Server, connect: Connect, wire: Wire, given: int
) -> None:
    server.play(endless(wire) if given else wire.stream("x", fault="hang"))
    stream, pieces = connect(wire).stream("hi"), list[str]()
    task = asyncio.create_task(consume(stream, pieces))
    await until(lambda: len(pieces) == (2 if given else 0) and len(server.requests) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: server.open == 0)
    await no_silence(stream)
    assert len(server.requests) == 1


async def test_a_cancellation_between_two_pieces_leaves_a_stream_that_goes_on(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("one", "two"))
    stream = connect(wire).stream("hi")
    got = asyncio.Event()

    async def first() -> None:
        await anext(stream)
        got.set()
        await asyncio.sleep(10)

    task = asyncio.create_task(first())
    await got.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await anext(stream) == "two"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert stream.reply.text == "onetwo"


async def test_a_timeout_around_the_consumer_is_a_timeout(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(endless(wire))
    stream, pieces = connect(wire).stream("hi"), list[str]()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await consume(stream, pieces)
    assert pieces == ["one", "two"]
    await until(lambda: server.open == 0)
    await no_silence(stream)


@pytest.mark.parametrize("catch", [anyio.move_on_after, anyio.fail_after])
async def test_a_cancel_scope_around_the_consumer_closes_the_connection(
    server: Server, connect: Connect, wire: Wire, catch: Callable[[float], Any]
) -> None:
    server.play(endless(wire))
    pieces: list[str] = []
    try:
        with catch(0.1):
            async with connect(wire).stream("hi") as stream:
                await consume(stream, pieces)
    except TimeoutError:
        assert catch is anyio.fail_after
    assert pieces == ["one", "two"]
    await until(lambda: server.open == 0)


async def test_the_body_of_async_with_may_raise(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(endless(wire))
    with pytest.raises(ZeroDivisionError):
        async with connect(wire).stream("hi") as stream:
            await anext(stream)
            raise ZeroDivisionError
    await until(lambda: server.open == 0)


async def respond(content: Any, left: anyio.Event, sent: list[bytes]) -> None:
    """What Starlette's StreamingResponse does: one task sends, another waits for the client."""
    async with anyio.create_task_group() as group:

        async def send() -> None:
            async for chunk in content:
                sent.append(chunk.encode("utf-8"))
            group.cancel_scope.cancel()

        async def listen() -> None:
            await left.wait()
            group.cancel_scope.cancel()

        group.start_soon(listen)
        await send()


async def test_a_stream_drops_into_a_streaming_response(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("one", "two"))
    sent: list[bytes] = []
    await respond(connect(wire).stream("hi"), anyio.Event(), sent)
    assert sent == [b"one", b"two"]


async def test_a_client_of_a_streaming_response_that_leaves_ends_the_call(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(endless(wire))
    sent, left = list[bytes](), anyio.Event()
    task = asyncio.create_task(respond(connect(wire).stream("hi"), left, sent))
    await until(lambda: len(sent) == 2)
    left.set()
    await task
    await until(lambda: server.open == 0)
    assert len(server.requests) == 1


async def test_pieces_may_be_read_in_different_tasks(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("one", "two", piece=40))
    stream = connect(wire).stream("hi")
    ends: list[str] = []
    for _ in range(2):
        ends.append(await asyncio.create_task(stream.__anext__()))
    with pytest.raises(StopAsyncIteration):
        await asyncio.create_task(stream.__anext__())
    assert ends == ["one", "two"]


async def test_fifty_streams_at_once_keep_their_texts_apart(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(lambda seen: wire.stream(*seen.json["messages"][-1]["content"], piece=64))
    model = connect(wire)

    async def one(number: int) -> str:
        return "".join([piece async for piece in model.stream(f"text {number}")])

    texts = await asyncio.gather(*(one(number) for number in range(50)))
    assert texts == [f"text {number}" for number in range(50)]
