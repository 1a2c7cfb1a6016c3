"""Where a request goes, for the fast transport: its place, its head, a socket to its address."""

from __future__ import annotations

import asyncio
import functools
import re
import socket
from typing import Any, NamedTuple

import httpx


class Place(NamedTuple):
    """Where a URL leads, and the first line of a request to it."""

    host: str
    port: int
    is_number: bool
    named: str
    origin: str
    line: str


@functools.lru_cache(256)
def place_of(text: str) -> Place:
    """The place of a URL.

    >>> place_of("https://api.openai.com/v1/chat/completions").port
    443
    """
    url = httpx.URL(text)
    host, named = url.raw_host.decode(), url.netloc.decode()
    port = {"http": 80, "https": 443}[url.scheme] if url.port is None else url.port
    is_number = bool(re.fullmatch(r"[\d.]+|.*:.*", host))
    line = f"POST {url.raw_path.decode()} HTTP/1.1\r\n"
    return Place(host, port, is_number, named, f"{url.scheme}://{named}", line)


@functools.lru_cache(256)
def _name(name: str) -> str:
    """A header's name in lower case; RFC 9110, section 5.1, says what it is made of."""
    if not re.fullmatch(r"[!#$%&'*+.^`|~\w-]+", name, re.ASCII):
        raise httpx.LocalProtocolError(f"Illegal header name {name!r:.40}")
    return name.lower()


def head(place: Place, headers: dict[str, str], size: int) -> bytes:
    """The head of a POST with a body of `size` bytes; the headers may say another host.

    What would end a line early is httpx.LocalProtocolError, as it is in httpx.
    """
    named = {"host": place.named} | {_name(name): value for name, value in headers.items()}
    named["content-length"] = str(size)
    named.pop("transfer-encoding", None)
    if not "".join(named.values()).replace("\t", "").isprintable():
        bad = next(name for name, value in named.items() if not value.isprintable())
        raise httpx.LocalProtocolError(f"Illegal header value of {bad!r}")
    lines = "".join([f"{name}: {value}\r\n" for name, value in named.items()])
    return f"{place.line}{lines}\r\n".encode("ascii")


async def connected(place: Place) -> socket.socket:
    """Connected to the first address of a name that takes it, each 250 ms after the one before.

    So does RFC 8305. asyncio's own way leaves a socket behind where it is cancelled (3.11).
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    tasks, won = list[asyncio.Task[socket.socket]](), None
    try:
        while not won:
            if len(tasks) < len(found):
                tasks.append(loop.create_task(_try(*found[len(tasks)])))
            elif all(task.done() for task in tasks):
                return tasks[-1].result()  # raises why not
            pause = 0.25 if len(tasks) < len(found) else None
            if waiting := [task for task in tasks if not task.done()]:  # eager ones may be done
                await asyncio.wait(waiting, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            won = next((task for task in tasks if task.done() and not task.exception()), None)
        return won.result()
    finally:
        for task in tasks:
            if task is not won:
                task.cancel()
                task.add_done_callback(_drop)


async def _try(family: int, kind: int, protocol: int, _: str, address: Any) -> socket.socket:
    """A socket that is connected to an address."""
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _drop(task: asyncio.Task[socket.socket]) -> None:
    """Close the socket of an attempt that is not needed any more."""
    if not task.cancelled() and not task.exception():
        task.result().close()
