"""Every fault of a server, once and always, on both wires: the answer or an error that speaks."""

import asyncio
import email.utils
import functools
import gzip
import random
import re
import socket
import time
import traceback
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from conftest import Connect
from server import WIRES, Answer, Server, Wire, serving, until

import ember

pytestmark = pytest.mark.usefixtures("no_backoff", "transport")

TO_DO = re.compile(
    r"\b(add|ask|change|check|choose|correct|find|fix|give|increase|look|lower|pass|pay|pick|raise|reduce|"
    r"remove|rephrase|retry|see|send|set|shorten|split|start|top up|try|update|use|wait)\b",
    re.IGNORECASE,
)


async def failure(model: ember.Model, prompt: str = "hi", **options: Any) -> ember.EmberError:
    """The error of a call that has to fail: typed, in bounded time, and speaking."""
    with anyio.fail_after(15), pytest.raises(ember.EmberError) as caught:
        await model(prompt, **options)
    check(caught.value)
    return caught.value


def check(error: ember.EmberError, *facts: str) -> None:
    """The error says who, what happened and what to do; nothing of a library below shows."""
    message = str(error)
    assert re.search("openai|anthropic", message), message
    assert re.search("gpt-4o|claude-sonnet-4-5", message), message
    assert TO_DO.search(message), f"what to do? {message}"
    assert len(message) < 2000
    for fact in facts:
        assert fact in message, f"{fact!r} is not in {message!r}"
    shown = "".join(traceback.format_exception(error))
    assert not re.search(r"^(httpx|httpcore|h11|anyio|json)\.", shown, re.MULTILINE), shown


def bought_once(server: Server) -> bool:
    """Whether no call was sent a second complete 200."""
    return max(server.bought.values(), default=0) <= 1


# ── Faults that are tried again ───

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
MALFORMED: dict[str, Callable[[Wire], Answer]] = {
    "empty body": lambda wire: Answer(b""),
    "blank body": lambda wire: Answer(b" \n "),
    "not json": lambda wire: Answer(b"this is not JSON"),
    "truncated json": lambda wire: Answer(Answer(wire.answer("right")).pieces()[0][:-9]),
    "html": lambda wire: Answer("<html><body>Bad gateway</body></html>", type="text/html"),
    "invalid utf-8": lambda wire: Answer(
        Answer(wire.answer("right")).pieces()[0].replace(b"right", b"ri\xff\xfeght")
    ),
    "a list": lambda wire: Answer([]),
    "null": lambda wire: Answer("null"),
    "a number": lambda wire: Answer("7"),
    "a text": lambda wire: Answer('"right"'),
    "an empty object": lambda wire: Answer({}),
    "another object": lambda wire: Answer({"status": "ok"}),
    "a thousand brackets": lambda wire: Answer("[" * 200_000),
    "a number of 5000 digits": lambda wire: Answer('{"choices": ' + "9" * 5000 + "}"),
    "truncated gzip": lambda wire: Answer(
        gzip.compress(Answer(wire.answer("right")).pieces()[0])[:-30],
        headers={"content-encoding": "gzip"},
    ),
    "gzip that is none": lambda wire: wire.good(headers={"content-encoding": "gzip"}),
}
BROKEN: dict[str, Callable[[Wire], Answer]] = {
    "reset before the headers": lambda wire: wire.good(fault="reset"),
    "reset after the headers": lambda wire: wire.good(fault="reset", at=0.0),
    "reset in the body": lambda wire: wire.good(fault="reset", at=0.5),
    "closed before the headers": lambda wire: wire.good(fault="close"),
    "closed after the headers": lambda wire: wire.good(fault="close", at=0.0),
    "closed in the body": lambda wire: wire.good(fault="close", at=0.5),
    "closed in a chunk": lambda wire: wire.good(fault="close", at=0.5, framing="chunked"),
    "closed before the last chunk": lambda wire: wire.good(
        fault="close", at=1.0, framing="chunked", piece=20
    ),
    "closed in a body without length": lambda wire: wire.good(
        fault="close", at=0.5, framing="close"
    ),
    "bad chunk size": lambda wire: Answer(
        [b"zz\r\n"], head=HEAD + b"transfer-encoding: chunked\r\n\r\n"
    ),
    "not http": lambda wire: Answer(
        [b"\x15\x03\x01\x00\x02\x02\x28\r\n\r\n"], head=b"", then="close"
    ),
    "bad status line": lambda wire: Answer(head=b"HTTP/1.1 OK 200\r\n\r\n", then="close"),
    "bad content-length": lambda wire: Answer(
        head=HEAD + b"content-length: -5\r\n\r\n", then="close"
    ),
    "endless header": lambda wire: Answer(head=HEAD + b"x: " + b"y" * 300_000, then="close"),
}
STATUSES = [408, 409, 429, 500, 502, 503, 504, 529]


def status_answer(status: int) -> Callable[[Wire], Answer]:
    """An error status, as the provider words it."""
    return lambda wire: Answer(wire.problem("some_error", "try another day"), status=status)


EITHER = {"closed in a body without length", "gzip that is none", "truncated gzip"}
TRANSIENT = MALFORMED | BROKEN | {str(status): status_answer(status) for status in STATUSES}


@pytest.mark.parametrize("fault", TRANSIENT)
async def test_a_transient_fault_once_is_followed_by_the_right_answer(
    server: Server, connect: Connect, wire: Wire, fault: str
) -> None:
    server.play(TRANSIENT[fault](wire), wire.good("right"))
    with anyio.fail_after(15):
        reply = await connect(wire)("hi")
    assert reply.text == "right"
    assert len(server.requests) == 2
    assert len({seen.body for seen in server.requests}) == 1


@pytest.mark.parametrize("fault", TRANSIENT)
async def test_a_transient_fault_that_stays_is_a_typed_error_after_all_attempts(
    server: Server, connect: Connect, wire: Wire, fault: str
) -> None:
    server.play(TRANSIENT[fault](wire))
    error = await failure(connect(wire, retries=2))
    assert len(server.requests) == 3
    kind = ember.ReplyError if fault in MALFORMED else ember.CallError
    assert isinstance(error, ember.CallError | ember.ReplyError if fault in EITHER else kind)
    assert error.attempts == 3
    assert error.transient


@pytest.mark.parametrize("fault", ["503", "closed in the body", "truncated json"])
async def test_without_retries_a_transient_fault_is_one_request(
    server: Server, connect: Connect, wire: Wire, fault: str
) -> None:
    server.play(TRANSIENT[fault](wire))
    error = await failure(connect(wire, retries=0))
    assert len(server.requests) == 1
    assert isinstance(error, ember.ReplyError | ember.CallError)
    assert error.attempts == 1


@pytest.mark.parametrize("status", STATUSES)
async def test_a_status_is_named_in_the_error_with_the_provider_s_words(
    server: Server, connect: Connect, wire: Wire, status: int
) -> None:
    server.play(status_answer(status)(wire))
    error = await failure(connect(wire, retries=1))
    assert isinstance(error, ember.CallError)
    assert (error.status, error.transient, error.attempts) == (status, True, 2)
    check(error, str(status), "try another day")


BAD_ERRORS: dict[str, Answer] = {
    "empty": Answer(b"", 500),
    "html": Answer("<h1>Nginx</h1>", 502, type="text/html"),
    "invalid utf-8": Answer(b"\xff\xfe\xfa", 503),
    "truncated": Answer('{"error": {"mess', 500),
    "a list": Answer([{"error": {"code": 503, "message": "busy"}}], 503),
    "a text": Answer({"error": "busy"}, 503),
    "numbers": Answer({"error": 5}, 503),
    "null": Answer({"error": None}, 500),
    "odd fields": Answer({"error": {"message": {"a": 1}, "type": [], "code": {}}}, 500),
    "watsonx": Answer({"errors": [{"code": "x", "message": "busy"}], "trace": "t"}, 500),
    "deep": Answer("[" * 200_000, 500),
    "long": Answer({"error": {"message": "long " * 100_000}}, 500),
    "bad gzip": Answer(b"plain", 500, headers={"content-encoding": "gzip"}),
    "control characters": Answer({"error": {"message": "\x1b[31mred\x00\r\n"}}, 500),
    "surrogates": Answer('{"error": {"message": "\\ud800"}}', 500),
    "reset": Answer(b"x" * 99, 500, fault="reset", at=0.5),
    "cut": Answer(b"x" * 99, 500, fault="close", at=0.5),
}


@pytest.mark.parametrize("body", BAD_ERRORS)
async def test_an_error_status_with_any_body_is_a_typed_error(
    server: Server, connect: Connect, wire: Wire, body: str
) -> None:
    server.play(BAD_ERRORS[body])
    error = await failure(connect(wire, retries=1))
    assert isinstance(error, ember.CallError)
    assert len(server.requests) == 2
    str(error).encode()


# ── Faults that are not ───

NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
FINAL = [400, 401, 402, 403, 404, 405, 413, 422, 451]


@pytest.mark.parametrize("status", FINAL)
async def test_a_final_status_is_one_request_and_a_typed_error(
    server: Server, connect: Connect, wire: Wire, status: int
) -> None:
    server.play(Answer(wire.problem("invalid_request_error", "no such luck"), status=status))
    error = await failure(connect(wire))
    assert isinstance(error, ember.CallError)
    assert (error.status, error.transient) == (status, False)
    check(error, str(status), "no such luck")
    assert len(server.requests) == 1


async def test_insufficient_quota_is_not_tried_again(
    server: Server, connect: Connect, wire: Wire
) -> None:
    problem = wire.problem("insufficient_quota", "You exceeded your quota", "insufficient_quota")
    server.play(Answer(problem, status=429, headers={"retry-after": "1"}))
    error = await failure(connect(wire))
    assert isinstance(error, ember.CallError)
    assert (error.status, error.transient) == (429, False)
    check(error, "quota")
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
async def test_a_redirect_is_a_typed_error_and_never_followed(
    server: Server, connect: Connect, wire: Wire, status: int
) -> None:
    other = f"{server.url}/elsewhere"
    server.play(Answer(b"", status, headers={"location": other}), wire.good())
    error = await failure(connect(wire))
    assert isinstance(error, ember.CallError)
    assert error.status == status
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [201, 202, 204, 206])
async def test_another_success_status_is_an_answer_or_a_typed_error(
    server: Server, connect: Connect, wire: Wire, status: int
) -> None:
    server.play(wire.good("right", status=status) if status != 204 else Answer(head=NO_CONTENT))
    with anyio.fail_after(15):
        try:
            reply = await connect(wire)("hi")
        except ember.EmberError as error:
            check(error)
        else:
            assert reply.text == "right"
            assert len(server.requests) == 1


async def test_a_switch_of_protocols_is_a_typed_error(
    server: Server, connect: Connect, wire: Wire
) -> None:
    upgrade = b"HTTP/1.1 101 Switching\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n"
    server.play(Answer(head=upgrade, then="close"))
    assert isinstance(await failure(connect(wire)), ember.EmberError)


# ── Connections ───


async def test_a_refused_connection_is_a_transient_error_that_names_the_address(
    connect: Connect, wire: Wire
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    error = await failure(connect(wire, base_url=f"http://{address}{wire.base}", retries=1))
    assert isinstance(error, ember.CallError)
    assert (error.status, error.transient, error.attempts) == (None, True, 2)
    check(error, address)


async def test_an_unknown_host_is_a_typed_error(connect: Connect, wire: Wire) -> None:
    error = await failure(
        connect(wire, base_url="http://nowhere.invalid/v1", retries=0, timeout=10)
    )
    assert isinstance(error, ember.CallError)
    check(error, "nowhere.invalid")


@pytest.mark.parametrize(
    "url", ["127.0.0.1", "ftp://127.0.0.1", "http://", "http://[::1", "http://h:x"]
)
async def test_a_base_url_that_is_none_is_a_typed_error(url: str, wire: Wire) -> None:
    with pytest.raises(ember.EmberError, match=re.escape(url)):
        await ember.model(f"{wire.provider}:{wire.id}", base_url=url, api_key="k")("hi")


async def test_tls_to_a_plain_server_is_a_typed_error(
    server: Server, connect: Connect, wire: Wire
) -> None:
    url = server.url.replace("http:", "https:") + wire.base
    assert isinstance(
        await failure(connect(wire, base_url=url, retries=0, connect=0.1)), ember.CallError
    )


@pytest.mark.parametrize("at", [None, 0.0, 0.5])
async def test_a_hanging_server_ends_at_the_deadline_and_is_not_asked_again(
    server: Server, connect: Connect, wire: Wire, at: float | None
) -> None:
    server.play(wire.good(fault="hang", at=at), wire.good())
    error = await failure(connect(wire, timeout=0.1))
    assert isinstance(error, ember.CallError)
    assert len(server.requests) == 1
    check(error, "0.1")
    await until(lambda: server.open == 0)


@pytest.mark.parametrize("status", [429, 500])
async def test_an_error_whose_body_hangs_ends_at_the_deadline(
    server: Server, connect: Connect, wire: Wire, status: int
) -> None:
    server.play(Answer(b"x" * 99, status, fault="hang", at=0.5))
    assert isinstance(await failure(connect(wire, timeout=0.1)), ember.CallError)
    await until(lambda: server.open == 0)


async def test_a_slow_drip_within_the_deadline_is_an_answer(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good("right", framing="chunked", piece=16, pause=0.001))
    assert (await connect(wire)("hi")).text == "right"
    assert len(server.requests) == 1


async def test_a_slow_drip_past_the_deadline_is_a_typed_error(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good("right", framing="chunked", piece=1, pause=0.01))
    error = await failure(connect(wire, timeout=0.15))
    assert isinstance(error, ember.CallError)
    assert len(server.requests) == 1
    await until(lambda: server.open == 0)


async def test_endless_informational_answers_end_at_the_deadline(
    server: Server, connect: Connect, wire: Wire
) -> None:
    hint = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    server.play(Answer([hint] * 10_000, head=hint, pause=0.001))
    assert isinstance(await failure(connect(wire, timeout=0.15)), ember.CallError)
    await until(lambda: server.open == 0)


async def test_the_deadline_covers_all_attempts(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(Answer(b"", 503, headers={"retry-after-ms": "20"}))
    error = await failure(connect(wire, retries=1000, timeout=0.2))
    assert isinstance(error, ember.CallError)
    assert 1 <= len(server.requests) <= 11


GOOD: dict[str, dict[str, Any]] = {
    "chunked": {"framing": "chunked", "piece": 1},
    "gzip": {"zipped": True},
    "gzip in chunks": {"zipped": True, "framing": "chunked", "piece": 3},
    "until the end of the connection": {"framing": "close"},
    "after a 103": {"first": b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"},
    "after a 100": {"first": b"HTTP/1.1 100 Continue\r\n\r\n"},
    "reset after the last byte": {"fault": "reset", "at": 1.0},
    "close after the last byte": {"fault": "close", "at": 1.0},
    "no content type": {"type": ""},
    "content type of html": {"type": "text/html"},
    "content type of text": {"type": "text/plain; charset=latin-1"},
    "a BOM": {},
    "HTTP/1.0": {"head": b"HTTP/1.0 200 OK\r\nserver: old\r\n\r\n", "then": "close"},
}


@pytest.mark.parametrize("how", GOOD)
async def test_a_complete_answer_is_read_however_it_travels_and_asked_for_once(
    server: Server, connect: Connect, wire: Wire, how: str
) -> None:
    text = 'naïve "…" \u2028 🜂'
    answer = wire.good(text, **GOOD[how])
    if how == "a BOM":
        answer = Answer(b"\xef\xbb\xbf" + answer.pieces()[0])
    server.play(answer)
    reply = await connect(wire)("hi")
    assert reply.text == text
    assert len(server.requests) == 1


# ── Waiting as told ───


def in_seconds(seconds: float) -> str:
    """An HTTP date."""
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


WAITS: dict[str, dict[str, str]] = {
    "seconds": {"retry-after": "0"},
    "decimal seconds": {"retry-after": "0.01"},
    "milliseconds": {"retry-after-ms": "10"},
    "milliseconds first": {"retry-after-ms": "10", "retry-after": "60"},
    "a date that has come": {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"},
    "nothing": {},
    "nonsense": {"retry-after": "soon"},
    "negative": {"retry-after": "-5"},
    "nan": {"retry-after": "nan"},
    "infinite": {"retry-after": "inf"},
    "nonsense in milliseconds": {"retry-after-ms": "nan", "retry-after": "0"},
    "a date without a year": {"retry-after": "Wed, 99 Foo 0000 99:99:99 GMT"},
}


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("status", [429, 503])
async def test_a_wait_in_any_form_is_obeyed(
    server: Server, connect: Connect, wire: Wire, wait: str, status: int
) -> None:
    server.play(Answer(wire.problem("busy"), status, headers=WAITS[wait]), wire.good("right"))
    with anyio.fail_after(10):
        assert (await connect(wire)("hi")).text == "right"
    assert len(server.requests) == 2


async def test_the_wait_is_at_least_what_the_server_said(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(Answer(b"", 429, headers={"retry-after-ms": "40"}), wire.good())
    await connect(wire)("hi")
    first, second = server.requests
    assert second.time - first.time >= 0.04


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("retry-after", "600"),
        ("retry-after", "date"),
        ("retry-after-ms", "600000"),
        ("retry-after", "9" * 400),
    ],
    ids=["seconds", "date", "milliseconds", "endless digits"],
)
async def test_a_wait_past_the_deadline_raises_at_once_with_the_figure(
    server: Server, connect: Connect, wire: Wire, header: str, value: str
) -> None:
    value = in_seconds(600) if value == "date" else value
    server.play(Answer(wire.problem("busy"), 429, headers={header: value}), wire.good())
    with anyio.fail_after(4):
        error = await failure(connect(wire, timeout=30))
    assert isinstance(error, ember.CallError)
    assert error.status == 429
    assert len(server.requests) == 1
    if "600" in value or "GMT" in value:
        assert re.search(r"\b(600|59\d)", str(error)), str(error)
        assert error.retry_after == pytest.approx(600, abs=5)


async def test_the_error_holds_the_wait_in_seconds(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(Answer(b"", 429, headers={"retry-after-ms": "1500"}))
    error = await failure(connect(wire, retries=0))
    assert isinstance(error, ember.CallError)
    assert error.retry_after == 1.5


# ── A 200 that is no answer ───


@pytest.mark.parametrize(
    ("kind", "code", "transient"),
    [
        ("overloaded_error", 529, True),
        ("rate_limit_error", "rate_limit_exceeded", True),
        ("api_error", 500, True),
        ("invalid_request_error", "invalid_value", False),
        ("authentication_error", 401, False),
        ("insufficient_quota", "insufficient_quota", False),
    ],
)
async def test_an_error_object_in_a_200_is_judged_by_its_code_or_type(
    server: Server, connect: Connect, wire: Wire, kind: str, code: object, transient: bool
) -> None:
    server.play(Answer(wire.problem(kind, "so it is", code)))
    error = await failure(connect(wire))
    assert isinstance(error, ember.CallError)
    assert error.transient is transient
    assert len(server.requests) == (3 if transient else 1)
    check(error, "so it is")


async def test_empty_choices_are_a_reply_error_and_not_tried_again(
    server: Server, connect: Connect
) -> None:
    wire = WIRES["openai"]
    server.play(Answer({**wire.answer("x"), "choices": []}))
    error = await failure(connect(wire))
    assert isinstance(error, ember.ReplyError)
    assert error.raw["choices"] == []
    assert len(server.requests) == 1


FINISHED: dict[tuple[str, str], tuple[Any, str, str]] = {
    ("openai", "null content"): ({"text": None}, "", "stop"),
    ("openai", "refusal"): ({"text": None, "refusal": "I will not"}, "", "stop"),
    ("openai", "filter"): ({"text": "par", "finish": "content_filter"}, "par", "content_filter"),
    ("openai", "filtered whole"): (
        {"text": None, "finish": "content_filter"},
        "",
        "content_filter",
    ),
    ("openai", "truncated"): ({"text": "par", "finish": "length"}, "par", "length"),
    ("anthropic", "null content"): ({"text": None}, "", "end_turn"),
    ("anthropic", "refusal"): ({"text": "no", "finish": "refusal"}, "no", "refusal"),
    ("anthropic", "truncated"): ({"text": "par", "finish": "max_tokens"}, "par", "max_tokens"),
    ("anthropic", "paused"): ({"text": "par", "finish": "pause_turn"}, "par", "pause_turn"),
}


@pytest.mark.parametrize(("name", "case"), FINISHED)
async def test_a_refusal_a_filter_or_a_truncation_is_a_reply_and_bought_once(
    server: Server, connect: Connect, name: str, case: str
) -> None:
    how, text, finish = FINISHED[name, case]
    server.play(Answer(WIRES[name].answer(**how)))
    reply = await connect(WIRES[name])("hi")
    assert (reply.text, reply.finish) == (text, finish)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("name", "case"), FINISHED)
async def test_with_output_it_is_a_reply_error_and_never_asked_again(
    server: Server, connect: Connect, name: str, case: str
) -> None:
    if case in ("null content", "paused"):
        pytest.skip("says nothing about a refusal")
    server.play(Answer(WIRES[name].answer(**FINISHED[name, case][0])))
    error = await failure(connect(WIRES[name]), output=int)
    assert isinstance(error, ember.ReplyError)
    assert len(server.requests) == 1


def mutants(value: Any, make: Callable[[Any], Any] = lambda value: value) -> Iterator[Any]:
    """The JSON value with each of its parts replaced by something of another kind."""
    for odd in (None, 7, "x", [], {}, [None], [7], {"x": 7}, True):
        yield make(odd)
    inner = enumerate(value) if isinstance(value, list) else ()
    for key, part in value.items() if isinstance(value, dict) else inner:

        def put(odd: Any, key: Any = key) -> Any:
            copy = value.copy()
            copy[key] = odd
            return make(copy)

        yield from mutants(part, put)


def add(x: int) -> int:
    """One more."""
    return x + 1


async def reply_or_error(call: Callable[..., Any], sent: Any, **options: Any) -> None:
    """The call ends in a reply whose fields are of their kinds, or in an error that speaks."""
    try:
        reply = await call(**options)
    except ember.EmberError as error:
        check(error)
        return
    except Exception as error:
        error.add_note(f"{options}: the answer was {sent}")
        raise
    texts = [reply.text, reply.model, *([] if reply.finish is None else [reply.finish])]
    texts += [text for call in reply.tool_calls for text in (call.id, call.name)]
    assert all(isinstance(text, str) for text in texts), sent
    assert isinstance(reply.usage.tokens_in + reply.usage.tokens_out, int), sent


@pytest.mark.parametrize("name", WIRES)
async def test_an_answer_with_any_part_of_the_wrong_kind_is_a_reply_or_a_typed_error(
    server: Server, connect: Connect, name: str
) -> None:
    wire, function = WIRES[name], {"name": "add", "arguments": '{"x": 1}'}
    calls = [{"id": "a", "type": "function", "function": function}]
    goods = [wire.answer("7")]
    if name == "openai":
        goods += [wire.answer(None, finish="tool_calls", tool_calls=calls)]
        goods += [wire.answer([{"type": "text", "text": "7"}], refusal="no")]
    else:
        use = {"type": "tool_use", "id": "a", "name": "add", "input": {"x": 1}}
        goods += [wire.answer("", finish="tool_use", content=[use])]
        goods += [wire.answer("", content=[{"type": "thinking", "thinking": "", "signature": ""}])]
    model = connect(wire, retries=0, price=(1, 2))
    cases = [mutant for good in goods for mutant in mutants(good)]
    for body in random.Random(7).sample(cases, 100):
        for options in ({}, {"tools": [add]}, {"output": int}):
            server.play(Answer(body), wire.good("7"))
            await reply_or_error(functools.partial(model, "hi"), body, **options)
            assert 1 <= len(server.requests) <= 8  # a tool that is called for ever has its steps


async def test_an_answer_of_any_depth_is_a_typed_error(server: Server, connect: Connect) -> None:
    model = connect(WIRES["openai"], retries=0)
    for depth in (50, 400, *range(850, 1000, 3), 5000):  # the parser's limit is near 1,000
        for start, end in (('{"choices": ', "}"), ('{"error": {"message": ', "}}")):
            server.play(Answer(start + "[" * depth + "]" * depth + end))
            assert isinstance(await failure(model), ember.CallError | ember.ReplyError)
            assert len(server.requests) == 1


@pytest.mark.parametrize(
    "count", [10**400, -7, 1.5, 1e308, True, "7", None], ids=lambda count: str(count)[:9]
)
async def test_odd_counts_do_not_cost_a_paid_answer(
    server: Server, connect: Connect, wire: Wire, count: Any
) -> None:
    names = ("prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens")
    server.play(Answer({**wire.answer("right"), "usage": dict.fromkeys(names, count)}))
    reply = await connect(wire, price=(1, 2.5))("hi")
    assert reply.text == "right"
    assert len(server.requests) == 1


# ── Sizes ───


def peak_of(body: bytes) -> int:
    """What a bomb may cost at most: four times the limit of a body."""
    return 4 * 64_000_000 + 4 * len(body)


async def test_a_body_of_50_mb_is_read(server: Server, connect: Connect) -> None:
    wire = WIRES["openai"]
    text = "right " * (50_000_000 // 6)
    server.play(wire.good(text))
    assert (await connect(wire)("hi")).text == text
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("framing", "status"), [("length", 200), ("chunked", 200), ("close", 200), ("close", 500)]
)
async def test_a_body_over_the_limit_is_refused_in_bounded_memory(
    server: Server, connect: Connect, framing: str, status: int
) -> None:
    block = b'{"choices": "' + b"x" * 1_000_000
    server.play(Answer([block] * 300, status, framing=framing))
    tracemalloc.start()
    try:
        error = await failure(connect(WIRES["openai"], retries=0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(error, ember.ReplyError | ember.CallError)
    assert len(server.requests) == 1
    assert peak < peak_of(block)


def bomb(megabytes: int) -> bytes:
    """A gzip stream that unpacks to so many megabytes; its checksum is wrong, at the very end."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(b" " * 1_000_000) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + block * megabytes + b"\x03\x00" + b"\0" * 8


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize(
    "layers",
    ["gzip", "x-gzip", "deflate", "gzip, gzip"],
    ids=lambda layers: layers.replace(", ", "+"),
)
async def test_a_compressed_bomb_is_refused_in_bounded_memory(
    server: Server, connect: Connect, layers: str, status: int
) -> None:
    body = bomb(1000)
    body = body[10:] if layers == "deflate" else gzip.compress(body) if "," in layers else body
    server.play(Answer(body, status, headers={"content-encoding": layers}))
    tracemalloc.start()
    try:
        error = await failure(connect(WIRES["openai"], retries=0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(error, ember.ReplyError | ember.CallError)
    assert peak < peak_of(body)


async def test_a_stream_bomb_is_refused_in_bounded_memory(
    server: Server, connect: Connect, wire: Wire
) -> None:
    line = b"data: " + b"x" * 1_000_000
    server.play(Answer([line] * 300, type="text/event-stream", framing="chunked"))
    tracemalloc.start()
    try:
        with anyio.fail_after(15), pytest.raises(ember.EmberError):
            async with connect(wire, retries=0).stream("hi") as stream:
                assert [piece async for piece in stream] == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < peak_of(line)


# ── Everything at once ───


async def test_two_hundred_calls_among_random_faults_are_right_or_typed_and_leave_nothing(
    wire: Wire,
) -> None:
    dice = random.Random(7)
    faults = [make(wire) for make in TRANSIENT.values()] + [
        Answer(wire.problem("invalid_request_error"), 400),
        wire.good(fault="hang"),
        wire.good(fault="hang", at=0.5),
        Answer(b"", 307, headers={"location": "/x"}),
        Answer(b"", 429, headers={"retry-after-ms": "2"}),
    ]

    def script(seen: Any) -> Answer:
        if dice.random() < 0.4:
            return dice.choice(faults)
        framing = dice.choice(["length", "chunked", "close"])
        then = dice.choice(["keep", "keep", "close", "reset"])
        text = seen.json["messages"][-1]["content"]
        return wire.good(f"right {text}", framing=framing, then=then, zipped=dice.random() < 0.5)

    with serving(script) as server:
        model = ember.model(
            f"{wire.provider}:{wire.id}",
            base_url=server.url + wire.base,
            api_key="sk-no-secret",
            timeout=1,
        )
        before = asyncio.all_tasks()
        with anyio.fail_after(15):
            outcomes = await asyncio.gather(
                *(model(str(number)) for number in range(200)), return_exceptions=True
            )
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, ember.EmberError):
                check(outcome)
            else:
                assert isinstance(outcome, ember.Reply), outcome
                assert outcome.text == f"right {number}"
        assert sum(isinstance(outcome, ember.Reply) for outcome in outcomes) > 100
        assert bought_once(server)
        assert max(by_body(server).values()) <= 3
        assert asyncio.all_tasks() == before
        server.play(wire.good())
        opened = server.opened
        await until(lambda: server.open <= 200)
        for _ in range(5):
            await model("again")
        assert server.opened <= opened + 1


def by_body(server: Server) -> dict[bytes, int]:
    """How many requests each call made."""
    counts: dict[bytes, int] = {}
    for seen in server.requests:
        counts[seen.body] = counts.get(seen.body, 0) + 1
    return counts
