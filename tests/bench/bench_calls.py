"""What a call costs in CPU time: Ember, the libraries that do the same, and the least there can be.

    python tests/bench/bench_calls.py [--quick] [--turns N] [--peers openai,lm15]
                                      [--stream] [--cold] [--python PATH]...

A server that answers at once, or after 50 ms, is built from fakeserver.c and runs beside. In each
turn the clients run in random order, each in a process of its own. A figure is the user and system
time of that process over the calls that follow a first round, which opens the connections: the
median of the turns, then the least and the most. Ratios are those of the same turn, to `floor`, an
asyncio protocol written by hand that provides for no fault, and to lm15. Beside it: the connections
that the server accepted, the most calls it had in flight, and the resident size at the end.

Then the same for each piece of a stream, and for a fresh interpreter's first answer. --stream and
--cold print these tables only. --peers names the other libraries that run, --python interpreters
that have them: each client runs in the first that has what it imports, this one before all.
"""

import argparse
import asyncio
import json
import operator
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, NamedTuple

from calling import JSON, ROOT, Call, Server, in_a_child, megabytes, run, serving

PROMPT = "Say which of these words is a river, and why. " * 11  # some 500 characters
CELLS = ((1, 0, 3000), (32, 0, 8000), (256, 50, 8000), (1000, 50, 10_000))  # at once, ms, calls
STREAMS = ((0, 20), (1, 2))  # ms between two pieces, streams
PIECES, SECONDS = 1000, 4  # of a stream; after so many no further call is begun

# ── The clients ───


def asked(prompt: str) -> JSON:
    """The body of a request."""
    return {"model": "gpt-4.1", "messages": [{"role": "user", "content": prompt}]}


class Connection(asyncio.Protocol):
    """The least there can be: HTTP/1.1 by hand, and nothing provided for."""

    def __init__(self, host: str) -> None:
        self.head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer x"
        self.head += "\r\nContent-Type: application/json\r\nContent-Length: "
        self.streams, self.data = False, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def send(self, body: JSON) -> asyncio.Future[Any]:
        """A future of the answer; of the next bytes, if it is to be a stream."""
        text = json.dumps(body)
        self.transport.write(f"{self.head}{len(text)}\r\n\r\n{text}".encode())
        self.came = asyncio.get_running_loop().create_future()
        return self.came

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self.streams:
            if not self.came.done():
                self.came.set_result(None)
            return
        head, found, body = self.data.partition(b"\r\n\r\n")
        if found and len(body) >= int(head.partition(b"Content-Length: ")[2].partition(b"\r")[0]):
            self.data = b""
            self.came.set_result(json.loads(body))

    async def more(self) -> None:
        await self.came
        self.came = asyncio.get_running_loop().create_future()

    async def pieces(self) -> AsyncGenerator[str]:
        """The pieces of the stream that was asked for. It is taken that each event is a chunk."""
        while b"\r\n\r\n" not in self.data:
            await self.more()
        at = self.data.index(b"\r\n\r\n") + 4
        while True:
            while (end := self.data.find(b"\r\n", at)) > 0:
                start, stop = end + 2, end + 2 + int(self.data[at:end], 16)
                if len(self.data) < stop + 2:
                    break
                at = stop + 2
                if self.data.startswith(b"data: {", start):
                    choices = json.loads(self.data[start + 6 : stop])["choices"]
                    if choices and (piece := choices[0]["delta"].get("content")):
                        yield piece
                elif start == stop:
                    self.data = b""
                    return
            self.data, at = self.data[at:], 0
            await self.more()


async def connected(url: str) -> Connection:
    """A new connection to the server."""
    host, port = url.split("/")[2].split(":")
    loop = asyncio.get_running_loop()
    return (await loop.create_connection(lambda: Connection(host), host, int(port)))[1]


@asynccontextmanager
async def floor(url: str) -> AsyncGenerator[Call]:
    idle = list[Connection]()

    async def call(prompt: str) -> Any:
        connection = idle.pop() if idle else await connected(url)
        answer = await connection.send(asked(prompt))
        idle.append(connection)
        return answer["choices"][0]["message"]["content"]

    yield call
    for connection in idle:
        connection.transport.close()


@asynccontextmanager
async def ember(url: str) -> AsyncGenerator[Call]:
    from ember import models

    async def call(prompt: str) -> Any:
        return (await models.gpt4(prompt)).text

    yield call


@asynccontextmanager
async def httpx(url: str) -> AsyncGenerator[Call]:
    from httpx import AsyncClient, Limits

    limits = Limits(max_connections=None, max_keepalive_connections=None)
    async with AsyncClient(limits=limits, timeout=None) as client:

        async def call(prompt: str) -> Any:
            headers = {"Authorization": "Bearer x"}
            response = await client.post(
                f"{url}/chat/completions", json=asked(prompt), headers=headers
            )
            return response.json()["choices"][0]["message"]["content"]

        yield call


@asynccontextmanager
async def openai(url: str) -> AsyncGenerator[Call]:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="x") as client:

        async def call(prompt: str) -> Any:
            answer = await client.chat.completions.create(**asked(prompt))
            return answer.choices[0].message.content

        yield call


@asynccontextmanager
async def litellm(url: str) -> AsyncGenerator[Call]:
    from litellm import acompletion

    async def call(prompt: str) -> Any:
        model = {"model": "openai/gpt-4.1", "api_base": url, "api_key": "x"}
        return (await acompletion(**asked(prompt) | model)).choices[0].message.content

    yield call


@asynccontextmanager
async def lm15(url: str) -> AsyncGenerator[Call]:
    from lm15 import AsyncOpenAIChatLM, Message, Request

    client = AsyncOpenAIChatLM(api_key="x", base_url=url)

    async def call(prompt: str) -> Any:
        request = Request(model="gpt-4.1", messages=(Message.user(prompt),))
        return (await client.complete(request)).text

    yield call


async def floor_stream(url: str) -> AsyncGenerator[str]:
    """The pieces of a stream, on a new connection."""
    connection = await connected(url)
    connection.streams = True
    connection.send(asked(PROMPT) | {"stream": True, "stream_options": {"include_usage": True}})
    async for piece in connection.pieces():
        yield piece
    connection.transport.close()


async def ember_stream(url: str) -> AsyncGenerator[str]:
    from ember import models

    async with models.gpt4.stream(PROMPT) as pieces:
        async for piece in pieces:
            yield piece


class Client(NamedTuple):
    """What it imports, how it calls, how it streams if that is measured.

    It runs `without` a module as if that were not installed.
    """

    needs: tuple[str, ...]
    open: Callable[[str], AbstractAsyncContextManager[Call]]
    stream: Callable[[str], AsyncGenerator[str]] | None = None
    without: str = ""


CLIENTS = {
    "floor": Client((), floor, floor_stream),
    "ember": Client(("ember", "httptools"), ember, ember_stream),
    "ember without httptools": Client(("ember",), ember, ember_stream, "httptools"),
    "httpx": Client(("httpx",), httpx),
    "openai": Client(("openai",), openai),
    "litellm": Client(("litellm",), litellm),
    "lm15": Client(("lm15",), lm15),
}

# ── In the process of a client ───


async def calls(client: Client, url: str, at_once: int, number: int, seconds: float) -> JSON:
    """What its calls cost."""
    async with client.open(url) as call:
        await run(call, PROMPT, at_once, max(at_once, 50))  # opens the connections
        count, cpu = await run(call, PROMPT, at_once, number, seconds)
        return {"cost": 1e6 * cpu / count, "mb": megabytes()}


async def pieces(client: Client, url: str, at_once: int, number: int, seconds: float) -> JSON:
    """What each piece of its streams costs."""

    stream = client.stream
    assert stream

    async def read() -> int:
        async with aclosing(stream(url)) as received:
            return len([piece async for piece in received])

    for _ in range(2):
        await read()
    started = time.process_time()
    count = sum([await read() for _ in range(number)])
    assert count == number * PIECES
    return {"cost": 1e6 * (time.process_time() - started) / count, "mb": megabytes()}


def child(what: str, name: str, url: str, at_once: str, number: str, seconds: str) -> None:
    """Print what the client costs."""
    client = CLIENTS[name]
    modules: dict[str, Any] = sys.modules
    if client.without:
        modules[client.without] = None
    measure = {"calls": calls, "pieces": pieces}[what]
    said = asyncio.run(measure(client, url, int(at_once), int(number), float(seconds)))
    print("\n" + json.dumps(said))


# ── All clients in turns ───


def environment(server: Server) -> dict[str, str]:
    """The key and the base URL as all of the libraries read them."""
    return {
        "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "x", "PYTHONPATH": str(ROOT),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else its import asks the network
    }  # fmt: skip


def found(names: Sequence[str], pythons: Sequence[str]) -> dict[str, str]:
    """The interpreter for each client. Those that have none are printed, and the versions."""
    program = (
        "import importlib.metadata as m, json, sys\nfor name in sys.argv[1:]: __import__(name)\n"
        "print(json.dumps({n: m.version(n) for n in sys.argv[1:] if n != 'ember'}))"
    )
    chosen, versions, missing = dict[str, str](), dict[str, str](), list[str]()
    env = {"PYTHONPATH": str(ROOT), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    for name in names:
        for python in (sys.executable, *pythons):
            answer = in_a_child(python, "-c", program, *CLIENTS[name].needs, env=env)
            if "failed" not in answer:
                chosen[name] = python
                versions |= answer
                break
        else:
            missing.append(f"{name} ({' or '.join(CLIENTS[name].needs)})")
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"CPython {platform.python_version()}, {os.cpu_count()} cores; {shown or 'no libraries'}")
    if missing:
        print(f"Missing, as no interpreter can import it: {', '.join(missing)}")
    return chosen


def in_turns(
    what: str, names: dict[str, str], server: Server, turns: int, at_once: int, ms: float,
    number: int, seconds: float,
) -> list[dict[str, JSON]]:  # fmt: skip
    """What each client said, in each turn."""
    said = list[dict[str, JSON]]()
    for _ in range(turns):
        said.append({})
        for name in random.sample(list(names), len(names)):
            server.set(*((ms, 0) if what == "calls" else (0, ms)))
            args = ("--child", what, name, server.url, at_once, number, seconds)
            answer = in_a_child(names[name], __file__, *args, env=environment(server))
            said[-1][name] = answer | server.counts()
    return said


def ratio(said: list[dict[str, JSON]], name: str, base: str) -> str:
    """The cost of one by that of another: the median of the turns in which both ran."""
    costs = [[turn.get(n, {}).get("cost") for n in (name, base)] for turn in said]
    ratios = [cost / other for cost, other in costs if cost and other]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def show(title: str, names: Sequence[str], said: list[dict[str, JSON]]) -> None:
    """Print one table."""
    print(f"\n{title}\n{'':25}   CPU µs    least     most  x floor   x lm15   conns    most     MB")
    for name in names:
        good = [turn[name] for turn in said if "cost" in turn[name]]
        for turn in said[: not good]:
            print(f"  {name:<23} failed: {turn[name]['failed'][:90]}")
        if not good:
            continue
        costs = [answer["cost"] for answer in good]
        line = "".join(f"{f(costs):9.1f}" for f in (statistics.median, min, max))
        line += "".join(f"{ratio(said, name, base):>9}" for base in ("floor", "lm15"))
        for key in ("connections", "most", "mb"):
            line += f"{statistics.median(answer[key] for answer in good):8.0f}"
        failed = f"  ({len(said) - len(good)} failed)" if len(good) < len(said) else ""
        print(f"  {name:<23}{line}{failed}", flush=True)


def compare_calls(server: Server, names: dict[str, str], turns: int, share: float) -> None:
    """A table for each number of calls at once."""
    for at_once, ms, count in CELLS:
        number = max(at_once, int(count * share))
        said = in_turns("calls", names, server, turns, at_once, ms, number, SECONDS * share)
        title = f"{at_once:,} at once, answered after {ms} ms: a call, median of {turns} turns"
        show(title, list(names), said)
        if at_once == 32:
            floors = [turn["floor"] for turn in said]
            own = statistics.median(floor["cpu"] / floor["requests"] for floor in floors)
            print(f"  (the server: {1e6 * own:.1f} µs a call of floor, so {1 / own:,.0f} a second)")


def compare_streams(server: Server, names: dict[str, str], turns: int) -> None:
    """A table for pieces that come together, and one for pieces that come each by itself."""
    names = {name: python for name, python in names.items() if CLIENTS[name].stream}
    for ms, number in STREAMS:
        said = in_turns("pieces", names, server, turns, 1, ms, number, 0)
        how = f"every {ms} ms, in packets of their own" if ms else "back to back"
        show(f"a stream's {PIECES:,} pieces {how}: each piece", list(names), said)


# ── Cold start ───

HTTPX = f"""
import asyncio, httpx
async def main():
    async with httpx.AsyncClient(base_url="{{url}}") as client:
        response = await client.post("/chat/completions", json={asked("Name three rivers")})
        assert response.json()["choices"][0]["message"]["content"]
asyncio.run(main())"""
EMBER = """
import asyncio, ember
async def main():
    assert (await ember.models.gpt4("Name three rivers")).text
asyncio.run(main())"""
WITHOUT = "import sys\nsys.modules['httptools'] = None" + EMBER
PROGRAMS = {
    "bare python": "", "httpx": HTTPX, "ember": EMBER, "ember without httptools": WITHOUT,
}  # fmt: skip


def cpu_milliseconds(python: str, program: str, env: dict[str, str]) -> float:
    """User and system time of a fresh interpreter that runs it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([python, "-c", program], env=env, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def compare_cold(server: Server, names: dict[str, str], turns: int) -> None:
    """From a fresh interpreter to the first answer."""
    programs = {n: p.replace("{url}", server.url) for n, p in PROGRAMS.items()
                if n in {"bare python", *names}}  # fmt: skip
    server.set(0)
    with tempfile.TemporaryDirectory() as bytecode:
        env = os.environ | environment(server)
        env |= {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
        times = {name: list[float]() for name in programs}
        for turn in range(turns + 1):  # the first fills the cache of bytecode
            for name in random.sample(list(programs), len(programs)):
                ms = cpu_milliseconds(names.get(name, sys.executable), programs[name], env)
                times[name] += [ms] * (turn > 0)
    print(f"\nfrom a fresh interpreter to the first answer, median of {turns} turns")
    print(f"{'':25}   CPU ms    least     most   above httpx")
    for name, taken in times.items():
        line = "".join(f"{f(taken):9.1f}" for f in (statistics.median, min, max))
        if "httpx" in times:
            above = map(operator.sub, taken, times["httpx"])
            line += f"{statistics.median(above):+14.1f}"
        print(f"  {name:<23}{line}")


def main() -> None:
    """The tables that were asked for."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--quick", action="store_true", help="two turns, a quarter of the calls")
    parser.add_argument("--turns", type=int, default=0, help="5 unless told")
    parser.add_argument("--peers", default="httpx,openai,litellm,lm15", help="separated by commas")
    parser.add_argument("--stream", action="store_true", help="the streams only")
    parser.add_argument("--cold", action="store_true", help="the cold start only")
    parser.add_argument("--python", action="append", default=[], help="another interpreter")
    given = parser.parse_args()
    wanted = {"floor", "ember", "ember without httptools", *given.peers.split(",")}
    turns, every = given.turns or (2 if given.quick else 5), not given.stream and not given.cold
    names = found([name for name in CLIENTS if name in wanted], given.python)
    with serving(PIECES) as server:
        print(f"The server: {server.kind}", flush=True)
        if every:
            compare_calls(server, names, turns, 0.25 if given.quick else 1)
        if every or given.stream:
            compare_streams(server, names, turns)
        if every or given.cold:
            compare_cold(server, names, max(turns, 3 if given.quick else 7))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
