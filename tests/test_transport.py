"""Connections: loops, reuse, limits, proxies, certificates, other transports."""

import asyncio
import dataclasses
import gc
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
import respx
import trio
import trustme
from conftest import Connect
from server import (
    WIRES,
    Answer,
    Seen,
    Server,
    Wire,
    openai_answer,
    openai_events,
    proxying,
    serving,
    sse,
    until,
)

import ember

OPENAI = WIRES["openai"]
pytestmark = pytest.mark.usefixtures("transport")


def row(**changes: Any) -> ember.Provider:
    """OpenAI's row with changes."""
    return dataclasses.replace(ember.providers["openai"], **changes)


async def work(model: ember.Model, server: Server) -> None:
    """A call, a stream and a tool, one after the other."""
    server.play(OPENAI.good("right"))
    assert (await model("hi")).text == "right"
    server.play(OPENAI.stream("one", "two"))
    async with model.stream("hi") as stream:
        assert [piece async for piece in stream] == ["one", "two"]
    function = {"name": "double", "arguments": '{"x": 21}'}
    calls = [{"id": f"c{n}", "type": "function", "function": function} for n in range(3)]
    asked = Answer(openai_answer(None, finish="tool_calls", tool_calls=calls))
    server.play(asked, OPENAI.good("42"))

    async def double(x: int) -> int:
        """Twice x."""
        await anyio.lowlevel.checkpoint()
        return 2 * x

    assert (await model("hi", tools=[double])).text == "42"
    sent = server.requests[1].json["messages"]
    assert [message["content"] for message in sent if message["role"] == "tool"] == ["42"] * 3


Run = Callable[[Callable[..., Awaitable[None]], Any, Any], None]


def run_asyncio(fn: Callable[..., Any], *args: Any) -> None:
    """Like trio.run."""
    asyncio.run(fn(*args))


# ── Event loops ───


@pytest.mark.parametrize("run", [run_asyncio, trio.run], ids=["asyncio", "trio"])
def test_one_model_works_in_one_loop_after_the_other_and_leaves_no_connection(
    server: Server, connect: Connect, run: Run
) -> None:
    model = connect(OPENAI)
    for _ in range(3):
        run(work, model, server)
    gc.collect()
    anyio.run(until, lambda: server.open == 0)
    assert server.opened == 3


def test_one_model_works_on_both_event_loops_in_turn(server: Server, connect: Connect) -> None:
    model = connect(OPENAI)
    for number, run in enumerate((run_asyncio, trio.run, run_asyncio, trio.run), 1):
        run(work, model, server)
        assert server.opened >= number  # a loop does not use another one's connections
    gc.collect()


def test_one_model_works_in_many_threads_with_their_own_loops(
    server: Server, connect: Connect
) -> None:
    server.play(lambda seen: OPENAI.good(seen.json["messages"][-1]["content"]))
    model, wrong = connect(OPENAI), list[object]()

    async def calls(name: int) -> None:
        texts = [f"{name}.{number}" for number in range(10)]
        replies = await asyncio.gather(*(model(text) for text in texts))
        wrong.extend(set(texts) ^ {reply.text for reply in replies})

    def thread(name: int) -> None:
        try:
            for _ in range(2):
                asyncio.run(calls(name))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=thread, args=(name,)) for name in range(10)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    gc.collect()
    anyio.run(until, lambda: server.open == 0)
    assert wrong == []


@pytest.mark.filterwarnings("ignore:Async generator 'httpcore:ResourceWarning")  # in trio
@pytest.mark.parametrize("run", [run_asyncio, trio.run], ids=["asyncio", "trio"])
def test_a_loop_that_ends_during_a_stream_leaves_nothing(
    server: Server, connect: Connect, caplog: pytest.LogCaptureFixture, run: Run
) -> None:
    server.play(OPENAI.stream("one", "two", fault="hang", at=0.8))

    async def leave(model: ember.Model, _: object) -> None:
        async with model.stream("hi") as stream:
            assert await anext(stream) == "one"

    run(leave, connect(OPENAI), None)
    gc.collect()
    anyio.run(until, lambda: server.open == 0)
    assert caplog.records == []


def test_many_loops_leave_no_memory_of_themselves(server: Server, connect: Connect) -> None:
    server.play(OPENAI.good())
    model = connect(OPENAI)

    async def call() -> None:
        await model("hi")

    asyncio.run(call())
    gc.collect()
    before = sum(isinstance(thing, asyncio.AbstractEventLoop) for thing in gc.get_objects())
    for _ in range(5):
        asyncio.run(call())
    gc.collect()
    after = sum(isinstance(thing, asyncio.AbstractEventLoop) for thing in gc.get_objects())
    assert after <= before + 1


@pytest.mark.parametrize("run", [run_asyncio, trio.run], ids=["asyncio", "trio"])
def test_a_cancelled_call_closes_its_connection_and_asks_no_more(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(OPENAI.good(fault="hang"))

    async def cancel(model: ember.Model, _: object) -> None:
        with anyio.move_on_after(0.05) as scope:
            await model("hi")
        assert scope.cancelled_caught
        await until(lambda: server.open == 0)

    run(cancel, connect(OPENAI), None)
    assert len(server.requests) == 1


@pytest.mark.parametrize("limit", [anyio.fail_after, asyncio.timeout])
async def test_a_timeout_of_the_caller_stays_a_timeout_error(
    server: Server, connect: Connect, wire: Wire, limit: Callable[[float], Any]
) -> None:
    server.play(wire.good(fault="hang"))
    with pytest.raises(TimeoutError) as caught:
        if limit is asyncio.timeout:
            async with limit(0.05):
                await connect(wire)("hi")
        else:
            with limit(0.05):
                await connect(wire)("hi")
    assert not isinstance(caught.value, ember.EmberError)
    await until(lambda: server.open == 0)


async def test_a_cancelled_call_raises_cancelled_and_leaves_no_task(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good(fault="hang", at=0.5))
    before = asyncio.all_tasks()
    tasks = [asyncio.create_task(connect(wire)("hi")) for _ in range(5)]
    await until(lambda: len(server.requests) == 5)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 5
    assert asyncio.all_tasks() == before
    await until(lambda: server.open == 0)


# ── Reuse ───


async def test_calls_one_after_the_other_share_a_connection(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(
        wire.good(),
        Answer(wire.problem("busy"), 429, headers={"retry-after-ms": "1"}),
        wire.good(zipped=True, framing="chunked"),
        Answer(b"", 404),
    )
    model = connect(wire)
    for _ in range(2):
        await model("hi")
    for _ in range(2):
        with pytest.raises(ember.CallError):
            await model("hi")
    assert {seen.connection for seen in server.requests} == {1}


async def test_the_connection_used_last_is_used_first(server: Server, connect: Connect) -> None:
    gates = {str(number): threading.Event() for number in range(4)}
    server.play(lambda seen: OPENAI.good(hold=gates[seen.json["messages"][-1]["content"]]))
    model = connect(OPENAI)
    tasks = {name: asyncio.create_task(model(name)) for name in gates}
    await until(lambda: len(server.requests) == 4)
    for name in ("2", "0", "3", "1"):
        gates[name].set()
        await tasks[name]
    used = {seen.json["messages"][-1]["content"]: seen.connection for seen in server.requests}
    server.play(OPENAI.good())
    for _ in range(3):
        await model("again")
    assert [seen.connection for seen in server.requests] == [used["1"]] * 3


@pytest.mark.parametrize(
    "idle",
    [
        {"then": "close"},
        {"then": "reset"},
        {"tail": b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n"},
        {"tail": b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n\r\n", "then": "close"},
        {"tail": b"junk"},
        {"headers": {"connection": "close"}},
    ],
    ids=["closed", "reset", "408", "408 and closed", "junk", "announced"],
)
@pytest.mark.parametrize("retries", [0, 2])
async def test_a_connection_that_ended_while_idle_is_noticed(
    server: Server, connect: Connect, wire: Wire, idle: dict[str, Any], retries: int
) -> None:
    server.play(wire.good("first", **idle), wire.good("second"))
    model = connect(wire, retries=retries)
    assert (await model("hi")).text == "first"
    await anyio.sleep(0.02)
    assert (await model("hi")).text == "second"
    assert len(server.requests) == 2
    assert server.opened == 2


async def test_fifty_connections_that_ended_while_idle_cost_no_attempt(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good(then="close"))
    model = connect(wire, retries=0)
    await asyncio.gather(*(model("hi") for _ in range(50)))
    await until(lambda: server.open == 0)
    await anyio.sleep(0.01)
    server.play(wire.good("right"))
    replies = await asyncio.gather(*(model("hi") for _ in range(50)))
    assert {reply.text for reply in replies} == {"right"}
    assert len(server.requests) == 50


@pytest.mark.parametrize("fault", ["close", "reset"])
async def test_a_reused_connection_that_dies_under_the_request_is_one_attempt_more(
    server: Server, connect: Connect, wire: Wire, fault: str, no_backoff: None
) -> None:
    server.play(wire.good("first"), wire.good(fault=fault), wire.good("second"))
    model = connect(wire)
    await model("hi")
    assert (await model("hi")).text == "second"
    assert len(server.requests) == 3


async def test_there_are_no_more_connections_than_calls_in_flight(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    model = connect(wire)
    for _ in range(6):
        await asyncio.gather(*(model("hi") for _ in range(4)))
    assert server.opened <= 4
    assert len({seen.connection for seen in server.requests}) <= 4


async def test_models_with_different_keys_share_connections_but_not_keys(
    server: Server, connect: Connect
) -> None:
    server.play(OPENAI.good())
    for key in ("one", "two"):
        await connect(OPENAI, api_key=key)("hi")
    assert [seen.headers["authorization"] for seen in server.requests] == [
        "Bearer one",
        "Bearer two",
    ]


# ── Limits ───


async def test_at_most_so_many_connections_are_open_and_the_rest_wait(
    server: Server, connect: Connect
) -> None:
    gate, encoded = threading.Event(), list[object]()
    encode = ember.providers["openai"].encode

    def counted(request: ember.Request) -> Any:
        encoded.append(request)
        return encode(request)

    server.play(OPENAI.good(hold=gate))
    model = connect(OPENAI, provider=row(connections=3, encode=counted))
    tasks = [asyncio.create_task(model("hi")) for _ in range(12)]
    await until(lambda: len(server.requests) == 3)
    await anyio.sleep(0.02)
    assert (len(server.requests), server.open) == (3, 3)
    assert len(encoded) <= 3
    gate.set()
    assert [reply.text for reply in await asyncio.gather(*tasks)] == ["right"] * 12
    assert (server.peak, len(server.requests)) == (3, 12)


async def test_streams_count_among_the_connections(server: Server, connect: Connect) -> None:
    server.play(OPENAI.stream("one", "two", fault="hang", at=0.8), OPENAI.good("next"))
    model = connect(OPENAI, provider=row(connections=1))
    async with model.stream("hi") as stream:
        assert await anext(stream) == "one"
        waiting = asyncio.create_task(model("hi"))
        await anyio.sleep(0.02)
        assert len(server.requests) == 1
    assert (await waiting).text == "next"
    assert server.peak == 1


async def test_the_deadline_covers_the_wait_for_a_connection(
    server: Server, connect: Connect
) -> None:
    gate = threading.Event()
    server.play(OPENAI.good(hold=gate))
    model = connect(OPENAI, provider=row(connections=1))
    first = asyncio.create_task(model("hi"))
    await until(lambda: len(server.requests) == 1)
    with anyio.fail_after(5), pytest.raises(ember.CallError, match=r"openai.*0\.05"):
        await model("hi", timeout=0.05)
    gate.set()
    await first
    assert len(server.requests) == 1


@pytest.mark.parametrize("end", ["error", "cancel", "timeout", "left stream"])
async def test_a_slot_is_given_back_however_the_call_ends(
    server: Server, connect: Connect, end: str
) -> None:
    model = connect(OPENAI, provider=row(connections=1), retries=0)
    for _ in range(3):
        server.play(
            Answer(b"", 404) if end == "error" else OPENAI.stream("x", fault="hang", at=0.7)
        )
        if end == "left stream":
            async with model.stream("hi") as stream:
                await anext(stream)
        elif end == "cancel":
            with anyio.move_on_after(0.02):
                await model("hi")
        else:
            with pytest.raises(ember.CallError):
                await model("hi", timeout=0.02 if end == "timeout" else 5)
    server.play(OPENAI.good("right"))
    with anyio.fail_after(5):
        assert (await model("hi")).text == "right"


async def test_a_waiter_that_is_cancelled_does_not_take_the_slot_along(
    server: Server, connect: Connect
) -> None:
    gate = threading.Event()
    server.play(OPENAI.good(hold=gate))
    model = connect(OPENAI, provider=row(connections=1))
    first, second, third = (asyncio.create_task(model(str(number))) for number in range(3))
    await until(lambda: len(server.requests) == 1)
    await anyio.sleep(0.01)
    gate.set()
    await first
    second.cancel()
    with anyio.fail_after(5):
        assert (await third).text == "right"


async def test_no_slot_is_held_while_a_call_waits_to_retry(
    server: Server, connect: Connect
) -> None:
    busy = Answer(b"", 429, headers={"retry-after": "30"})
    server.play(busy, OPENAI.good("right"))
    model = connect(OPENAI, provider=row(connections=1), timeout=60)
    waiting = asyncio.create_task(model("hi"))
    await until(lambda: len(server.requests) == 1)
    with anyio.fail_after(5):
        assert (await model("hi")).text == "right"
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_thousand_calls_at_once_work(server: Server, connect: Connect) -> None:
    server.play(lambda seen: OPENAI.good(seen.json["messages"][-1]["content"]))
    model = connect(OPENAI, timeout=60)
    replies = await asyncio.gather(*(model(str(number)) for number in range(1000)))
    assert [reply.text for reply in replies] == [str(number) for number in range(1000)]
    assert len(server.requests) == 1000
    assert server.peak <= 1000


# ── Proxies and certificates ───


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority of our own."""
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    """The server's side of a connection to provider.test or loopback."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("provider.test", "localhost", "127.0.0.1").configure_cert(context)
    return context


async def test_http_proxy_is_asked_for_plain_addresses(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.play(OPENAI.good("right"))
    with proxying() as (proxy, asked):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        host = f"http://provider.test:{server.port}"
        model = connect(OPENAI, base_url=f"{host}/v1")
        for _ in range(2):
            assert (await model("hi")).text == "right"
    assert asked == [f"POST {host}/v1/chat/completions"]
    assert server.requests[0].headers["host"] == f"provider.test:{server.port}"


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
async def test_https_proxy_tunnels_and_the_certificate_is_checked_by_ssl_cert_file(
    authority: trustme.CA,
    tls: ssl.SSLContext,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str,
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with serving(OPENAI.good("right"), tls=tls) as server, proxying() as (proxy, asked):
        monkeypatch.setenv(variable, proxy)
        model = connect(OPENAI, base_url=f"https://provider.test:{server.port}/v1")
        for _ in range(2):
            assert (await model("hi")).text == "right"
        async with connect(OPENAI, base_url=model.base_url).stream("hi") as stream:
            assert [piece async for piece in stream] == ["right"]
    assert asked == [f"CONNECT provider.test:{server.port}"]
    assert "proxy-authorization" not in server.requests[0].headers


async def test_no_proxy_goes_straight(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.play(OPENAI.good("right"))
    with proxying() as (proxy, asked):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("NO_PROXY", "example.test,127.0.0.1")
        assert (await connect(OPENAI)("hi")).text == "right"
    assert asked == []


async def test_a_proxy_that_refuses_is_a_typed_error(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tls: ssl.SSLContext
) -> None:
    refusal = Answer(b"no", 403, framing="close")
    with serving(refusal) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        model = connect(OPENAI, base_url="https://provider.test/v1", retries=0)
        with pytest.raises(ember.CallError, match="openai"):
            await model("hi")
    assert "authorization" not in proxy.requests[0].headers


async def test_a_custom_authority_is_trusted_by_ssl_cert_file(
    authority: trustme.CA,
    tls: ssl.SSLContext,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with serving(OPENAI.good("right"), tls=tls) as server:
        model = connect(OPENAI, base_url=f"{server.url}/v1")
        assert (await model("hi")).text == "right"
        for fault in ("reset", "close"):
            server.play(OPENAI.good(fault=fault, at=0.5), OPENAI.good("right"))
            assert (await model("hi")).text == "right"


async def test_a_scheme_in_capitals_is_the_same_scheme(
    tls: ssl.SSLContext, connect: Connect, server: Server
) -> None:
    server.play(OPENAI.good("plain"))
    assert (await connect(OPENAI, base_url=f"{server.url.upper()}/v1")("hi")).text == "plain"
    with serving(OPENAI.good("right"), tls=tls) as safe:
        model = connect(OPENAI, base_url=f"{safe.url.replace('https', 'HTTPS')}/v1", retries=0)
        with pytest.raises(ember.CallError, match=r"(?i)certificate"):  # it speaks TLS
            await model("hi")
    assert safe.requests == []


async def test_a_connection_may_take_any_time(server: Server, connect: Connect) -> None:
    server.play(OPENAI.good("right"))
    assert (await connect(OPENAI, connect=None)("hi")).text == "right"


async def test_an_unknown_certificate_is_a_typed_error_and_nothing_is_sent(
    tls: ssl.SSLContext, connect: Connect
) -> None:
    with serving(OPENAI.good("right"), tls=tls) as server:
        model = connect(OPENAI, base_url=f"{server.url}/v1", retries=0)
        with pytest.raises(ember.CallError, match=r"(?i)openai.*certificate"):
            await model("hi")
        assert server.requests == []


async def test_a_certificate_for_another_host_is_a_typed_error(
    authority: trustme.CA, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("other.test").configure_cert(context)
    with serving(OPENAI.good("right"), tls=context) as server:
        model = connect(OPENAI, base_url=f"{server.url}/v1", retries=0)
        with pytest.raises(ember.CallError, match=r"(?i)openai.*certificate"):
            await model("hi")


async def test_a_certificate_file_that_is_missing_is_a_typed_error(
    tls: ssl.SSLContext, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with serving(OPENAI.good("right"), tls=tls) as server, pytest.raises(ember.EmberError):
        await connect(OPENAI, base_url=f"{server.url}/v1", retries=0)("hi")


# ── Other transports ───


def mock(seen: list[httpx.Request], body: Any) -> httpx.MockTransport:
    """A transport that keeps the requests and answers them all alike."""

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if isinstance(body, bytes):
            return httpx.Response(200, content=body, headers={"content-type": "text/event-stream"})
        return httpx.Response(200, json=body)

    return httpx.MockTransport(answer)


async def test_a_transport_of_httpx_may_be_passed_in() -> None:
    seen: list[httpx.Request] = []
    model = ember.model("openai:gpt-4o", api_key="k", transport=mock(seen, openai_answer("right")))
    assert (await model("hi")).text == "right"
    assert str(seen[0].url) == "https://api.openai.com/v1/chat/completions"
    assert seen[0].headers["authorization"] == "Bearer k"
    assert json.loads(seen[0].content)["model"] == "gpt-4o"


async def test_a_stream_goes_through_a_transport_of_httpx() -> None:
    transport = mock([], sse(openai_events("one", "two")))
    model = ember.model("openai:gpt-4o", api_key="k", transport=transport)
    async with model.stream("hi") as stream:
        assert [piece async for piece in stream] == ["one", "two"]


@pytest.mark.parametrize(
    "fault", [httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.ConnectTimeout]
)
async def test_errors_of_a_transport_are_typed_and_retried(
    fault: type[httpx.TransportError], no_backoff: None
) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if len(seen) < 3:
            raise fault("no luck", request=request)
        return httpx.Response(200, json=openai_answer("right"))

    transport = httpx.MockTransport(answer)
    model = ember.model("openai:gpt-4o", api_key="k", transport=transport)
    assert (await model("hi")).text == "right"
    seen.clear()
    with pytest.raises(ember.CallError, match="openai"):
        await model.using(retries=1)("hi")
    assert len(seen) == 2


async def test_a_real_transport_of_httpx_works(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good("right", zipped=True, framing="chunked"))
    async with httpx.AsyncHTTPTransport() as transport:
        model = connect(wire, transport=transport)
        for _ in range(3):
            assert (await model("hi")).text == "right"
        server.play(wire.stream("one", "two"))
        async with model.stream("hi") as stream:
            assert [piece async for piece in stream] == ["one", "two"]
    assert server.opened == 1


@respx.mock
async def test_respx_with_its_defaults_takes_the_calls(wire: Wire) -> None:
    url = {
        "openai": "https://api.openai.com/v1/chat/completions",
        "anthropic": "https://api.anthropic.com/v1/messages",
    }[wire.provider]
    route = respx.post(url).mock(return_value=httpx.Response(200, json=wire.answer("right")))
    model = ember.model(f"{wire.provider}:{wire.id}", api_key="k")
    replies = await asyncio.gather(*(model("hi") for _ in range(3)))
    assert [reply.text for reply in replies] == ["right"] * 3
    assert route.call_count == 3
    assert json.loads(route.calls.last.request.content)["messages"][-1]["role"] == "user"


@respx.mock
async def test_respx_with_its_defaults_takes_streams_and_faults(
    wire: Wire, no_backoff: None
) -> None:
    stream = httpx.Response(
        200, content=sse(wire.events("one", "two")), headers={"content-type": "text/event-stream"}
    )
    faults = [httpx.ConnectError("refused"), httpx.Response(503), stream]
    route = respx.post(host__regex=r"api\..*").mock(side_effect=faults)
    async with ember.model(f"{wire.provider}:{wire.id}", api_key="k").stream("hi") as pieces:
        assert [piece async for piece in pieces] == ["one", "two"]
    assert route.call_count == 3


def test_a_mocked_call_leaves_nothing_for_the_next_loop(server: Server, connect: Connect) -> None:
    async def mocked() -> None:
        with respx.mock:
            respx.post(f"{server.url}/v1/chat/completions").mock(
                return_value=httpx.Response(200, json=openai_answer("mocked"))
            )
            assert (await model("hi")).text == "mocked"
        assert (await model("hi")).text == "right"

    server.play(OPENAI.good("right"))
    model = connect(OPENAI)
    for _ in range(2):
        asyncio.run(mocked())
    gc.collect()


# ── Deadlines ───


async def test_the_deadline_of_a_call_may_be_given_with_it(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good(fault="hang"))
    started = time.monotonic()
    with anyio.fail_after(10), pytest.raises(ember.CallError):
        await connect(wire, timeout=600)("hi", timeout=0.05)
    assert time.monotonic() - started >= 0.05


async def test_a_request_goes_out_as_it_should(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    await connect(wire)('{x} "ü" %s \u2028')
    seen: Seen = server.requests[0]
    assert seen.method == "POST"
    assert (
        seen.path == {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}[wire.provider]
    )
    assert seen.headers["content-type"].startswith("application/json")
    assert seen.headers["host"] == f"127.0.0.1:{server.port}"
    assert int(seen.headers["content-length"]) == len(seen.body)
    assert seen.json["messages"][-1]["content"] == '{x} "ü" %s \u2028'


async def test_a_surplus_answer_is_not_the_next_call_s(server: Server, connect: Connect) -> None:
    def whole(text: str) -> bytes:
        body = json.dumps(openai_answer(text)).encode()
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    server.play(Answer(head=whole("first") + whole("surplus")), OPENAI.good("second"))
    model = connect(OPENAI)
    assert [(await model("hi")).text for _ in range(2)] == ["first", "second"]


@pytest.mark.parametrize("proxy", ["ftp://127.0.0.1:1", "127.0.0.1:1", "http://127.0.0.1:1"])
async def test_a_proxy_that_does_not_work_is_never_gone_round(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    server.play(OPENAI.good())
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", "")
    model = connect(OPENAI, retries=0)
    for _ in range(3):
        with pytest.raises(ember.CallError):
            await model("hi")
    assert server.requests == []


async def test_garbage_behind_an_answer_does_not_hide_its_error(
    server: Server, connect: Connect
) -> None:
    begun = b'data: {"choices": [{"delta": {"content": "one"}}]}\n\n'
    error = b'data: {"error": {"type": "rate_limit_error", "message": "slow down"}}\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (begun, error))
    server.play(Answer(head=head + chunks + b"no chunk\r\n\r\n"))
    with pytest.raises(ember.CallError, match="429: slow down") as caught:
        async with connect(OPENAI).stream("hi") as stream:
            async for _ in stream:
                pass
    assert caught.value.partial == "one"


async def test_connections_left_by_a_burst_are_closed_bit_by_bit(
    server: Server, connect: Connect, transport: str
) -> None:
    model = connect(OPENAI)
    server.play(OPENAI.good(then="close"))
    await asyncio.gather(*(model("hi") for _ in range(20)))
    server.play(OPENAI.good())
    for _ in range(20):
        await model("hi")
    pool, _ = ember._pools[asyncio.get_running_loop()]
    lists = pool.fast.idle if transport == "fast" else pool.idle
    assert [len(idle) for idle in lists.values()] == [1]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_loops_that_only_are_closed_are_not_held_for_ever(server: Server, connect: Connect) -> None:
    server.play(OPENAI.good())
    model = connect(OPENAI)
    for _ in range(5):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(model("hi"))
        loop.close()
    asyncio.run(model("hi"))
    gc.collect()
    assert [old for old in ember._pools if old.is_closed()] == []
    anyio.run(until, lambda: server.open == 0)


def test_trio_closes_every_idle_connection_at_the_end_of_a_run(
    server: Server, connect: Connect
) -> None:
    server.play(OPENAI.good())
    model = connect(OPENAI)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(model, "hi")

    gc.collect()
    gc.disable()  # it would close what was left open
    try:
        trio.run(main)
        anyio.run(until, lambda: server.open == 0)
        assert (server.opened, server.open) == (5, 0)
    finally:
        gc.enable()


async def test_an_own_limit_hears_how_each_request_ended(server: Server, connect: Connect) -> None:
    heard = list[type[BaseException] | None]()

    class Breaker:
        async def __aenter__(self) -> None: ...

        async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
            heard.append(kind)

    model = connect(OPENAI, limit=Breaker(), retries=0)
    server.play(OPENAI.good(), Answer(OPENAI.problem("x"), 400), OPENAI.good(fault="hang"))
    try:
        raise LookupError
    except LookupError:
        await model("hi")  # what goes on around it is not its own
    with pytest.raises(ember.CallError):
        await model("hi")
    call = asyncio.create_task(model("hi"))
    await until(lambda: len(server.requests) == 3)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert heard == [None, ember.CallError, asyncio.CancelledError]


def test_a_stream_that_is_held_at_the_end_of_its_loop_leaves_no_socket(
    server: Server, connect: Connect, transport: str
) -> None:
    async def main() -> None:
        held.append(await connect(OPENAI).stream("hi").__aenter__())
        assert await anext(held[-1]) == "one"
        await anyio.sleep(0.005)  # all of it has come

    server.play(OPENAI.stream("one", "two"))
    held = list[Any]()
    for _ in range(8):
        asyncio.run(main())
    held.clear()
    gc.collect()
    anyio.run(until, lambda: server.open == 0)
