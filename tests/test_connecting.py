"""The fast transport: when it is taken, what it sends, how it gets a connection to a name."""

import asyncio
import contextlib
import errno
import functools
import json
import socket
import sys
import types
import unittest.mock
import weakref
from collections.abc import Iterator
from typing import Any

import httpcore
import httpx
import pytest
import respx
import trio
from conftest import Connect
from server import WIRES, Answer, Seen, Server, openai_answer, proxying, until

import ember
from ember_accel.connecting import connected, head, place_of

OPENAI = WIRES["openai"]


# ── Which transport a call takes ───


@pytest.fixture
def fast_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The address of each call that the fast transport makes."""
    pytest.importorskip("httptools")
    pool, urls = ember._fast().Pool, list[str]()
    send = pool.send

    async def noting(self: Any, url: str, *rest: Any, **more: Any) -> Any:
        urls.append(url)
        return await send(self, url, *rest, **more)

    monkeypatch.setattr(pool, "send", noting)
    return urls


def right(seen: Seen) -> Answer:
    """An answer to a call, and to a stream."""
    return OPENAI.stream("right") if seen.json.get("stream") else OPENAI.good("right")


async def said(model: ember.Model) -> list[str]:
    """What a call and a stream say."""
    async with model.stream("hi") as stream:
        return [(await model("hi")).text, *[piece async for piece in stream]]


async def test_calls_on_asyncio_take_the_fast_transport(
    server: Server, connect: Connect, fast_calls: list[str]
) -> None:
    server.play(right)
    assert await said(connect(OPENAI)) == ["right", "right"]
    assert fast_calls == [f"{server.url}/v1/chat/completions"] * 2


@pytest.mark.parametrize("why", ["trio", "a proxy", "transport=", "no httptools"])
def test_calls_that_the_fast_transport_cannot_make_take_the_other(
    server: Server,
    connect: Connect,
    fast_calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    async def main() -> list[str]:
        async with httpx.AsyncHTTPTransport() as own:
            return await said(connect(OPENAI, transport=own if why == "transport=" else None))

    server.play(right)
    with contextlib.ExitStack() as stack:
        if why == "a proxy":
            monkeypatch.setenv("HTTP_PROXY", stack.enter_context(proxying())[0])
        elif why == "no httptools":
            monkeypatch.setitem(sys.modules, "httptools", None)
            monkeypatch.delitem(sys.modules, "ember_accel.transport")
            monkeypatch.setattr(ember, "_fast", functools.cache(ember._fast.__wrapped__))
        assert (trio.run(main) if why == "trio" else asyncio.run(main())) == ["right", "right"]
    assert (len(server.requests), fast_calls) == (2, [])


@contextlib.contextmanager
def instead(how: str, seen: list[Any]) -> Iterator[None]:
    """Something answers in place of the network, and keeps what it saw."""

    async def of_httpcore(_: Any, request: Any) -> Any:
        seen.append(request)
        return httpcore.Response(200, content=json.dumps(openai_answer("instead")).encode())

    async def of_httpx(_: Any, request: Any) -> Any:
        seen.append(request)
        return httpx.Response(200, json=openai_answer("instead"))

    pool, name, patch = httpcore.AsyncConnectionPool, "handle_async_request", unittest.mock.patch
    wrapper = functools.wraps(pool.handle_async_request)(of_httpcore)
    mine = type("Mine", (pool,), {name: of_httpcore})
    ways: dict[str, Any] = {
        "httpcore's method": lambda: patch.object(pool, name, of_httpcore),
        "a wrapper of it": lambda: patch.object(pool, name, wrapper),
        "a mock of it": lambda: patch.object(pool, name, autospec=True, side_effect=of_httpcore),
        "httpcore's class": lambda: patch.object(httpcore, "AsyncConnectionPool", mine),
        "httpx's method": lambda: patch.object(httpx.AsyncHTTPTransport, name, of_httpx),
        "respx": respx.mock,
    }
    with ways[how]() as active:
        if how == "respx":
            answer = httpx.Response(200, json=openai_answer("instead"))
            active.route().mock(side_effect=lambda request: seen.append(request) or answer)
        yield


INSTEAD = [
    "httpcore's method", "a wrapper of it", "a mock of it", "httpcore's class", "httpx's method",
    "respx",
]  # fmt: skip


@pytest.mark.parametrize("how", INSTEAD)
async def test_what_answers_in_place_of_the_network_is_asked_as_long_as_it_is_there(
    server: Server, connect: Connect, transport: str, how: str
) -> None:
    server.play(right)
    model, seen, texts = connect(OPENAI), list[Any](), list[str]()
    texts.append((await model("hi")).text)
    with instead(how, seen):
        texts.append((await model("hi")).text)
        assert (len(server.requests), len(seen)) == (1, 1)
    texts += await said(model)
    assert texts == ["right", "instead", "right", "right"]
    assert (len(server.requests), len(seen)) == (3, 1)
    assert server.requests[1].connection == 1  # the one of before, by the transport of before


async def test_a_call_does_not_mind_that_another_thread_imports_httpcore(
    server: Server, connect: Connect, fast_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.play(right)
    monkeypatch.setitem(sys.modules, "httpcore", types.ModuleType("httpcore"))
    assert (await connect(OPENAI, retries=0)("hi")).text == "right"
    assert len(fast_calls) == 1


class Loop:
    """A closed loop of another thread, which is busy with the pools as well."""

    def __init__(self, come: list[Any], *, goes: bool) -> None:
        self.come, self.goes = come, goes

    def is_closed(self) -> bool:
        """Say so, while pools come and go."""
        self.come.append(Loop([], goes=False))
        ember._pools[self.come[-1]] = None, None
        if self.goes:
            ember._pools.pop(self, None)
        return True


@pytest.mark.parametrize("goes", [False, True])
def test_pools_of_other_threads_may_come_and_go_while_a_loop_gets_its_own(
    server: Server, connect: Connect, transport: str, monkeypatch: pytest.MonkeyPatch, goes: bool
) -> None:
    server.play(right)
    come = list[Any]()
    others = [Loop(come, goes=goes) for _ in range(3)]
    pools: Any = weakref.WeakKeyDictionary(dict.fromkeys(others, (None, None)))
    monkeypatch.setattr(ember, "_pools", pools)
    reply: Any = asyncio.run(connect(OPENAI, retries=0)("hi"))
    assert reply.text == "right"
    assert not [other for other in others if other in pools]
    assert [other for other in come if other in pools]


# ── Places and heads ───

PLACES: dict[str, tuple[str, int, bool, str]] = {  # the host, its port, if it is a number, named
    "http://provider.test/v1": ("provider.test", 80, False, "provider.test"),
    "https://provider.test/v1": ("provider.test", 443, False, "provider.test"),
    "https://provider.test:443/v1": ("provider.test", 443, False, "provider.test"),
    "https://provider.test:80/v1": ("provider.test", 80, False, "provider.test:80"),
    "http://provider.test:0/v1": ("provider.test", 0, False, "provider.test:0"),
    "HTTP://Provider.TEST:8080/v1": ("provider.test", 8080, False, "provider.test:8080"),
    "http://user:word@provider.test/v1": ("provider.test", 80, False, "provider.test"),
    "http://bücher.test/v1": ("xn--bcher-kva.test", 80, False, "xn--bcher-kva.test"),
    "http://127.0.0.1:8080/v1": ("127.0.0.1", 8080, True, "127.0.0.1:8080"),
    "http://[::1]/v1": ("::1", 80, True, "[::1]"),
    "https://[2001:db8::1]:8443/v1": ("2001:db8::1", 8443, True, "[2001:db8::1]:8443"),
    "http://1.provider.test/v1": ("1.provider.test", 80, False, "1.provider.test"),
}


@pytest.mark.parametrize("url", PLACES)
def test_a_place_has_host_port_and_name(url: str) -> None:
    place = place_of(url)
    assert (place.host, place.port, place.is_number, place.named) == PLACES[url]
    assert place.origin == f"{httpx.URL(url).scheme}://{place.named}"
    assert place.line == "POST /v1 HTTP/1.1\r\n"


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("", "/"),
        ("/v1?version=1&x=", "/v1?version=1&x="),
        ("/a b/ü", "/a%20b/%C3%BC"),
        ("/%0d%0aX:1", "/%0d%0aX:1"),
        ("/v1#part", "/v1"),
    ],
)
def test_a_path_is_written_so_that_it_ends_no_line(path: str, target: str) -> None:
    assert place_of(f"http://provider.test{path}").line == f"POST {target} HTTP/1.1\r\n"


def lines(size: int = 5, /, **headers: str) -> list[str]:
    """The lines of a head."""
    raw = head(place_of("https://provider.test:8443/v1"), headers, size)
    assert raw.endswith(b"\r\n\r\n")
    return raw.decode("ascii")[:-4].split("\r\n")


def test_a_head_has_a_line_for_each_header() -> None:
    assert lines(7, **{"Accept": "a, b", "x-y": ""}) == [
        "POST /v1 HTTP/1.1",
        "host: provider.test:8443",
        "accept: a, b",
        "x-y: ",
        "content-length: 7",
    ]


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("Host", "api.internal", "host: api.internal"),
        ("Content-Length", "99", "content-length: 5"),
        ("CONTENT-LENGTH", "99", "content-length: 5"),
        ("X", "a\tb", "x: a\tb"),
        ("!#$%&'*+-.^_`|~09azAZ", "x", "!#$%&'*+-.^_`|~09azaz: x"),
    ],
)
def test_a_name_comes_once_in_a_head(name: str, value: str, line: str) -> None:
    key, _, _ = line.partition(": ")
    assert [said for said in lines(**{name: value}) if said.startswith(f"{key}: ")] == [line]


@pytest.mark.parametrize("name", ["Transfer-Encoding", "transfer-encoding"])
def test_a_body_is_never_in_chunks(name: str) -> None:
    assert lines(**{name: "chunked"}) == lines()


@pytest.mark.parametrize(
    "name", ["", " ", "X Y", "X:", "X: y", "X\r\nY", "X\n", "X\0", "Ä", "X\t", "(X)", '"X"', "X/Y"]
)
def test_a_name_that_is_none_is_a_local_fault(name: str) -> None:
    with pytest.raises(httpx.LocalProtocolError, match="Illegal header name"):
        lines(**{name: "v"})


@pytest.mark.parametrize("character", [*"\r\n\0\x01\x0b\x1b\x7f\x85\xa0\u2028\u2029\ud800"])
def test_a_value_that_could_end_a_line_is_a_local_fault(character: str) -> None:
    with pytest.raises(httpx.LocalProtocolError, match="Illegal header value of 'x'"):
        lines(fine="ä", x=f"a{character}Injected: b")


@pytest.mark.parametrize("value", ["ä", "日本", "🜂"])
def test_a_value_that_is_not_ascii_is_refused(value: str) -> None:
    with pytest.raises(UnicodeEncodeError):
        lines(x=value)


# ── Addresses ───


class Network:
    """A name's addresses, each of which does what it is called, and the sockets made for them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.addresses: tuple[str, ...] = ()
        self.tried, self.pauses = list[str](), set[float | None]()
        self.sockets: dict[socket.socket, str] = {}
        self.twins = asyncio.Event()

    def lead_to(self, *addresses: str) -> None:
        """Let every name lead to these addresses; 250 ms are 10 from now on."""
        loop, wait = asyncio.get_running_loop(), asyncio.wait

        async def quick(tasks: Any, *, timeout: float | None, return_when: str) -> Any:  # noqa: ASYNC109
            self.pauses.add(timeout)
            return await wait(tasks, timeout=timeout and 0.01, return_when=return_when)

        self.addresses = addresses
        self.patch.setattr(loop, "getaddrinfo", self.found)
        self.patch.setattr(loop, "sock_connect", self.connect)
        self.patch.setattr(asyncio, "wait", quick)

    async def found(self, host: str, port: int, **how: Any) -> list[Any]:
        """What the name leads to."""
        assert (host, how["type"]) == ("provider.test", socket.SOCK_STREAM)
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (address, port)) for address in self.addresses]

    async def connect(self, sock: socket.socket, address: tuple[str, int]) -> None:
        """Be connected, or not."""
        self.tried.append(name := address[0])
        self.sockets[sock] = name
        assert address[1] == 8080
        assert sock.gettimeout() == 0
        if name == "unreachable":
            raise OSError(errno.ENETUNREACH, "unreachable")
        if name == "silent":
            await asyncio.Event().wait()
        elif name == "twin":  # all of them at once, when there are two
            if self.tried.count("twin") == 2:
                self.twins.set()
            await self.twins.wait()
        elif name != "at once":
            await asyncio.sleep(0.03 if name == "slow" else 0)
        if name == "refusing":
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refusing")

    @property
    def open(self) -> list[str]:
        """The addresses of the sockets that are open."""
        return [name for sock, name in self.sockets.items() if sock.fileno() >= 0]


@pytest.fixture
async def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    """A network that is made of names."""
    return Network(monkeypatch)


PLACE = place_of("http://provider.test:8080/v1")
ROUTES: dict[str, str] = {  # and the address that takes the connection
    "open": "open",
    "refusing, open": "open",
    "unreachable, open": "open",
    "silent, open": "open",
    "refusing, unreachable, open": "open",
    "silent, refusing, open": "open",
    "unreachable, silent, open": "open",
    "slow, silent, silent": "slow",
    "slow, refusing": "slow",
    "twin, twin": "twin",
    "open, silent": "open",
}


@pytest.mark.parametrize("route", ROUTES)
async def test_the_first_address_that_takes_a_connection_is_taken(
    network: Network, route: str
) -> None:
    before = asyncio.all_tasks()
    network.lead_to(*route.split(", "))
    async with asyncio.timeout(4):
        sock = await connected(PLACE)
    with sock:
        assert network.sockets[sock] == ROUTES[route]
        await until(lambda: asyncio.all_tasks() == before and network.open == [ROUTES[route]])
    assert network.tried == (["open"] if route == "open, silent" else route.split(", "))
    assert network.pauses <= {0.25, None}


@pytest.mark.parametrize("route", ["refusing", "unreachable", "unreachable, refusing"])
async def test_where_no_address_takes_a_connection_the_last_one_s_fault_is_raised(
    network: Network, route: str
) -> None:
    before = asyncio.all_tasks()
    network.lead_to(*route.split(", "))
    with pytest.raises(OSError, match=route.rsplit(", ", maxsplit=1)[-1]):
        await connected(PLACE)
    await until(lambda: asyncio.all_tasks() == before)
    assert (network.tried, network.open) == (route.split(", "), [])


async def test_a_name_that_leads_nowhere_is_a_connection_that_is_not_made(
    network: Network, connect: Connect
) -> None:
    async def nowhere(*_: Any, **how: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    network.patch.setattr(asyncio.get_running_loop(), "getaddrinfo", nowhere)
    with pytest.raises(ember.CallError, match=r"ConnectError: .*no such name") as caught:
        await connect(OPENAI, base_url="http://provider.test", retries=0)("hi")
    assert caught.value.transient


@pytest.mark.parametrize("route", ROUTES)
async def test_a_connection_that_is_cancelled_at_any_turn_leaves_no_socket(
    network: Network, route: str
) -> None:
    before = asyncio.all_tasks()
    network.lead_to(*route.split(", "))
    for turns in range(12):
        task = asyncio.create_task(connected(PLACE))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        [got] = await asyncio.gather(task, return_exceptions=True)
        if isinstance(got, socket.socket):  # it was there before
            got.close()
        else:
            assert isinstance(got, asyncio.CancelledError), turns
        await until(lambda: asyncio.all_tasks() == before and not network.open)


async def test_a_connection_that_is_late_leaves_no_socket(network: Network) -> None:
    before = asyncio.all_tasks()
    network.lead_to("silent", "refusing", "silent")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.04):
            await connected(PLACE)
    await until(lambda: asyncio.all_tasks() == before and not network.open)
    assert network.tried == ["silent", "refusing", "silent"]


def done_at_once(loop: asyncio.AbstractEventLoop, coro: Any, **_: Any) -> Any:
    """As Python 3.12's eager tasks are, of a coroutine that waits for nothing."""
    task = loop.create_future()
    try:
        coro.send(None)
    except StopIteration as end:
        task.set_result(end.value)
    except OSError as error:
        task.set_exception(error)
    return task


@pytest.mark.parametrize("route", ["at once", "unreachable, at once", "unreachable, unreachable"])
async def test_tasks_may_be_done_before_they_are_waited_for(network: Network, route: str) -> None:
    network.lead_to(*route.split(", "))
    loop = asyncio.get_running_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory", done_at_once))
    try:
        if "at once" in route:
            with await connected(PLACE) as sock:
                assert network.open == [network.sockets[sock]] == ["at once"]
        else:
            with pytest.raises(OSError, match="unreachable"):
                await connected(PLACE)
    finally:
        loop.set_task_factory(None)
    assert (network.tried, network.open) == (route.split(", "), [])


async def test_a_call_to_a_name_that_is_cancelled_at_any_turn_leaves_no_socket(
    connect: Connect, fast_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kept(socket.socket):
        def __init__(self, *kind: Any) -> None:
            super().__init__(*kind)
            made.append(self)

    async def found(*_: Any, **how: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", listener.getsockname())] * 2

    made = list[socket.socket]()
    with socket.create_server(("127.0.0.1", 0), backlog=99) as listener:  # and nobody answers
        monkeypatch.setattr(socket, "socket", Kept)
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found)
        model = connect(OPENAI, base_url="http://provider.test/v1", retries=0)
        for turns in range(25):
            call = asyncio.create_task(model("hi"))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            [caught] = await asyncio.gather(call, return_exceptions=True)
            assert isinstance(caught, asyncio.CancelledError)
        await until(lambda: all(sock.fileno() < 0 for sock in made))
    assert made
    assert fast_calls


@pytest.mark.parametrize("broken", ["old", "another", "raises"])
def test_an_httptools_that_is_old_or_broken_is_none(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    module: Any = types.ModuleType("httptools")
    module.HttpParserError = module.HttpParserUpgrade = ValueError
    if broken == "old":  # before 0.6.4
        module.HttpResponseParser = object
    elif broken == "raises":
        module.__getattr__ = lambda name: 1 / 0
    monkeypatch.setitem(sys.modules, "httptools", module)
    monkeypatch.delitem(sys.modules, "ember_accel.transport")
    assert ember._fast.__wrapped__() is None
