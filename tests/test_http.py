"""HTTP/1.1 byte by byte: how answers travel, break and lie, over each of the two transports."""

import asyncio
import contextlib
import dataclasses
import errno
import gzip
import itertools
import json
import random
import re
import socket
import struct
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ember

FIN, RST = "FIN", "RST"
Turn = Iterable[Any]  # what one request gets: packets, events to wait for, and at last FIN or RST


# ── Server ─── raw sockets on the loop of the test, so that a test knows who has seen what


class Line:
    """The server's end of one connection."""

    def __init__(self, end: socket.socket) -> None:
        self.end, self.seen = end, bytearray()
        self.loop = asyncio.get_running_loop()
        self.task: asyncio.Task[None] | None = None
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def send(self, packet: bytes) -> None:
        """Send a packet, and let the client read it."""
        await self.loop.sock_sendall(self.end, packet)
        for _ in range(3):
            await asyncio.sleep(0)

    async def head(self) -> bytes:
        """The head of the next request; EOFError where the client has left."""
        while b"\r\n\r\n" not in self.seen:
            await self._more()
        return self.seen.partition(b"\r\n\r\n")[0]

    async def body(self, head: bytes) -> bytes:
        """The body of the request with this head, which ends here."""
        size = int(re.findall(rb"(?i)content-length: *(\d+)", head)[0])
        start = len(head) + 4
        while len(self.seen) < start + size:
            await self._more()
        body = bytes(self.seen[start : start + size])
        del self.seen[: start + size]
        return body

    async def _more(self) -> None:
        data = await self.loop.sock_recv(self.end, 1 << 18)
        if not data:
            raise EOFError
        self.seen += data

    def hang_up(self, how: str = FIN) -> None:
        """End the connection at once: the client's kernel knows, and its loop does not yet."""
        self.loop.remove_reader(self.end)
        if how == RST:
            self.end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.end.close()
        if self.task:
            self.task.cancel()


class Peer:
    """A server that plays one turn a request, the last one for ever, and counts."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener, self.port = listener, listener.getsockname()[1]
        self.turns: list[Turn] = []
        self.heads, self.bodies = list[bytes](), list[bytes]()
        self.lines: list[Line] = []  # those that are open, the newest last
        self.used: list[Line] = []  # by each request
        self.playing = 0  # turns that have not come to their end
        self.opened = self.sent = 0  # connections, and bytes of answers
        self.early = False  # answers as soon as the head of a request is there
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def count(self) -> tuple[int, int]:
        """Requests and connections so far."""
        return len(self.heads), self.opened

    def play(self, *turns: Turn) -> None:
        """Play other turns from now on."""
        self.turns = list(turns)

    def model(self, **options: Any) -> ember.Model:
        """A model that calls this server once."""
        url = f"http://127.0.0.1:{self.port}/v1"
        standard = {"base_url": url, "retries": 0, "timeout": 5, "api_key": "sk-no-secret"}
        return ember.model("openai:gpt-4o", **standard | options)

    async def accept(self) -> None:
        """Serve each connection in a task of its own."""
        loop = asyncio.get_running_loop()
        while True:
            end, _ = await loop.sock_accept(self.listener)
            self.opened += 1
            self.lines.append(line := Line(end))
            line.task = loop.create_task(self._serve(line))
            self.tasks.add(line.task)
            line.task.add_done_callback(self.tasks.discard)

    async def _serve(self, line: Line) -> None:
        try:
            with contextlib.suppress(OSError, EOFError):  # the client left
                while True:
                    await self._exchange(line)
        finally:
            line.end.close()
            self.lines.remove(line)

    async def _exchange(self, line: Line) -> None:
        head = await line.head()
        if not self.early:
            self.bodies.append(await line.body(head))
        self.heads.append(head)
        self.used.append(line)
        turn = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        self.playing += 1
        try:
            for step in turn:
                await self._step(line, step)
        finally:
            self.playing -= 1
        if self.early:
            self.bodies.append(await line.body(head))

    async def _step(self, line: Line, step: Any) -> None:
        if isinstance(step, asyncio.Event):
            await step.wait()
        elif isinstance(step, bytes):
            self.sent += len(step)
            await line.send(step)
        else:
            line.hang_up(step)
            await asyncio.sleep(0)  # this task is cancelled


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """A server on the loop of the test; all of its connections have to end with the loop."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        listener.setblocking(False)
        peer = Peer(listener)
        accepting = asyncio.create_task(peer.accept())
        yield peer
        for task in (accepting, *peer.tasks):
            task.cancel()
        await asyncio.gather(accepting, *peer.tasks, return_exceptions=True)


@pytest.fixture(autouse=True)
def no_other(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs over both transports, and the fast one does not fall back on the other."""
    if transport == "fast":
        monkeypatch.setattr("httpcore.AsyncHTTPConnection", None)


# ── Answers ───

RIGHT = b'{"choices":[{"message":{"content":"right"},"finish_reason":"stop"}]}'
OK = b"HTTP/1.1 200 OK"
IN_CHUNKS = b"transfer-encoding: chunked"
ZIPPED = gzip.compress(RIGHT, mtime=0)


def saying(text: str) -> bytes:
    """A body that says this."""
    return RIGHT.replace(b"right", text.encode())


def head(*lines: bytes, status: bytes = OK) -> bytes:
    """A status line and headers."""
    return b"\r\n".join([status, *lines, b"", b""])


def whole(body: bytes = RIGHT, *lines: bytes, status: bytes = OK) -> bytes:
    """An answer with its length."""
    return head(b"content-length: %d" % len(body), *lines, status=status) + body


def chunks(*parts: bytes) -> bytes:
    """The parts as chunks, without the last one."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def chunked(*parts: bytes, lines: Iterable[bytes] = (), last: bytes = b"0\r\n\r\n") -> bytes:
    """An answer in chunks."""
    return head(IN_CHUNKS, *lines) + chunks(*parts) + last


def single(data: bytes) -> list[bytes]:
    """The data byte by byte."""
    return [data[at : at + 1] for at in range(len(data))]


# ── What is looked at ───


async def settled(condition: Callable[[], bool]) -> None:
    """Let the loop turn until the condition holds."""
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def failure(model: ember.Model, prompt: str = "hi") -> ember.EmberError:
    """What a call fails with, not by its deadline."""
    with anyio.fail_after(4), pytest.raises(ember.EmberError) as caught:
        await model(prompt)
    assert "timeout=" not in str(caught.value)
    return caught.value


async def goes_on(peer: Peer, model: ember.Model, *, reused: bool | None) -> None:
    """The next call gets its own answer, over the same connection or over a new one."""
    await settled(lambda: not peer.playing)
    asked, opened = peer.count
    peer.play([whole(saying("next"))])
    assert (await model("hi")).text == "next"
    if reused is None:  # either is right
        opened, reused = peer.opened, True
    assert peer.count == (asked + 1, opened if reused else opened + 1)
    await settled(lambda: len(peer.lines) == 1)


# ── Packets ───

SAME = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def packets(answer: bytes, cuts: set[int]) -> list[bytes]:
    """An answer cut at these places."""
    places = [0, *sorted(cuts), None]
    return [answer[start:end] for start, end in itertools.pairwise(places)]


FORMS: dict[str, bytes] = {
    "length": whole(),
    "chunked": chunked(RIGHT[:20], RIGHT[20:]),
    "single bytes in chunks": chunked(*single(RIGHT)),
    "chunk extensions": head(IN_CHUNKS) + b'44;a=b;c="d e"\r\n' + RIGHT + b"\r\n0;x\r\n\r\n",
    "trailers": chunked(RIGHT, last=b"0\r\ncontent-encoding: br\r\ny:\r\n\r\n"),
    "gzip": whole(ZIPPED, b"content-encoding: gzip"),
    "gzip in chunks": chunked(ZIPPED[:9], ZIPPED[9:], lines=[b"content-encoding: gzip"]),
    "deflate": whole(zlib.compress(RIGHT), b"content-encoding: deflate"),
    "after a 103": head(b"link: </x>", status=b"HTTP/1.1 103 Early Hints") + whole(),
}


@pytest.mark.parametrize("form", FORMS)
async def test_an_answer_cut_in_two_at_any_byte_is_read_over_one_connection(
    peer: Peer, form: str
) -> None:
    answer, model = FORMS[form], peer.model()
    for at in range(1, len(answer)):
        peer.play([answer[:at], answer[at:]])
        assert (await model("hi")).text == "right", at
    assert peer.count == (len(answer) - 1, 1)


@settings(SAME, max_examples=60)
@given(form=st.sampled_from(sorted(FORMS)), cuts=st.sets(st.integers(1, 400), max_size=30))
async def test_an_answer_in_any_packets_is_read_over_one_connection(
    peer: Peer, form: str, cuts: set[int]
) -> None:
    asked, model = len(peer.heads), peer.model()
    peer.play(packets(FORMS[form], cuts))
    assert (await model("hi")).text == "right"
    assert peer.count == (asked + 1, 1)


async def test_an_answer_byte_by_byte_is_read_over_one_connection(peer: Peer) -> None:
    model = peer.model()
    for answer in FORMS.values():
        peer.play(single(answer))
        assert (await model("hi")).text == "right"
    assert peer.count == (len(FORMS), 1)


@pytest.mark.parametrize("lines", [[], [b"content-encoding: gzip"]], ids=["plain", "gzip"])
@pytest.mark.parametrize("size", [(1 << 20) - 1, (1 << 20) + 1, 3_000_000])
async def test_a_large_answer_is_read_whole(peer: Peer, size: int, lines: list[bytes]) -> None:
    body = RIGHT.replace(b"right", random.Random(7).randbytes(size // 2).hex().encode())
    packed = gzip.compress(body, 1) if lines else body
    model = peer.model()
    halves = packed[: size // 3], packed[size // 3 :]
    for answer in (whole(packed, *lines), chunked(*halves, lines=lines)):
        peer.play([answer])
        assert (await model("hi")).text == json.loads(body)["choices"][0]["message"]["content"]
    assert peer.count == (2, 1)


async def test_a_request_goes_out_in_the_same_bytes_on_both_transports(peer: Peer) -> None:
    peer.play([whole()])
    await peer.model()('"ü" {x} \u2028')
    first, *lines = peer.heads[0].split(b"\r\n")
    assert first == b"POST /v1/chat/completions HTTP/1.1"
    pairs = [line.partition(b": ") for line in lines]
    headers = [(name.lower(), value) for name, _, value in pairs]
    assert sorted(headers) == [
        (b"accept", b"application/json, text/event-stream"),
        (b"accept-encoding", b"gzip"),
        (b"authorization", b"Bearer sk-no-secret"),
        (b"content-length", b"%d" % len(peer.bodies[0])),
        (b"content-type", b"application/json"),
        (b"host", b"127.0.0.1:%d" % peer.port),
        (b"user-agent", b"ember/" + ember.__version__.encode()),
    ]
    assert json.loads(peer.bodies[0])["messages"][0]["content"] == '"ü" {x} \u2028'


def with_headers(model: ember.Model, *headers: tuple[str, str]) -> ember.Model:
    """The model with these headers in its row."""
    row = dataclasses.replace(model.provider, headers=(*model.provider.headers, *headers))
    return dataclasses.replace(model, provider=row)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Host", "api.internal"),
        ("X-Tab", "a\tb"),
        ("X-Signs", "!#$%&'*+-.^_`|~\"(),/:;<=>?@[]{}\\"),
        ("!#$%&'*+-.^_`|~09azAZ", "x"),
        ("Connection", "close"),
    ],
)
async def test_a_header_of_the_row_goes_out_once_as_it_stands(
    peer: Peer, name: str, value: str
) -> None:
    peer.play([whole()])
    assert (await with_headers(peer.model(), (name, value))("hi")).text == "right"
    lines = [line.partition(": ") for line in peer.heads[0].decode().split("\r\n")[1:]]
    assert [said for key, _, said in lines if key.lower() == name.lower()] == [value]
    assert len({key.lower() for key, _, _ in lines}) == len(lines)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X Y", "v"),
        ("", "v"),
        ("X: y", "v"),
        ("X\r\nInjected", "v"),
        ("X", "a\nInjected: v"),
        ("X", "a\rInjected: v"),
        ("X", "a\0b"),
        ("X", "ä"),
        ("Ä", "v"),
    ],
)
async def test_a_header_of_the_row_that_is_none_is_an_error_and_nothing_is_sent(
    peer: Peer, name: str, value: str
) -> None:
    peer.play([whole()])
    error = await failure(with_headers(peer.model(), (name, value)))
    assert isinstance(error, ember.CallError)
    assert re.search("LocalProtocolError: Illegal header|UnicodeEncodeError: ", str(error))
    assert peer.heads == []


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding"])
async def test_a_row_does_not_say_where_a_request_ends(
    peer: Peer, transport: str, name: str
) -> None:
    if transport == "httpcore":
        pytest.skip("httpcore takes the row at its word")
    peer.play([whole()])
    model = with_headers(peer.model(), (name, "5" if "Length" in name else "chunked"))
    for _ in range(2):
        assert (await model("hi")).text == "right"
    for sent, body in zip(peer.heads, peer.bodies, strict=True):
        assert re.findall(rb"(?im)^(?:content-length|transfer-encoding): *(\S+)", sent) == [
            b"%d" % len(body)
        ]
    assert peer.count == (2, 1)


@pytest.mark.parametrize("size", [60_000, 70_000, 3_000_000])
async def test_a_large_request_arrives_whole(peer: Peer, size: int) -> None:
    peer.play([whole()])
    model = peer.model()
    for _ in range(2):
        assert (await model("x" * size)).text == "right"
    said = [json.loads(body)["messages"][0]["content"] for body in peer.bodies]
    assert said == ["x" * size] * 2
    assert peer.count == (2, 1)


# ── Heads ───

HEADS: dict[str, bytes] = {
    "odd case": head(b"CoNTenT-LENGTH: 68") + RIGHT,
    "no space": head(b"content-length:68") + RIGHT,
    "spaces": head(b"content-length: \t 68 \t ") + RIGHT,
    "zeros": head(b"content-length: 00000068") + RIGHT,
    "chunked in capitals": head(b"TRANSFER-ENCODING: Chunked") + chunks(RIGHT) + b"0\r\n\r\n",
    "repeated": whole(RIGHT, b"x: 1", b"x: 1", b"X: 2"),
    "empty value": whole(RIGHT, b"x:"),
    "colons": whole(RIGHT, b"x: :a: b:"),
    "utf-8": whole(RIGHT, "x: ü\u2028🜂".encode()),
    "latin-1": whole(RIGHT, b"x: \xe4\xff"),
    "all signs in a name": whole(RIGHT, b"!#$%&'*+-.^_`|~09azAZ: x"),
    "two hundred": whole(RIGHT, *(b"x-%d: y" % number for number in range(200))),
    "90 KB in many": whole(RIGHT, *[b"x: " + b"y" * 1000] * 90),
    "90 KB in one": whole(RIGHT, b"x: " + b"y" * 90_000),
    "no reason": whole(status=b"HTTP/1.1 200"),
    "an empty reason": whole(status=b"HTTP/1.1 200 "),
    "a reason in latin-1": whole(status=b"HTTP/1.1 200 \xe4\xff"),
    "keep-alive": whole(RIGHT, b"connection: keep-alive", b"keep-alive: timeout=5, max=9"),
    "identity": whole(RIGHT, b"content-encoding: identity"),
    "another content-type": whole(RIGHT, b"content-type: text/html; charset=latin-1"),
}


@pytest.mark.parametrize("form", HEADS)
async def test_a_head_may_be_odd(peer: Peer, form: str) -> None:
    model = peer.model()
    peer.play([HEADS[form]])
    assert (await model("hi")).text == "right"
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=True)


LENIENT: dict[str, bytes] = {
    "bare LF": whole().replace(b"\r\n", b"\n"),
    "one bare LF": head(b"x: y\nz: a", b"content-length: 68") + RIGHT,
    "spaces behind a chunk's size": head(IN_CHUNKS) + b"44  \r\n" + RIGHT + b"\r\n0\r\n\r\n",
    "length and chunked": head(b"content-length: 5", IN_CHUNKS) + chunks(RIGHT) + b"0\r\n\r\n",
    "a length in a trailer": chunked(RIGHT, last=b"0\r\ncontent-length: 5\r\n\r\n"),
}


@pytest.mark.parametrize("packet", [1, 1000])
@pytest.mark.parametrize("form", LENIENT)
async def test_what_many_servers_do_wrong_is_read_all_the_same(
    peer: Peer, form: str, packet: int
) -> None:
    answer, model = LENIENT[form], peer.model()
    peer.play([answer[at : at + packet] for at in range(0, len(answer), packet)])
    assert (await model("hi")).text == "right"
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=None)


OLD: dict[str, bytes] = {
    "a folded line": whole(RIGHT, b"x: a\r\n b"),
    "the same length twice": whole(RIGHT, b"content-length: 68"),
    "a control character": whole(RIGHT, b"x: a\x01b"),
    "an unknown version": whole(status=b"HTTP/1.7 200 OK"),
    "an empty line first": b"\r\n" + whole(),
    "chunked twice": head(IN_CHUNKS, IN_CHUNKS) + chunks(RIGHT) + b"0\r\n\r\n",
}


@pytest.mark.parametrize("form", OLD)
async def test_what_only_one_of_two_parsers_takes_is_the_answer_or_a_transient_error(
    peer: Peer, form: str
) -> None:
    model = peer.model()
    peer.play([OLD[form]])
    try:
        text = (await model("hi")).text
    except ember.CallError as error:
        assert "RemoteProtocolError: " in str(error)
        assert error.transient
        await goes_on(peer, model, reused=False)
    else:
        assert text == "right"
        await goes_on(peer, model, reused=True)


async def test_headers_are_read_in_any_case_and_with_any_space(peer: Peer) -> None:
    peer.play([whole(b"", b"ReTRY-AFTER-Ms: \t1500\t ", status=b"HTTP/1.1 429 Busy")])
    error = await failure(peer.model())
    assert isinstance(error, ember.CallError)
    assert (error.status, error.retry_after, error.transient) == (429, 1.5, True)


async def test_a_header_that_came_twice_has_both_values(peer: Peer) -> None:
    peer.play([whole(ZIPPED, b"Content-Encoding: gzip", b"content-encoding: br")])
    assert "'gzip, br'" in str(await failure(peer.model()))


@pytest.mark.parametrize("coding", ["utf-8", "latin-1"])
async def test_a_header_is_utf_8_or_else_latin_1(peer: Peer, coding: str) -> None:
    place = "location: http://provider.test/ü".encode(coding)
    peer.play([whole(b"", place, status=b"HTTP/1.1 307 There")])
    assert "redirects: http://provider.test/ü" in str(await failure(peer.model()))


# ── Chunks ───


def sized(*sizes: bytes) -> bytes:
    """An answer in chunks whose sizes are written so."""
    parts, rest = list[bytes](), RIGHT
    for size in sizes[:-1]:
        number = int(size.partition(b";")[0], 16)
        parts.append(size + b"\r\n" + rest[:number] + b"\r\n")
        rest = rest[number:]
    return head(IN_CHUNKS) + b"".join(parts) + sizes[-1] + b"\r\n\r\n"


SIZES: dict[str, bytes] = {
    "lower case": sized(b"3a", b"a", b"0"),
    "upper case": sized(b"3A", b"A", b"0"),
    "leading zeros": sized(b"0" * 16 + b"44", b"0"),
    "many zeros at the end": sized(b"44", b"0" * 16),
    "an extension": sized(b"44;a", b"0;b"),
    "extensions with values": sized(b'3a;a=b;c="d, e"', b"A;f=g", b'0;h="i"'),
    "a long extension": sized(b"44;a=" + b"b" * 10_000, b"0"),
}


@pytest.mark.parametrize("form", SIZES)
async def test_the_size_of_a_chunk_may_be_written_in_many_ways(peer: Peer, form: str) -> None:
    model = peer.model()
    peer.play([SIZES[form]])
    assert (await model("hi")).text == "right"
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=True)


BAD_CHUNKS: dict[str, bytes] = {
    "no number": b"zz\r\n" + RIGHT + b"\r\n0\r\n\r\n",
    "0x": b"0x44\r\n" + RIGHT + b"\r\n0\r\n\r\n",
    "negative": b"-44\r\n" + RIGHT + b"\r\n0\r\n\r\n",
    "an empty size": b"\r\n" + RIGHT + b"\r\n0\r\n\r\n",
    "a space before the size": b" 44\r\n" + RIGHT + b"\r\n0\r\n\r\n",
    "a size past all numbers": b"f" * 21 + b"\r\n" + RIGHT + b"\r\n0\r\n\r\n",
    "no line end behind the data": b"44\r\n" + RIGHT + b"0\r\n\r\n",
    "other data behind the data": b"44\r\n" + RIGHT + b"xx0\r\n\r\n",
    "too short": b"43\r\n" + RIGHT + b"\r\n0\r\n\r\n",
    "a trailer without a colon": b"44\r\n" + RIGHT + b"\r\n0\r\nno colon\r\n\r\n",
}


@pytest.mark.parametrize("form", BAD_CHUNKS)
async def test_a_chunk_that_is_none_is_a_transient_error_at_once(peer: Peer, form: str) -> None:
    model = peer.model()
    peer.play([head(IN_CHUNKS) + BAD_CHUNKS[form]])
    error = await failure(model)
    assert isinstance(error, ember.CallError)
    assert "RemoteProtocolError: " in str(error)
    assert (error.transient, error.status) == (True, None)
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=False)


# ── Encodings ───

GZIP, DEFLATE = b"content-encoding: gzip", b"content-encoding: deflate"
NO_JSON, NO_ZLIB = "ReplyError: the answer is no JSON", "CallError: error: Error -3"
ENCODED: dict[str, tuple[bytes, str]] = {
    "in capitals": (whole(ZIPPED, b"Content-Encoding: GZIP"), "right"),
    "junk behind it": (whole(ZIPPED + b"junk", GZIP), "right"),
    "junk in a chunk behind it": (chunked(ZIPPED, b"junk", lines=[GZIP]), "right"),
    "an empty one": (whole(b"", GZIP), NO_JSON),
    "truncated": (whole(ZIPPED[:-30], GZIP), NO_JSON),
    "truncated in chunks": (chunked(ZIPPED[:20], ZIPPED[20:-30], lines=[GZIP]), NO_JSON),
    "a wrong sum": (whole(ZIPPED[:-8] + b"12345678", GZIP), NO_ZLIB),
    "none at all": (whole(RIGHT, GZIP), NO_ZLIB),
    "none at all in chunks": (chunked(*single(RIGHT), lines=[GZIP]), NO_ZLIB),
    "deflate without its head": (whole(zlib.compress(RIGHT)[2:-4], DEFLATE), NO_ZLIB),
}


def shown(error: ember.EmberError) -> str:
    """The class of an error, and what it says."""
    return f"{type(error).__name__}: {str(error).partition(': ')[2]}"


@pytest.mark.parametrize("form", ENCODED)
async def test_an_encoded_answer_is_read_or_is_a_transient_error(peer: Peer, form: str) -> None:
    model, (answer, wanted) = peer.model(), ENCODED[form]
    peer.play([answer])
    if wanted == "right":
        assert (await model("hi")).text == wanted
    else:
        error = await failure(model)
        assert shown(error).startswith(wanted)
        assert error.transient
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=True if wanted == "right" else None)


@pytest.mark.parametrize(
    ("coding", "size"),
    [("br", 68), ("x-gzip", 68), ("gzip, gzip", 68), ("br", 1 << 20), ("br", (1 << 20) + 9)],
)
async def test_a_coding_not_asked_for_is_an_error_and_the_connection_is_sound(
    peer: Peer, coding: str, size: int
) -> None:
    model = peer.model()
    peer.play([whole(b"x" * size, b"content-encoding: " + coding.encode())])
    error = await failure(model)
    assert isinstance(error, ember.CallError)
    assert f"content-encoding '{coding}', not asked for" in str(error)
    assert (error.transient, error.status) == (False, None)
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=None)


@pytest.mark.parametrize("in_chunks", [False, True])
async def test_a_bomb_is_refused_and_the_next_call_is_sound(peer: Peer, in_chunks: bool) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = packer.compress(b" " * 1_000_000) + packer.flush(zlib.Z_FULL_FLUSH)
    bomb, model = block[:10] + block[10:] * 70, peer.model()
    peer.play([chunked(bomb, lines=[GZIP]) if in_chunks else whole(bomb, GZIP)])
    error = await failure(model)
    assert isinstance(error, ember.CallError)
    assert "more than 64 MB" in str(error)
    assert not error.transient
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=None)


# ── Informational answers, and answers without a body ───


def hint(status: bytes, *lines: bytes) -> bytes:
    """An answer before the answer."""
    return head(*lines, status=b"HTTP/1.1 " + status)


HINTS: dict[str, list[bytes]] = {
    "100": [hint(b"100 Continue")],
    "102": [hint(b"102 Processing")],
    "103": [hint(b"103 Early Hints", b"link: </x>; rel=preload", b"content-encoding: br")],
    "another": [hint(b"199 Whatever")],
    "four": [hint(b"102 P"), hint(b"103 E", b"x: y"), hint(b"100 C"), hint(b"103 E")],
    "a hundred": [hint(b"102 P")] * 100,
}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("form", HINTS)
async def test_answers_before_the_answer_are_passed_over(
    peer: Peer, form: str, together: bool
) -> None:
    model, packets = peer.model(), [*HINTS[form], whole()]
    peer.play([b"".join(packets)] if together else packets)
    assert (await model("hi")).text == "right"
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=True)


@pytest.mark.parametrize("more", [b"", b"\x00\x01", whole()], ids=["", "bytes", "an answer"])
async def test_a_switch_of_protocols_is_an_error_in_silence(
    peer: Peer, caplog: pytest.LogCaptureFixture, more: bytes
) -> None:
    model = peer.model()
    peer.play([hint(b"101 Switching", b"upgrade: h2c", b"connection: upgrade") + more])
    error = await failure(model)
    assert isinstance(error, ember.CallError)
    assert "RemoteProtocolError: " in str(error)
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=False)
    assert caplog.records == []


BODILESS: dict[str, tuple[bytes, str]] = {
    "204": (hint(b"204 No Content"), "ReplyError: the answer is no JSON, it is empty"),
    "204 with a length": (hint(b"204 No", b"content-length: 68"), "ReplyError: the answer is no"),
    "205": (hint(b"205 Reset", b"content-length: 0"), "ReplyError: the answer is no JSON, it is"),
    "304": (hint(b"304 Not Modified"), "CallError: 304"),
    "304 with a length": (hint(b"304 Not Modified", b"content-length: 68"), "CallError: 304"),
    "304 in chunks": (hint(b"304 Not Modified", IN_CHUNKS), "CallError: 304"),
    "a length of 0": (whole(b""), "ReplyError: the answer is no JSON, it is empty"),
    "no chunk": (chunked(), "ReplyError: the answer is no JSON, it is empty"),
}


@pytest.mark.parametrize("form", BODILESS)
async def test_an_answer_without_a_body_is_an_error_and_the_connection_is_kept(
    peer: Peer, form: str
) -> None:
    model, (answer, wanted) = peer.model(), BODILESS[form]
    peer.play([answer])
    error = await failure(model)
    assert shown(error).startswith(wanted)
    assert error.transient is not wanted.startswith("CallError")
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=True)


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_a_body_where_none_may_be_is_not_read_by_the_next_call(
    peer: Peer, status: bytes
) -> None:
    model = peer.model()
    peer.play([whole(status=b"HTTP/1.1 " + status)])
    error = await failure(model)
    wanted = (
        "CallError: 304: " if b"304" in status else "ReplyError: the answer is no JSON, it is empty"
    )
    assert shown(error).startswith(wanted)
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=False)
    assert peer.count == (2, 2)


# ── Early ends ───

ENDS = {FIN: "RemoteProtocolError: ", RST: "ReadError: "}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("form", ["length", "chunked", "trailers"])
async def test_an_answer_that_ends_early_at_any_byte_is_a_transient_error_after_one_request(
    peer: Peer, form: str, end: str
) -> None:
    answer, model = FORMS[form], peer.model()
    for at in range(len(answer)):
        peer.play([answer[:at], end])
        error = await failure(model)
        assert isinstance(error, ember.CallError), at
        assert ENDS[end] in str(error), at
        assert (error.transient, error.status, error.attempts) == (True, None, 1), at
        assert peer.count == (at + 1, at + 1)
    await goes_on(peer, model, reused=False)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("form", ["gzip", "gzip in chunks", "after a 103"])
async def test_another_answer_that_ends_early_is_a_transient_error_too(
    peer: Peer, form: str, end: str
) -> None:
    answer, model = FORMS[form], peer.model()
    for at in range(1, len(answer), 7):
        peer.play([answer[:at], end])
        error = await failure(model)
        assert isinstance(error, ember.CallError), at
        assert (ENDS[end] in str(error), error.transient) == (True, True), at
    assert peer.opened == len(peer.heads)
    await goes_on(peer, model, reused=False)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("form", FORMS)
async def test_an_answer_that_is_whole_counts_however_the_connection_ends(
    peer: Peer, form: str, end: str
) -> None:
    model = peer.model()
    peer.play([FORMS[form], end])
    for number in range(1, 4):
        assert (await model("hi")).text == "right"
        await settled(lambda: not peer.lines)
        assert peer.count == (number, number)
    await goes_on(peer, model, reused=False)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("at", [0, 9, 40, -20])
async def test_a_connection_that_breaks_is_one_attempt_of_the_call(
    peer: Peer, no_backoff: None, at: int, end: str
) -> None:
    peer.play([whole()[:at], end], [chunked(RIGHT)[:at], end], [whole()])
    assert (await peer.model(retries=2)("hi")).text == "right"
    assert peer.count == (3, 3)


@pytest.mark.parametrize("status", [b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK"])
@pytest.mark.parametrize("packets", [[RIGHT], single(RIGHT)], ids=["one packet", "many"])
async def test_the_end_of_the_connection_may_be_that_of_the_answer(
    peer: Peer, status: bytes, packets: list[bytes]
) -> None:
    model = peer.model()
    peer.play([head(b"x: y", status=status), *packets, FIN])
    for number in range(1, 3):
        assert (await model("hi")).text == "right"
        assert peer.count == (number, number)
    await goes_on(peer, model, reused=False)


async def test_an_answer_without_a_length_that_ends_early_is_a_transient_error(peer: Peer) -> None:
    answer, model = head() + RIGHT, peer.model()
    for number, at in enumerate(range(0, len(answer), 5), 1):
        peer.play([answer[:at], FIN])
        error = await failure(model)
        assert isinstance(error, ember.CallError if at < len(head()) else ember.ReplyError), at
        assert error.transient, at
        assert peer.count == (number, number)
    peer.play([answer, RST])
    assert "ReadError: " in str(await failure(model))
    await goes_on(peer, model, reused=False)


@pytest.mark.parametrize(
    "answer",
    [
        whole(RIGHT, b"connection: close"),
        whole(RIGHT, b"Connection: Close"),
        whole(RIGHT, b"connection: x, close"),
        whole(status=b"HTTP/1.0 200 OK"),
        chunked(RIGHT, lines=[b"connection: close"]),
    ],
    ids=["close", "capitals", "in a list", "HTTP/1.0", "in chunks"],
)
@pytest.mark.parametrize("packet", [1, 1000])
async def test_a_connection_the_server_does_not_keep_is_closed_by_the_client(
    peer: Peer, answer: bytes, packet: int
) -> None:
    model = peer.model()
    peer.play([answer[at : at + packet] for at in range(0, len(answer), packet)])
    assert (await model("hi")).text == "right"
    await settled(lambda: not peer.lines)
    await goes_on(peer, model, reused=False)


async def test_keep_alive_of_http_1_0_is_sound(peer: Peer) -> None:
    model = peer.model()
    peer.play([whole(RIGHT, b"connection: keep-alive", status=b"HTTP/1.0 200 OK")])
    assert (await model("hi")).text == "right"
    await goes_on(peer, model, reused=None)


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("end", ENDS)
async def test_an_error_whose_body_ends_early_keeps_its_status(
    peer: Peer, status: int, end: str
) -> None:
    model = peer.model()
    peer.play([head(b"content-length: 99", status=b"HTTP/1.1 %d E" % status), b'{"error', end])
    error = await failure(model)
    assert isinstance(error, ember.CallError)
    assert (error.status, error.transient) == (status, True)
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=False)


TOO_LARGE = b"HTTP/1.1 413 Too Large"
SAYS_SO = b'{"error":{"message":"the prompt is a book"}}'


@pytest.mark.parametrize("lines", [[], [b"connection: close"]], ids=["kept", "close"])
async def test_a_refusal_that_comes_before_the_request_was_sent_is_heard(
    peer: Peer, lines: list[bytes]
) -> None:
    peer.early, model = True, peer.model()
    answer = whole(SAYS_SO, *lines, status=TOO_LARGE)
    peer.play([answer[:30], answer[30:]])
    error = await failure(model, "x" * 3_000_000)
    assert isinstance(error, ember.CallError)
    assert (error.status, error.transient) == (413, False)
    assert "the prompt is a book" in str(error)
    assert peer.count == (1, 1)
    peer.early = False
    await goes_on(peer, model, reused=None)


async def test_a_connection_with_a_half_sent_request_is_not_used_again(
    peer: Peer, transport: str
) -> None:
    peer.early, gate = True, asyncio.Event()
    peer.play([whole(SAYS_SO, status=TOO_LARGE), gate])  # and the rest stays unread
    model = peer.model(timeout=5 if transport == "fast" else 0.1)  # httpcore writes, and no more
    with pytest.raises(ember.CallError, match="413" if transport == "fast" else "timeout="):
        await model("x" * 8_000_000)
    peer.early = False
    peer.play([whole()])
    with anyio.fail_after(4):
        assert (await peer.model()("hi")).text == "right"
    assert peer.count == (2, 2)
    gate.set()
    await settled(lambda: len(peer.lines) == 1)


@pytest.mark.parametrize("end", ENDS)
async def test_a_refusal_before_the_request_was_sent_with_the_end_is_heard_or_transient(
    peer: Peer, transport: str, end: str
) -> None:
    peer.early, model = True, peer.model()
    peer.play([whole(SAYS_SO, status=TOO_LARGE), end])
    error = await failure(model, "x" * 3_000_000)
    assert isinstance(error, ember.CallError)
    if transport == "fast" or error.status:
        assert (error.status, error.transient) == (413, False)
        assert "the prompt is a book" in str(error)
    else:  # httpcore does not read while it writes
        assert error.transient
    assert peer.count == (1, 1)
    peer.early = False
    await goes_on(peer, model, reused=False)


async def test_a_server_that_goes_while_the_request_is_sent_is_a_transient_error(
    peer: Peer,
) -> None:
    for number, end in enumerate(ENDS, 1):
        peer.early, model = True, peer.model()
        peer.play([end])
        error = await failure(model, "x" * 3_000_000)
        assert isinstance(error, ember.CallError)
        assert re.search("(Write|Read|RemoteProtocol)Error: ", str(error))
        assert (error.transient, error.status) == (True, None)
        assert peer.count == (number, number)
    peer.early = False
    await goes_on(peer, model, reused=False)


# ── Between two calls ───

SURPLUS = {
    "junk": b"junk",
    "an answer": whole(saying("stolen")),
    "half an answer": whole(saying("stolen"))[:50],
    "a refusal": whole(b"", b"connection: close", status=b"HTTP/1.1 408 Too Late"),
}


@pytest.mark.parametrize("form", ["length", "chunked", "gzip"])
@pytest.mark.parametrize("surplus", SURPLUS)
async def test_bytes_behind_an_answer_are_not_the_next_call_s(
    peer: Peer, form: str, surplus: str
) -> None:
    model = peer.model()
    peer.play([FORMS[form] + SURPLUS[surplus]])
    for number in range(1, 3):
        assert (await model("hi")).text == "right"
        assert peer.count == (number, number)
    await goes_on(peer, model, reused=False)


async def test_a_line_end_behind_an_answer_does_no_harm(peer: Peer) -> None:
    model = peer.model()
    peer.play([whole() + b"\r\n"])
    for _ in range(3):
        assert (await model("hi")).text == "right"
    assert len(peer.heads) == 3
    await goes_on(peer, model, reused=None)


@pytest.mark.parametrize("turns", [0, 1, 9])
@pytest.mark.parametrize("event", [FIN, RST, *SURPLUS])
async def test_what_comes_while_a_connection_is_idle_is_noticed_before_it_is_used(
    peer: Peer, event: str, turns: int
) -> None:
    model = peer.model()
    await goes_on(peer, model, reused=False)
    for _ in range(2):
        if event in SURPLUS:
            peer.lines[-1].end.send(SURPLUS[event])
        else:
            peer.lines[-1].hang_up(event)
        time.sleep(0.001)  # noqa: ASYNC251  # the kernel has it, and no turn of the loop was
        for _ in range(turns):
            await asyncio.sleep(0)
        await goes_on(peer, model, reused=False)
    assert peer.count == (3, 3)


async def burst(peer: Peer, model: ember.Model, size: int) -> None:
    """So many calls that are all in flight at one time."""
    gate, before = asyncio.Event(), len(peer.heads)
    peer.play([gate, whole()])
    calls = [asyncio.create_task(model("hi")) for _ in range(size)]
    await settled(lambda: len(peer.heads) == before + size)
    gate.set()
    assert [reply.text for reply in await asyncio.gather(*calls)] == ["right"] * size
    await settled(lambda: not peer.playing)


async def test_there_are_never_more_connections_than_calls_in_flight(peer: Peer) -> None:
    model, most = peer.model(), 0
    for size in (3, 8, 1, 5, 8, 2, 9):
        await burst(peer, model, size)
        most = max(most, size)
        assert peer.opened == len(peer.lines) == most


@pytest.mark.parametrize("how", ENDS)
async def test_a_burst_over_connections_that_all_ended_is_one_request_a_call(
    peer: Peer, how: str
) -> None:
    model = peer.model()
    await burst(peer, model, 8)
    for line in list(peer.lines):
        line.hang_up(how)
    await burst(peer, model, 8)
    assert peer.count == (16, 16)
    await settled(lambda: len(peer.lines) == 8)


@settings(SAME, max_examples=25)
@given(ended=st.lists(st.booleans(), min_size=6, max_size=6), how=st.sampled_from([FIN, RST]))
async def test_the_next_call_takes_the_connection_used_last_of_those_that_live(
    peer: Peer, ended: list[bool], how: str
) -> None:
    model = peer.model()
    await burst(peer, model, 6)
    order = await stack(peer, model, 6)
    for line, ends in zip(order, ended, strict=True):
        if ends:
            line.hang_up(how)
    living = [line for line, ends in zip(order, ended, strict=True) if not ends]
    asked, opened = peer.count
    peer.play([whole()])
    await model("hi")
    assert peer.count == (asked + 1, opened + (not living))
    if living:
        assert peer.used[-1] is living[-1]


async def stack(peer: Peer, model: ember.Model, size: int) -> list[Line]:
    """The connections in the order in which calls gave them back, the last one last."""
    gates = [asyncio.Event() for _ in range(size)]
    peer.play(*([gate, whole()] for gate in gates))
    before = len(peer.heads)
    calls = list[asyncio.Task[Any]]()
    for number in range(size):
        calls.append(asyncio.create_task(model("hi")))
        await settled(lambda: len(peer.heads) == before + number + 1)  # noqa: B023
    for gate, call in zip(gates, calls, strict=True):
        gate.set()
        await call
    await settled(lambda: not peer.playing)
    return peer.used[before:]


@settings(SAME, max_examples=40)
@given(steps=st.lists(st.integers(0, 9), max_size=25))
async def test_connections_are_a_stack_whatever_the_calls_do(peer: Peer, steps: list[int]) -> None:
    """An even step begins a call; an odd one ends one of those in flight, whichever it says."""
    model = peer.model()
    flying = list[tuple[asyncio.Event, asyncio.Task[Any], Line]]()
    idle = [peer.used[-1]] if peer.used else list[Line]()  # of the example before this one
    for line in [line for line in peer.lines if line not in idle]:
        line.hang_up()
    for step in steps:
        before, opened = len(peer.heads), peer.opened
        if step % 2 == 0:
            gate = asyncio.Event()
            peer.play([gate, whole()])
            call = asyncio.create_task(model("hi"))
            await settled(lambda: len(peer.heads) == before + 1)  # noqa: B023
            flying.append((gate, call, line := peer.used[-1]))
            assert (peer.opened, line) == (opened, idle.pop()) if idle else (opened + 1, line)
        elif flying:
            gate, call, line = flying.pop(step % len(flying))
            gate.set()
            assert (await call).text == "right"
            await settled(lambda: peer.playing == len(flying))
            idle.append(line)
    for gate, call, _ in flying:
        gate.set()
        await call
    await settled(lambda: not peer.playing)
    for line in peer.lines[:]:
        line.hang_up()
    peer.used.clear()


# ── What is no answer ───

WRONG: dict[str, Turn] = {
    "ssh": [b"SSH-2.0-OpenSSH_9.6\r\n", FIN],
    "a TLS alert": [b"\x15\x03\x01\x00\x02\x02\x28", FIN],
    "html": [b"<html></html>\r\n\r\n"],
    "smtp": [b"220 mail.test ESMTP\r\n\r\n"],
    "a request": [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"],
    "zeros": [b"\0" * 100 + b"\r\n\r\n"],
    "HTTP/2": [b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64", FIN],
    "a version without a dot": [whole(status=b"HTTP/2 200 OK")],
    "a version of letters": [whole(status=b"HTTP/x.y 200 OK")],
    "a version in lower case": [whole(status=b"http/1.1 200 OK")],
    "a status of two digits": [whole(status=b"HTTP/1.1 20 OK")],
    "a status of four digits": [whole(status=b"HTTP/1.1 2000 OK")],
    "a status of letters": [whole(status=b"HTTP/1.1 abc OK")],
    "a status below 100": [whole(status=b"HTTP/1.1 099 OK")],
    "no status": [whole(status=b"HTTP/1.1 OK")],
    "a negative length": [head(b"content-length: -5") + RIGHT],
    "a length with a sign": [head(b"content-length: +68") + RIGHT],
    "a length in hex": [head(b"content-length: 0x44") + RIGHT],
    "an empty length": [head(b"content-length:") + RIGHT],
    "two lengths": [whole(RIGHT, b"content-length: 69")],
    "two lengths in one": [head(b"content-length: 68, 69") + RIGHT],
    "a length past all numbers": [head(b"content-length: " + b"9" * 30) + RIGHT],
    "a length past 64 bits": [head(b"content-length: %d" % (2**64 + 68)) + RIGHT, FIN],
    "a length that does not come": [head(b"content-length: 999999999999") + RIGHT, FIN],
    "no colon": [whole(RIGHT, b"no colon")],
    "a space before the colon": [whole(RIGHT, b"x : y")],
    "no name": [whole(RIGHT, b": y")],
    "a zero byte in a value": [whole(RIGHT, b"x: a\0b")],
    "a carriage return in a value": [whole(RIGHT, b"x: a\rb")],
    "a name in latin-1": [whole(RIGHT, b"\xe4: b")],
    "a folded first line": [head(b" x: y", b"content-length: 68") + RIGHT],
}


@pytest.mark.parametrize("form", WRONG)
async def test_what_is_no_answer_is_a_transient_error_at_once(
    peer: Peer, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = peer.model()
    peer.play(WRONG[form])
    error = await failure(model)
    assert isinstance(error, ember.CallError)
    assert "RemoteProtocolError: " in str(error)
    assert (error.transient, error.status) == (True, None)
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=False)
    assert caplog.records == []


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"identity", b"gzip", b"chunked, x"])
async def test_another_transfer_coding_is_a_transient_error(peer: Peer, coding: bytes) -> None:
    model = peer.model()
    answer = head(b"transfer-encoding: " + coding) + chunks(ZIPPED) + b"0\r\n\r\n"
    peer.play([answer, FIN])
    error = await failure(model)
    assert isinstance(error, ember.CallError | ember.ReplyError)
    assert error.transient
    await goes_on(peer, model, reused=False)


def endless(first: bytes, piece: bytes) -> Turn:
    """A piece after another, for ever."""
    return itertools.chain([first], itertools.repeat(piece))


LINES = (b"x: " + b"y" * 95 + b"\r\n") * 10
ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "status line": (OK, b"y" * 1000),
    "header": (OK + b"\r\nx: ", b"y" * 1000),
    "name of a header": (OK + b"\r\n", b"y" * 1000),
    "headers": (OK + b"\r\n", LINES),
    "trailer": (chunked(RIGHT, last=b"0\r\nx: "), b"y" * 1000),
    "trailers": (chunked(RIGHT, last=b"0\r\n"), LINES),
    "chunk extension": (head(IN_CHUNKS) + b"5;", b"y" * 1000),
    "size of a chunk": (head(IN_CHUNKS), b"0" * 1000),
}


@pytest.mark.parametrize("form", ENDLESS)
async def test_a_head_or_a_trailer_without_an_end_is_an_error_after_100_kb(
    peer: Peer, form: str
) -> None:
    model = peer.model()
    peer.play(endless(*ENDLESS[form]))
    error = await failure(model)
    assert isinstance(error, ember.CallError)
    assert "RemoteProtocolError: " in str(error)
    assert (error.transient, error.status) == (True, None)
    await settled(lambda: not peer.playing)
    assert 100_000 < peer.sent < 200_000
    await goes_on(peer, model, reused=False)


@pytest.mark.parametrize("size", [300_000, 900_000])
async def test_a_head_that_is_too_large_is_an_error_though_it_ends(peer: Peer, size: int) -> None:
    model = peer.model()
    peer.play([whole(RIGHT, *[b"x: " + b"y" * 996] * (size // 1000))])
    error = await failure(model)
    assert isinstance(error, ember.CallError)
    assert "RemoteProtocolError: " in str(error)
    await goes_on(peer, model, reused=False)


async def test_the_heads_of_answers_one_after_the_other_are_not_added_up(peer: Peer) -> None:
    model, answer = peer.model(), whole(b"", b"x: " + b"y" * 60_000)
    peer.play([answer[:50_000], answer[50_000:]])
    for _ in range(3):
        assert "it is empty" in str(await failure(model))
    assert peer.count == (3, 1)


async def test_informational_answers_without_an_end_are_an_error(
    peer: Peer, transport: str
) -> None:
    peer.play(endless(b"", hint(b"103 Early Hints", b"link: </x>") * 20))
    model = peer.model(timeout=5 if transport == "fast" else 0.1)
    with pytest.raises(ember.CallError) as caught:
        await model("hi")
    if transport == "fast":  # h11 counts each of them for itself
        assert "RemoteProtocolError: " in str(caught.value)
        assert 100_000 < peer.sent < 200_000
    await settled(lambda: not peer.lines)
    assert peer.count == (1, 1)


async def test_a_server_that_answers_before_it_is_asked_harms_no_later_call(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Line.__init__

    def early(line: Line, end: socket.socket) -> None:
        made(line, end)
        end.send(whole(b"", b"connection: close", status=b"HTTP/1.1 503 Too Many"))

    model = peer.model()
    with monkeypatch.context() as patched:
        patched.setattr(Line, "__init__", early)
        peer.play([FIN])
        error = await failure(model)
    assert isinstance(error, ember.CallError)
    assert error.transient
    assert error.status in (503, None)
    await settled(lambda: not peer.lines)
    await goes_on(peer, model, reused=False)


# ── Cancellation and deadlines ───

PLACES: dict[str, list[bytes]] = {
    "before the answer": [],
    "in the status line": [b"HTTP/1."],
    "in the head": [whole()[:30]],
    "after a 100": [hint(b"100 Continue")],
    "before the body": [whole()[: -len(RIGHT)]],
    "in the body": [whole()[:-20]],
    "in the size of a chunk": [head(IN_CHUNKS) + b"4"],
    "in a chunk": [chunked(RIGHT)[:-20]],
    "before the last chunk": [head(IN_CHUNKS) + chunks(RIGHT)],
    "in a trailer": [chunked(RIGHT, last=b"0\r\nx: y\r\n")],
    "in the body of a gzip": [FORMS["gzip"][:-20]],
    "in a body without a length": [head() + RIGHT],
    "in the body of an error": [whole(RIGHT, status=b"HTTP/1.1 500 E")[:-20]],
}


@pytest.mark.parametrize("place", PLACES)
async def test_a_call_that_is_cancelled_anywhere_leaves_nothing(peer: Peer, place: str) -> None:
    model, before = peer.model(), asyncio.all_tasks()
    peer.play(PLACES[place])
    call = asyncio.create_task(model("hi"))
    await settled(lambda: len(peer.heads) == 1 and not peer.playing)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await settled(lambda: not peer.lines and not peer.tasks)
    assert asyncio.all_tasks() == before
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=False)


@pytest.mark.parametrize("turns", range(0, 24, 3))
async def test_a_call_that_is_cancelled_at_any_turn_of_the_loop_leaves_nothing(
    peer: Peer, turns: int
) -> None:
    model, before = peer.model(), asyncio.all_tasks()
    peer.play([whole()])
    for number in range(turns, turns + 3):
        call = asyncio.create_task(model("hi"))
        for _ in range(number):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    for _ in range(2):
        assert (await model("hi")).text == "right"
    await settled(lambda: len(peer.lines) == len(peer.tasks) == 1 and not peer.playing)
    assert asyncio.all_tasks() == before | peer.tasks


async def test_a_deadline_anywhere_closes_the_connection_and_is_not_transient(peer: Peer) -> None:
    model, before, calls = peer.model(timeout=0.2), asyncio.all_tasks(), list[Any]()
    for number, place in enumerate(PLACES, 1):
        peer.play(PLACES[place])
        calls.append(asyncio.create_task(model("hi")))
        await settled(lambda: len(peer.heads) == number and not peer.playing)  # noqa: B023
    errors = await asyncio.gather(*calls, return_exceptions=True)
    for place, error in zip(PLACES, errors, strict=True):
        assert isinstance(error, ember.CallError), place
        if "error" in place:
            assert error.status == 500
        else:
            assert "no whole answer within timeout=0.2 s" in str(error), place
            assert not error.transient, place
    await settled(lambda: not peer.lines and not peer.tasks)
    assert asyncio.all_tasks() == before
    assert peer.count == (len(PLACES), len(PLACES))
    await goes_on(peer, peer.model(), reused=False)


@pytest.mark.parametrize("how", ["cancelled", "late"])
async def test_a_request_that_is_left_half_sent_leaves_nothing(peer: Peer, how: str) -> None:
    gate, model, before = asyncio.Event(), peer.model(), asyncio.all_tasks()
    peer.early = True
    peer.play([gate])  # it reads no further
    call = asyncio.create_task(model("x" * 8_000_000, timeout=1 if how == "late" else 5))
    await settled(lambda: len(peer.heads) == 1)
    if how == "cancelled":
        call.cancel()
    with pytest.raises(asyncio.CancelledError if how == "cancelled" else ember.CallError):
        await call
    gate.set()
    await settled(lambda: not peer.lines and not peer.tasks)
    assert asyncio.all_tasks() == before
    assert (peer.count, peer.bodies) == ((1, 1), [])
    peer.early = False
    await goes_on(peer, model, reused=False)


# ── What the ledger hears ───

COUNTED = RIGHT[:-1] + b',"usage":{"prompt_tokens":11,"completion_tokens":7}}'
HEARD: dict[str, tuple[list[Any], str, bool]] = {  # and if it may have been billed
    "whole": ([whole(COUNTED)], "ok", False),
    "whole without counts": ([whole()], "ok", True),
    "an error": ([whole(b"", status=b"HTTP/1.1 500 E")], "CallError: ", False),
    "an error without its end": ([whole(status=b"HTTP/1.1 429 E")[:-9], FIN], "CallError: ", False),
    "nothing": ([FIN], "CallError: ", True),
    "a reset": ([RST], "CallError: ", True),
    "in the head": ([whole()[:30], FIN], "CallError: ", True),
    "in the body": ([whole()[:-9], FIN], "CallError: ", True),
    "no answer": ([b"SSH-2.0-OpenSSH_9.6\r\n", FIN], "CallError: ", True),
    "no JSON": ([whole(b"hello")], "ReplyError: ", True),
    "silence": ([], "CallError: ", True),
    "silence in the body": ([whole()[:-9]], "CallError: ", True),
}


@pytest.mark.parametrize("form", HEARD)
async def test_the_ledger_hears_of_each_attempt_what_it_may_have_cost(
    peer: Peer, form: str
) -> None:
    turn, outcome, billed = HEARD[form]
    model = peer.model(price=(1, 2), timeout=0.1 if "silence" in form else 5)
    await goes_on(peer, model, reused=False)
    for _ in range(2):  # over a kept connection, and over a new one
        peer.play(turn)
        with ember.track() as ledger, contextlib.suppress(ember.EmberError):
            await model("hi")
        [attempt] = ledger.calls
        assert attempt.outcome.startswith(outcome)
        assert (attempt.uncertain > 0) is billed
    assert len(peer.heads) == 3


def full(stack: contextlib.ExitStack, host: str, port: int = 0) -> int:
    """The port of a socket that takes no more connections."""
    listener = stack.enter_context(socket.create_server((host, port), backlog=0))
    for _ in range(3):
        waiting = stack.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(listener.getsockname())
    return listener.getsockname()[1]


UNMADE: dict[str, tuple[dict[str, Any], str, bool | None]] = {  # and if it is transient
    "refused": ({}, "ConnectError: ", True),
    "no connection in time": ({"connect": 0.05}, "ConnectTimeout: ", True),
    "late": ({"timeout": 0.05}, "within timeout=0.05 s", False),
    "cancelled": ({}, "", None),
}


@pytest.mark.parametrize("how", UNMADE)
async def test_a_connection_that_is_not_made_costs_nothing_and_leaves_nothing(how: str) -> None:
    (options, words, transient), before = UNMADE[how], asyncio.all_tasks()
    with contextlib.ExitStack() as stack, ember.track() as ledger:
        port = full(stack, "127.0.0.1")
        if how == "refused":
            stack.close()
        url = f"http://127.0.0.1:{port}/v1"
        model = ember.model("openai:gpt-4o", base_url=url, api_key="k", price=(1, 2), retries=0)
        call = asyncio.create_task(model.using(**options)("hi"))
        if how == "cancelled":
            await asyncio.sleep(0.02)
            call.cancel()
        [caught] = await asyncio.gather(call, return_exceptions=True)
    assert words in str(caught)
    assert getattr(caught, "transient", None) is transient
    assert [attempt.uncertain for attempt in ledger.calls] == [0]
    await settled(lambda: asyncio.all_tasks() == before)


@pytest.mark.parametrize("name", ["a..invalid", f"{'a' * 70}.invalid"], ids=["empty", "long"])
async def test_a_name_with_a_label_that_is_none_is_a_connection_that_is_not_made(name: str) -> None:
    with ember.track() as ledger:
        model = ember.model("openai:gpt-4o", base_url=f"http://{name}", api_key="k", price=(1, 2))
        error = await failure(model.using(retries=0))
    assert isinstance(error, ember.CallError)
    assert "ConnectError: " in str(error)
    assert error.transient
    assert [attempt.uncertain for attempt in ledger.calls] == [0]


async def test_port_0_is_no_other_port(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if transport == "httpcore":
        pytest.skip("httpcore takes it for none")

    async def refuse(*args: Any, **how: Any) -> Any:
        tried.extend([*args, *how.values()])
        raise ConnectionRefusedError

    tried = list[Any]()
    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", refuse)
    model = ember.model("openai:gpt-4o", base_url="http://127.0.0.1:0", api_key="k", retries=0)
    assert "ConnectError: " in str(await failure(model))
    assert 0 in tried
    assert 80 not in tried


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one address of loopback")
@pytest.mark.parametrize("first", ["silent", "refusing"])
async def test_a_name_s_next_address_is_tried_where_the_first_takes_no_connection(
    peer: Peer, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(host: Any, port: Any, *rest: Any, **more: Any) -> list[Any]:
        return [(socket.AF_INET, 1, 6, "", (ip, int(port))) for ip in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    before = asyncio.all_tasks()
    peer.play([whole()])
    with contextlib.ExitStack() as stack:
        if first == "silent":
            full(stack, "127.0.0.2", peer.port)
        model = peer.model(base_url=f"http://provider.test:{peer.port}/v1", connect=3)
        assert (await model("hi")).text == "right"
        await settled(lambda: asyncio.all_tasks() == before | peer.tasks)
    assert peer.count == (1, 1)


# ── Streams ───


def event(said: str) -> bytes:
    """One event of a stream."""
    return b"data: " + said.encode() + b"\n\n"


def delta(text: str) -> bytes:
    """An event with a text."""
    return event(json.dumps({"choices": [{"delta": {"content": text}}]}))


STOP = event('{"choices":[{"delta":{},"finish_reason":"stop"}]}')
EVENTS = [delta("one"), delta("two"), STOP, event("[DONE]")]
STREAMS: dict[str, bytes] = {
    "length": whole(b"".join(EVENTS)),
    "chunked": chunked(*EVENTS),
    "one chunk": chunked(b"".join(EVENTS)),
    "gzip": whole(gzip.compress(b"".join(EVENTS), mtime=0), GZIP),
    "gzip in chunks": chunked(gzip.compress(b"".join(EVENTS), mtime=0), lines=[GZIP]),
}


async def pieces(model: ember.Model) -> list[str]:
    """The pieces of a stream."""
    with anyio.fail_after(4):
        async with model.stream("hi") as stream:
            return [piece async for piece in stream]


@settings(SAME, max_examples=40)
@given(form=st.sampled_from(sorted(STREAMS)), cuts=st.sets(st.integers(1, 330), max_size=20))
async def test_a_stream_in_any_packets_is_read_over_one_connection(
    peer: Peer, form: str, cuts: set[int]
) -> None:
    asked, model = len(peer.heads), peer.model()
    peer.play(packets(STREAMS[form], cuts))
    assert await pieces(model) == ["one", "two"]
    assert peer.count == (asked + 1, 1)


@pytest.mark.parametrize("form", STREAMS)
async def test_a_stream_byte_by_byte_gives_its_connection_back(peer: Peer, form: str) -> None:
    model = peer.model()
    peer.play(single(STREAMS[form]))
    for _ in range(2):
        assert await pieces(model) == ["one", "two"]
    assert peer.count == (2, 1)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("form", ["length", "chunked"])
async def test_a_stream_that_ends_early_is_an_error_with_the_text_so_far(
    peer: Peer, form: str, end: str
) -> None:
    answer, model = STREAMS[form], peer.model()
    finished = answer.index(STOP) + len(STOP)
    for number, at in enumerate(range(0, finished - 1, 5), 1):
        peer.play([answer[:at], end])
        got = list[str]()
        with anyio.fail_after(4), pytest.raises(ember.CallError) as caught:
            async with model.stream("hi") as stream:
                async for piece in stream:
                    got.append(piece)
        ends = {text: answer.index(delta(text)) + len(delta(text)) for text in ("one", "two")}
        read = [text for text, after in ends.items() if after <= at]
        assert got == read, at
        assert (caught.value.partial, caught.value.transient) == ("".join(read), not read), at
        assert peer.count == (number, number)
    await goes_on(peer, model, reused=False)


@pytest.mark.parametrize("event", [FIN, RST, *SURPLUS])
@pytest.mark.parametrize("form", ["length", "chunked", "gzip in chunks"])
async def test_what_comes_behind_a_stream_that_is_read_slowly_does_no_harm(
    peer: Peer, form: str, event: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = peer.model()
    peer.play([STREAMS[form]])
    async with model.stream("hi") as stream:
        assert await anext(stream) == "one"
        await settled(lambda: not peer.playing)
        if event in SURPLUS:
            peer.lines[-1].end.send(SURPLUS[event])
        else:
            peer.lines[-1].hang_up(event)
        for _ in range(9):
            await asyncio.sleep(0)
        assert [piece async for piece in stream] == ["two"]
    assert stream.reply.text == "onetwo"
    await goes_on(peer, model, reused=False)
    assert caplog.records == []


@pytest.mark.parametrize("end", [FIN, b"no chunk\r\n"], ids=["FIN", "junk"])
async def test_what_came_before_the_fault_of_a_stream_is_read_first(peer: Peer, end: Any) -> None:
    model, got = peer.model(), list[str]()
    peer.play([chunked(EVENTS[0], last=b""), chunks(EVENTS[1]), end])
    with pytest.raises(ember.CallError) as caught:
        async for piece in model.stream("hi"):
            got.append(piece)
            await settled(lambda: not peer.playing)
    assert got == ["one", "two"]
    assert (caught.value.partial, caught.value.transient) == ("onetwo", False)
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=False)


async def test_a_stream_that_is_left_in_the_middle_closes_its_connection(peer: Peer) -> None:
    model, before = peer.model(), asyncio.all_tasks()
    peer.play([chunked(*EVENTS[:2])[:-5]])
    async with model.stream("hi") as stream:
        assert await anext(stream) == "one"
    await settled(lambda: not peer.lines and not peer.tasks)
    assert asyncio.all_tasks() == before
    await goes_on(peer, model, reused=False)


async def test_a_stream_that_does_not_end_behind_its_last_event_ends_all_the_same(
    peer: Peer,
) -> None:
    comment = b": " + b"x" * 4_000_000 + b"\n\n"  # so that no turn of the loop is without bytes
    peer.play(endless(head(IN_CHUNKS) + chunks(*EVENTS), chunks(comment)))
    model = peer.model()
    assert await pieces(model) == ["one", "two"]
    await settled(lambda: not peer.playing)
    assert peer.count == (1, 1)
    await goes_on(peer, model, reused=False)


@pytest.mark.parametrize("form", ["whole", "stream"])
async def test_nothing_packed_without_an_end_is_over_at_the_deadline(peer: Peer, form: str) -> None:
    packer, nothing = zlib.compressobj(9, zlib.DEFLATED, 31), b"\0\0\0\xff\xff" * 800_000
    first = packer.compress(b" ") + packer.flush(zlib.Z_SYNC_FLUSH)
    peer.play(endless(head(IN_CHUNKS, GZIP) + chunks(first), chunks(nothing)))
    model = peer.model(timeout=0.1)
    with anyio.fail_after(4), pytest.raises(ember.CallError, match=r"within timeout=0\.1 s"):
        await (model("hi") if form == "whole" else pieces(model))
    await settled(lambda: not peer.playing)
    await goes_on(peer, peer.model(), reused=False)


async def test_a_stream_that_nobody_reads_holds_its_server_back(peer: Peer) -> None:
    comment = b": " + b"x" * 500_000 + b"\n\n"
    peer.play(endless(head(IN_CHUNKS) + chunks(*EVENTS[:1]), chunks(comment)))
    async with peer.model().stream("hi") as stream:
        assert await anext(stream) == "one"
        for _ in range(400):
            await asyncio.sleep(0)
        assert peer.sent < 30_000_000  # what the kernel's buffers hold, and little more
    await settled(lambda: not peer.lines)


@pytest.mark.parametrize("options", [{}, {"connect": 9}], ids=["connect", "timeout"])
async def test_a_time_out_of_the_kernel_is_not_ember_s(
    options: dict[str, Any], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(*_: Any, **how: Any) -> Any:
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", late)
    model = ember.model("openai:gpt-4o", base_url="http://127.0.0.1:9", api_key="k", retries=0)
    error = await failure(model.using(timeout=7, **options))
    assert isinstance(error, ember.CallError)
    assert "ConnectError: " in str(error) or "ConnectTimeout: " in str(error)
    assert "connect=" not in str(error)
    assert error.transient


async def test_a_header_of_the_row_that_is_none_costs_nothing(peer: Peer) -> None:
    peer.play([whole()])
    with ember.track() as ledger:
        error = await failure(with_headers(peer.model(price=(1, 2)), ("X Y", "v")))
    assert not getattr(error, "transient", None)
    assert [attempt.uncertain for attempt in ledger.calls] == [0] * len(ledger.calls)


async def test_a_user_agent_of_the_row_takes_the_place_of_ember_s(peer: Peer) -> None:
    peer.play([whole()])
    await with_headers(peer.model(), ("User-Agent", "mine"))("hi")
    lines = peer.heads[0].lower().split(b"\r\n")
    assert [line for line in lines if line.startswith(b"user-agent:")] == [b"user-agent: mine"]
