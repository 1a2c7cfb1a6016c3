"""A loopback HTTP/1.1 server that plays scripts of answers and faults, byte by byte.

with serving(Answer(status=503), Answer(openai_answer("hi"))) as server:
    ...                                   # the first request gets 503, all others the answer
    assert len(server.requests) == 2
"""

import asyncio
import contextlib
import gzip
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Any

import anyio

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


# ── Scripts ─── what one request gets


@dataclass(frozen=True)
class Answer:
    """Status, headers and body of one answer, and how its bytes travel."""

    body: Any = b""  # bytes, a list of bytes (written one by one), text, or a JSON value
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    type: str = "application/json"
    framing: str = "length"  # or "chunked", or "close": the end of the connection ends the body
    piece: int = 0  # bytes in a write, and in a chunk; 0: the whole body at once
    pause: float = 0.0  # seconds before each piece
    zipped: bool = False
    first: bytes = b""  # sent before the status line: "HTTP/1.1 103 Early Hints\r\n\r\n"
    head: bytes | None = None  # sent instead of status line and headers
    fault: str = ""  # "reset", "close" or "hang" …
    at: float | None = None  # … before the headers, or after this share of the body
    tail: bytes = b""  # sent after a whole answer, while the connection is idle
    then: str = "keep"  # or "close" or "reset" the idle connection, unannounced
    hold: threading.Event | None = None  # answer only when this is set

    def pieces(self) -> list[bytes]:
        """The body as it is written."""
        if isinstance(self.body, list) and all(isinstance(item, bytes) for item in self.body):
            return self.body
        body = self.body if isinstance(self.body, bytes | str) else json.dumps(self.body)
        body = body.encode() if isinstance(body, str) else body
        body = gzip.compress(body, 1) if self.zipped else body
        step = self.piece or len(body) or 1
        return [body[at : at + step] for at in range(0, len(body), step)]

    def opening(self, length: int) -> bytes:
        """The status line and the headers, for a body of so many bytes."""
        if self.head is not None:
            return self.first + self.head
        framing = {
            "length": {"content-length": str(length)},
            "chunked": {"transfer-encoding": "chunked"},
            "close": {"connection": "close"},
        }[self.framing]
        zipped = {"content-encoding": "gzip"} if self.zipped else {}
        headers = {"content-type": self.type, **framing, **zipped, **self.headers}
        lines = [f"HTTP/1.1 {self.status} Answer", *(f"{k}: {v}" for k, v in headers.items())]
        return self.first + "\r\n".join([*lines, "", ""]).encode("latin-1")


@dataclass(frozen=True)
class Seen:
    """One request as it came in."""

    method: str
    path: str  # with its query
    headers: Mapping[str, str]
    body: bytes
    connection: int
    time: float

    @property
    def json(self) -> Any:
        """The parsed body."""
        return json.loads(self.body)


Script = Answer | Callable[[Seen], Answer]


def is_complete(answer: Answer) -> bool:
    """Whether this is a whole, well-formed 200, which one call must never get twice."""
    body = b"".join(answer.pieces())
    body = gzip.decompress(body) if answer.zipped else body
    finished = re.search(rb'"(finish|stop)_reason": ?"', body)
    cut = answer.fault and (answer.at != 1 or answer.framing != "length")
    cut = cut or (answer.framing, answer.then) == ("close", "reset")
    garbled = answer.head is not None or "content-encoding" in answer.headers
    if cut or garbled or answer.status != 200 or not finished:
        return False
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(body), dict)
    return answer.type == "text/event-stream"


# ── Server ───


class Server:
    """Plays its script, one item a request and the last one for ever, and keeps what it saw."""

    def __init__(self, script: Iterable[Script], scheme: str) -> None:
        self.script = list(script)
        self.scheme, self.port = scheme, 0
        self.requests: list[Seen] = []
        self.bought: Counter[bytes] = Counter()  # request body → complete 200s sent for it
        self.open = self.opened = self.peak = 0  # connections: now, ever, most at one time
        self.faults: list[BaseException] = []  # of this server itself

    @property
    def url(self) -> str:
        """The address, without a path."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def play(self, *script: Script) -> None:
        """Forget what was seen, and play another script from now on."""
        self.script, self.requests, self.bought = list(script), [], Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        self.opened += 1
        self.open += 1
        self.peak = max(self.peak, self.open)
        number = self.opened
        try:
            while await self._exchange(number, reader, writer):
                pass
        except (OSError, EOFError):
            pass  # the client left
        except Exception as error:
            self.faults.append(error)
        finally:
            self.open -= 1

    async def _exchange(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Read one request and play one answer; whether the connection stays."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v.strip() for k, _, v in (h.partition(":") for h in head[1:-2])}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        path = re.sub(r"^\w+://[^/]+", "", path)  # as proxies are asked
        seen = Seen(method, path, headers, body, number, time.time())
        self.requests.append(seen)
        script = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        answer = script if isinstance(script, Answer) else script(seen)
        while answer.hold is not None and not answer.hold.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        await _write(answer, reader, writer)
        self.bought[body] += is_complete(answer)
        if answer.tail:
            await asyncio.sleep(0.005)
            writer.write(answer.tail)
            await writer.drain()
        if answer.then == "reset" or answer.fault == "reset":
            _reset(writer)
        return not answer.fault and answer.framing != "close" and answer.then == "keep"


async def _write(
    answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Write an answer, up to its fault."""
    pieces = answer.pieces()
    length = sum(map(len, pieces))
    room = length if answer.at is None else int(length * answer.at)
    if not answer.fault or answer.at is not None:
        writer.write(answer.opening(length))
        for piece in pieces if room else ():
            await asyncio.sleep(answer.pause)
            cut, room = piece[:room], room - len(piece[:room])
            if cut and answer.framing == "chunked":
                cut = b"%x\r\n%s\r\n" % (len(cut), cut)
            writer.write(cut)
            await writer.drain()
        if not answer.fault and answer.framing == "chunked":
            writer.write(b"0\r\n\r\n")
        await writer.drain()
    if answer.fault == "reset":
        await asyncio.sleep(0.002)  # let what was written be read: a reset would discard it
    if answer.fault == "hang":
        await reader.read()  # until the client leaves, or the server stops


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection with RST."""
    writer.get_extra_info("socket").setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    writer.transport.abort()


@contextlib.contextmanager
def listening(serve: Serve, tls: SSLContext | None = None) -> Iterator[int]:
    """The port on loopback where a thread runs `serve` for each connection."""
    ready: Future[tuple[int, Callable[[], object]]] = Future()

    async def main() -> None:
        tasks: set[Any] = set()
        stop = asyncio.Event()

        async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.add(asyncio.current_task())
            try:
                await serve(reader, writer)
            except asyncio.CancelledError:
                writer.transport.abort()
            finally:
                tasks.discard(asyncio.current_task())
                writer.close()

        listener = await asyncio.start_server(tracked, "127.0.0.1", 0, ssl=tls, backlog=4096)
        loop = asyncio.get_running_loop()
        port = listener.sockets[0].getsockname()[1]
        ready.set_result((port, lambda: loop.call_soon_threadsafe(stop.set)))
        await stop.wait()
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    port, stop = ready.result(10)
    try:
        yield port
    finally:
        stop()
        thread.join(10)


@contextlib.contextmanager
def serving(*script: Script, tls: SSLContext | None = None) -> Iterator[Server]:
    """A running server; it fails the test if it failed itself."""
    server = Server(script or [Answer(status=404)], "https" if tls else "http")
    with listening(server.serve, tls) as server.port:
        yield server
    assert not server.faults


@contextlib.contextmanager
def proxying() -> Iterator[tuple[str, list[str]]]:
    """The URL of an HTTP proxy that takes every host for loopback, and what it was asked."""
    asked: list[str] = []

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        asked.append(f"{method} {target}")
        port = re.search(r":(\d+)", target)
        there, back = await asyncio.open_connection("127.0.0.1", int(port[1]) if port else 80)
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            back.write(head)
        try:
            await asyncio.gather(pipe(reader, back), pipe(there, writer))
        finally:
            back.close()

    with listening(serve) as port:
        yield f"http://127.0.0.1:{port}", asked


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until the condition holds."""
    with anyio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.002)


# ── The two wires ───


def openai_answer(text: str | None = "right", *, finish: str = "stop", **message: Any) -> Any:
    """A chat completion."""
    message = {"role": "assistant", "content": text, **message}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
    }


def openai_events(*texts: str, finish: str | None = "stop", usage: bool = True) -> list[Any]:
    """The events of a streamed chat completion."""
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "gpt-4o"}
    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts)]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices += [{"index": 0, "delta": {}, "finish_reason": finish}] if finish else []
    count = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    last = [{**base, "choices": [], "usage": count}] if usage else []
    return [*({**base, "choices": [choice]} for choice in choices), *last, "[DONE]"]


def anthropic_answer(text: str | None = "right", *, finish: str = "end_turn", **more: Any) -> Any:
    """A message."""
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5",
        "content": [] if text is None else [{"type": "text", "text": text}],
        "stop_reason": finish,
        "stop_sequence": None,
        "usage": {"input_tokens": 11, "output_tokens": 7},
        **more,
    }


def anthropic_events(*texts: str, finish: str | None = "end_turn", usage: bool = True) -> list[Any]:
    """The events of a streamed message."""
    start = {**anthropic_answer(None), "stop_reason": None}
    deltas = [{"type": "text_delta", "text": text} for text in texts]
    end = {"type": "message_delta", "delta": {"stop_reason": finish, "stop_sequence": None}}
    end = {**end, "usage": {"output_tokens": 7}} if usage else end
    return [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": 0},
        *([end, {"type": "message_stop"}] if finish else []),
    ]


def sse(events: Iterable[Any], end: str = "\n") -> bytes:
    """The events as bytes, each line ended by `end`."""
    lines: list[str] = []
    for event in events:
        lines += [f"event: {event['type']}"] if isinstance(event, dict) and "type" in event else []
        data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
        lines += [f"data: {data}", ""]
    return "".join(line + end for line in lines).encode()


@dataclass(frozen=True)
class Wire:
    """What the tests need to know about one wire."""

    provider: str
    id: str
    base: str  # the path of the base URL
    answer: Callable[..., Any]
    events: Callable[..., list[Any]]

    def problem(self, kind: str, message: str = "it did not work", code: Any = None) -> Any:
        """An error object."""
        if self.provider == "anthropic":
            return {"type": "error", "error": {"type": kind, "message": message}}
        return {"error": {"message": message, "type": kind, "param": None, "code": code}}

    def good(self, text: str = "right", **how: Any) -> Answer:
        """A complete answer."""
        return Answer(self.answer(text), **how)

    def stream(self, *texts: str, events: Iterable[Any] = (), **how: Any) -> Answer:
        """A complete stream of these texts, or of these events."""
        body = sse(events or self.events(*texts))
        return Answer(body, **{"type": "text/event-stream", "framing": "chunked", **how})


WIRES = {
    "openai": Wire("openai", "gpt-4o", "/v1", openai_answer, openai_events),
    "anthropic": Wire("anthropic", "claude-sonnet-4-5", "", anthropic_answer, anthropic_events),
}
