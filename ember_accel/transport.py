"""The fast transport: HTTP/1.1 over asyncio, parsed by httptools, connections last-in first-out.

`ember.py` takes it on asyncio, plain or over TLS, without a proxy, where httptools is installed;
httpcore does the rest, at some five times the CPU. A call is one write, one parser that stays
with its connection, and one future: nothing here waits but for bytes, and until a given time.

A request is sent once. What the network does wrong has the names that httpx gives it.
"""

from __future__ import annotations

import asyncio
import contextvars
import select
from collections import deque
from typing import Any

import httpx
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from ember_accel.connecting import Place, connected, head, place_of

if not hasattr(HttpResponseParser, "set_dangerous_leniencies"):
    raise ImportError("httptools is older than 0.6.4")  # Ember goes over httpcore then

# h11 takes these as well; an answer that is refused is paid for all the same.
_LENIENT = {
    "lenient_chunked_length": True, "lenient_optional_cr_before_lf": True,
    "lenient_spaces_after_chunk_size": True,
}  # fmt: skip
_IDLE_SECONDS = 60
_PAUSE = 1 << 20  # bytes of a body that wait for their reader; after that the server waits
_OVERHEAD = 100 << 10  # bytes without one of a body: a head or a trailer that does not end


def _text(raw: bytes) -> str:
    """The text of a header: UTF-8, or else latin-1."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


class Response:
    """One answer, as far as it has come: its connection writes into it, Ember reads from it.

    Of a `whole` one of status 2xx nobody is told before its end, or 1 MB of it.
    """

    __slots__ = (
        "buffered", "connection", "ended", "fault", "keep", "paused", "pieces", "raw",
        "status_code", "timer", "waiter", "whole",
    )  # fmt: skip

    def __init__(self, connection: Connection, whole: bool) -> None:
        self.connection, self.whole, self.status_code = connection, whole, 0
        self.raw: list[tuple[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.buffered, self.paused, self.ended, self.keep = 0, False, False, False
        self.fault: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers, their names in lower case; one that came twice has both values."""
        headers: dict[str, str] = {}
        for name, value in self.raw:
            key, text = _text(name).lower(), _text(value).strip(" \t")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        return headers

    @property
    def coding(self) -> str:
        """How the body is encoded; "" if nothing says so."""
        named = any(name.lower() == b"content-encoding" for name, _ in self.raw)
        return self.headers["content-encoding"] if named else ""

    def news(self, limit: float) -> asyncio.Future[None]:
        """A future that is done when more has come, or at `limit`."""
        loop = self.connection.loop
        self.waiter = loop.create_future()
        self.timer = loop.call_at(limit, self.wake, context=self.connection.context)
        return self.waiter

    def wake(self) -> None:
        """End the wait for news."""
        waiter, self.waiter = self.waiter, None
        if waiter and not waiter.done():
            waiter.set_result(None)
        if self.timer:
            self.timer.cancel()
            self.timer = None

    def fail(self, fault: Exception) -> None:
        """End the answer by a fault, unless it has ended; the connection is of no more use."""
        self.keep = False
        if not (self.ended or self.fault):
            self.fault = fault
            self.connection.abort()
            self.wake()

    def is_ready(self) -> bool:
        """Whether Ember can begin to read; a fault before the head is raised."""
        if self.fault and not self.status_code:
            raise self.fault
        over = self.ended or self.fault is not None or self.paused
        return over or (self.status_code > 0 and not self.whole)

    async def read(self, limit: float) -> bytes | None:
        """What has arrived, or else what arrives first; b"" at the end.

        None at `limit`, for an answer without an end too, unless all of it has come by then.
        """
        if not (self.pieces or self.ended or self.fault):
            await self.news(limit)
        if self.pieces and (self.ended or self.connection.loop.time() < limit):
            pieces, self.pieces, self.buffered = self.pieces, [], 0
            if self.paused:
                self.paused = False
                self.connection.resume()
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if self.fault and not self.pieces:
            raise self.fault
        return b"" if self.ended else None

    async def aclose(self) -> None:
        """Give the connection back if the answer was whole and the server keeps it, else end it."""
        self.wake()
        self.connection.done(reusable=self.ended and self.keep and not self.paused)


class Connection(asyncio.BufferedProtocol):
    """One connection, for one answer at a time. httptools calls the `on_…`, asyncio the rest."""

    def __init__(self, loop: asyncio.AbstractEventLoop, idle: deque[Connection], view: memoryview):
        self.loop, self._idle, self._view = loop, idle, view
        self.context = contextvars.copy_context()  # of timers, or each would copy one
        self._idle_since, self._overhead = 0.0, 0
        self._raw: list[tuple[bytes, bytes]] = []
        self._transport: Any = None
        self._parser: Any = HttpResponseParser(self)
        self._response: Response | None = None
        self._parser.set_dangerous_leniencies(**_LENIENT)

    def ask(self, request: bytes, whole: bool) -> Response:
        """The answer to a request, which is on its way."""
        self._response, self._overhead, self._raw = Response(self, whole), 0, []
        self._transport.write(request)
        return self._response

    def done(self, *, reusable: bool) -> None:
        """Go back among the idle ones, or end."""
        self._response = None
        unsent = self._transport.get_write_buffer_size()  # the server may answer before it reads
        if reusable and not unsent and not self._transport.is_closing():
            self._idle_since = self.loop.time()
            self._idle.append(self)
        else:
            self.abort()

    def is_over(self) -> bool:
        """Whether it was closed, or was idle for too long."""
        late = self.loop.time() > self._idle_since + _IDLE_SECONDS
        return late or self._transport.is_closing()

    def is_usable(self) -> bool:
        """Whether the server still keeps it. A look at the socket tells what the loop has not."""
        return not (self.is_over() or _is_readable(self._transport.get_extra_info("socket")))

    def abort(self) -> None:
        """Close it at once."""
        self._transport.abort()

    def resume(self) -> None:
        """Go on reading."""
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hear that it is there."""
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where bytes go: one place for all, read before the loop does anything else."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Hear of bytes."""
        response, self._overhead = self._response, self._overhead + nbytes
        if response is None or response.fault:
            self.abort()  # bytes that answer nothing: the next answer could not be told from them
            return
        try:
            self._parser.feed_data(self._view[:nbytes])
        except HttpParserUpgrade:
            response.fail(httpx.RemoteProtocolError("the server changes the protocol"))
        except HttpParserError as error:
            response.fail(httpx.RemoteProtocolError(str(error)))
        if self._overhead > _OVERHEAD:
            response.fail(httpx.RemoteProtocolError("over 100 KB without a byte of the answer"))

    def eof_received(self) -> None:
        """Hear that the server has said all: the connection is of no use any more."""
        self.connection_lost(None)
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Hear that it was closed, or broke."""
        response, self._response, self._parser = self._response, None, None
        if response is None:
            return
        if exc:
            response.fail(httpx.ReadError(str(exc)))
        elif not response.status_code:
            response.fail(httpx.RemoteProtocolError("the server sent no response"))
        elif response.headers.keys() & {"content-length", "transfer-encoding"}:
            response.fail(httpx.RemoteProtocolError("the server sent a part of the response"))
        else:  # the end of the connection is that of the answer
            response.ended = True
            response.wake()

    def on_message_begin(self) -> None:
        """Hear that a message begins."""
        if self._response and self._response.ended:
            self._response.keep = False  # more than one answer to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        """Hear of a header, or of a trailer."""
        self._raw.append((name, value))

    def on_headers_complete(self) -> None:
        """Hear that the head is whole."""
        response, status = self._response, self._parser.get_status_code()
        if response is None or response.ended:
            return
        raw, self._raw = self._raw, []  # a trailer goes where nobody looks
        if status < 200:  # the answer is still to come
            if status < 100:
                response.fail(httpx.RemoteProtocolError(f"there is no status {status}"))
            return
        response.raw, response.status_code = raw, status
        response.keep = self._parser.should_keep_alive()
        response.whole = response.whole and status < 300
        if not response.whole:
            response.wake()

    def on_body(self, piece: bytes) -> None:
        """Hear of a piece of the body."""
        response, self._overhead = self._response, 0
        if response is None or response.ended:
            return
        response.pieces.append(piece)
        response.buffered += len(piece)
        if response.buffered > _PAUSE and not response.paused:
            response.paused = True
            self._transport.pause_reading()
        if response.waiter and (response.paused or not response.whole):
            response.wake()

    def on_message_complete(self) -> None:
        """Hear that a message is whole."""
        if self._response and self._response.status_code:  # else it was of status 1xx
            self._response.ended = True
            self._response.wake()


def _is_readable(sock: Any) -> bool:
    """Whether something waits to be read: on an idle connection that is its end."""
    if not hasattr(select, "poll"):
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class Pool:
    """The idle connections of one event loop, by origin."""

    def __init__(self) -> None:
        self.idle: dict[str, deque[Connection]] = {}
        self._view = memoryview(bytearray(1 << 16))

    async def send(
        self, url: str, headers: dict[str, str], content: bytes, *, tls: Any,
        connect: float | None, limit: float, whole: bool, notes: Any,
    ) -> Response | None:  # fmt: skip
        """The answer to a POST once its head has come, a `whole` one of status 2xx once all has.

        None if that was not by `limit`, in the time of the loop. While a connection is made,
        within `connect` seconds, `notes.connecting` is set. Raises httpx's errors of transport.
        """
        place = place_of(url)
        request = head(place, headers, len(content)) + content
        idle = self.idle.setdefault(place.origin, deque())
        connection = _kept(idle)
        if connection is None:
            notes.connecting = True
            connection = await self._opened(place, idle, tls, connect, limit)
            if connection is None:
                return None
            notes.connecting = False
        response = connection.ask(request, whole)
        try:
            await response.news(limit)
            if response.is_ready():
                return response
        except BaseException:
            await response.aclose()
            raise
        await response.aclose()
        return None

    async def _opened(
        self, place: Place, idle: deque[Connection], tls: Any, connect: float | None, limit: float
    ) -> Connection | None:
        """A new connection; None if there was none by `limit`."""
        loop = asyncio.get_running_loop()
        until = limit if connect is None else min(limit, loop.time() + connect)
        how: dict[str, Any] = {"ssl": tls, "host": place.host, "port": place.port}
        if tls:
            tls.set_alpn_protocols(["http/1.1"])
        timeout = asyncio.timeout_at(until)
        try:
            async with timeout:
                if not place.is_number:
                    name, how["host"] = place.host if tls else None, None
                    how |= {"port": None, "server_hostname": name, "sock": await connected(place)}
                _, connection = await loop.create_connection(
                    lambda: Connection(loop, idle, self._view), **how
                )
        except (OSError, UnicodeError) as error:  # the latter: no name of a host
            if not timeout.expired():
                raise httpx.ConnectError(str(error)) from error
            if until < limit:
                raise httpx.ConnectTimeout(f"no connection within connect={connect} s") from None
            return None
        return connection

    async def aclose(self) -> None:
        """End the idle connections."""
        for connection in [one for idle in self.idle.values() for one in idle]:
            connection.abort()
        self.idle.clear()
        await asyncio.sleep(0)  # the loop closes their sockets in its next turn


def _kept(idle: deque[Connection]) -> Connection | None:
    """The idle connection that was used last, of those that their server keeps."""
    if idle and idle[0].is_over():  # what a burst has left is closed one at a time
        idle.popleft().abort()
    while idle:
        connection = idle.pop()
        if connection.is_usable():
            return connection
        connection.abort()
    return None
