"""How Ember's calls scale: CPU time and memory of a call, from one at once to 10,000.

    python tests/bench/bench_scale.py [--quick] [--turns N] [--plot PATH]

A server that answers after 50 ms is built from fakeserver.c and runs beside; later where it takes
longer to begin all calls, and at once where there is one at a time. Each row is the median of
processes of their own. The memory is what the resident size grows by while the first calls are all
in flight, each with a prompt of 1 KB and a new connection; the CPU is that of the calls that
follow. Then: the growth over 100,000 calls in a row, the size of an idle connection, and on paper,
from these figures, what a process, a machine and a cluster reach. The plot is an SVG or a PNG by
matplotlib, or else bars of characters.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import platform
import resource
import ssl
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from calling import JSON, ROOT, Call, Control, Server, in_a_child, megabytes, run, serving, whole

SCALES = (  # at once, ms until the answer while the size is taken, ms later, calls
    (1, 50, 0, 2000), (10, 50, 50, 4000), (100, 50, 50, 6000), (1000, 1000, 50, 10_000),
    (3000, 4000, 200, 15_000), (10_000, 15_000, 1000, 30_000),
)  # fmt: skip
PROMPT = "Say which of these words is a river, and why. " * 22  # some 1 KB
LONG, FIRST = 100_000, 10_000  # calls in a row, and how many of them come before the size is taken
IDLE = 200  # connections
SPARE = 200  # file descriptors for all but the connections

# ── In a process of its own ───


def model() -> Call:
    """A model whose provider takes as many connections as there are calls."""
    sys.path.insert(0, str(ROOT))
    import ember

    row = dataclasses.replace(ember.providers["openai"], connections=20_000)
    gpt4 = ember.model("openai:gpt-4.1", provider=row, timeout=300, connect=60, retries=0)
    numbers = iter(range(1 << 40))

    async def call(prompt: str) -> str:
        return (await gpt4(f"{next(numbers)} {prompt}")).text  # no two share the memory of one

    return call


async def largest(sizes: list[float]) -> None:
    """Note the resident size, over and over."""
    while True:
        sizes.append(megabytes())
        await asyncio.sleep(0.05)


async def scale(port: int, at_once: int, wait: float, ms: float, number: int) -> JSON:
    """KB of a call while so many are in flight, then CPU µs of a call."""
    server, call = Control(port), model()
    server.set(0)
    await run(call, PROMPT, 1, 20)
    server.set(wait)
    sizes = [megabytes()]
    watching = asyncio.create_task(largest(sizes))
    await run(call, PROMPT, at_once, at_once)
    watching.cancel()
    first = server.counts()
    server.set(ms)
    count, cpu = await run(call, PROMPT, at_once, max(number, at_once))
    kb = 1024 * (max(sizes) - sizes[0]) / at_once
    opened = first["connections"] + server.counts()["connections"]
    return {"us": 1e6 * cpu / count, "kb": kb, "most": first["most"], "opened": opened}


async def long(first: int, number: int) -> JSON:
    """MB that the resident size has grown by after so many calls, ten times."""
    call, sizes = model(), list[float]()
    await run(call, PROMPT, 32, first)
    start = megabytes()
    for _ in range(10):
        await run(call, PROMPT, 32, number // 10)
        sizes.append(megabytes() - start)
    return {"grown": sizes}


async def idle(count: int) -> JSON:
    """KB of an idle connection."""
    call = model()
    await run(call, PROMPT, 1, 5)
    before = megabytes()
    await run(call, PROMPT, count, count)
    await asyncio.sleep(0.05)
    return {"kb": 1024 * (megabytes() - before) / (count - 1)}


async def serve_tls(certificate: str) -> None:
    """A server on TLS. Once it has more than one connection, it answers when all of them are made.

    It ends when standard input does.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    choice = {"message": {"role": "assistant", "content": "Yes"}, "finish_reason": "stop"}
    answer, opened = whole({"choices": [choice], "usage": {}}), list[None]()

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(None)
        with contextlib.suppress(OSError, EOFError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = head.lower().partition(b"content-length:")[2].split()[0]
                await reader.readexactly(int(size))
                await asyncio.sleep(2 if len(opened) > 1 else 0)
                writer.write(answer)
        writer.close()

    server = await asyncio.start_server(answers, "127.0.0.1", 0, ssl=context, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


def child(what: str, *args: str) -> None:
    """Print what was measured."""
    if what == "tls":
        asyncio.run(serve_tls(*args))
        return
    measure: Any = {"scale": scale, "long": long, "idle": idle}[what]
    print(json.dumps(asyncio.run(measure(*map(int, args)))))


# ── Measuring ───


def environment(url: str, **more: str) -> dict[str, str]:
    """The key and the base URL."""
    return {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "x", **more}


def measured(url: str, *args: Any, **env: str) -> JSON:
    """What a process of its own says."""
    said = in_a_child(sys.executable, __file__, "--child", *args, env=environment(url, **env))
    if "failed" in said:
        print(f"  {' '.join(map(str, args))} failed: {said['failed']}")
    return said


def files() -> int:
    """How many file descriptors a process may have: the soft limit, raised to the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    hard = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def compare_scales(server: Server, turns: int, share: float) -> list[tuple[int, float, float]]:
    """The table; for each row: how many at once, CPU µs, KB."""
    rows = list[tuple[int, float, float]]()
    print(f"\n{'at once':>8}   CPU µs    least     most  KB a call  most in flight  connections")
    for at_once, wait, ms, number in SCALES:
        if at_once > files() - SPARE:
            print(f"{at_once:8,}  does not fit: a process may have {files():,} file descriptors")
            continue
        count = max(at_once, int(number * share))
        args = ("scale", server.port, at_once, wait, ms, count)
        said = [one for _ in range(turns) if "us" in (one := measured(server.url, *args))]
        if not said:
            continue
        us, kb, most, opened = (
            statistics.median(one[key] for one in said) for key in ("us", "kb", "most", "opened")
        )
        costs = [one["us"] for one in said]
        shown = f"{kb:11.1f}" if at_once >= 100 else f"{'-':>11}"  # less is lost in the noise
        line = f"{at_once:8,}{us:9.1f}{min(costs):9.1f}{max(costs):9.1f}{shown}"
        print(f"{line}{most:16,.0f}{opened:13,.0f}", flush=True)
        rows.append((at_once, us, kb if at_once >= 100 else math.nan))
    return rows


def show_long(server: Server, first: int, number: int) -> None:
    """Whether the size stays as it is."""
    server.set(0)
    if grown := measured(server.url, "long", first, number).get("grown"):
        line = " ".join(f"{mb:+.2f}" for mb in grown)
        print(f"\n{number:,} calls in a row, 32 at once: the resident size after each tenth, in MB")
        print(f"above what it was after the {first:,} calls before them: {line}")


def show_idle(server: Server) -> None:
    """The size of an idle connection, plain and over TLS."""
    print(f"\nan idle connection, of {IDLE}:", flush=True)
    server.set(1000)
    if kb := measured(server.url, "idle", IDLE).get("kb"):
        print(f"  plain HTTP {kb:7.1f} KB")
    try:
        import trustme
    except ImportError:
        print("  over TLS: not measured, for trustme is not installed")
        return
    authority = trustme.CA()
    with tempfile.TemporaryDirectory() as folder:
        trusted, own = Path(folder, "trusted.pem"), Path(folder, "own.pem")
        authority.cert_pem.write_to_path(trusted)
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(own)
        command = [sys.executable, __file__, "--child", "tls", str(own)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdout
            url = f"https://localhost:{process.stdout.readline().strip()}/v1"
            if kb := measured(url, "idle", IDLE, SSL_CERT_FILE=str(trusted)).get("kb"):
                print(f"  over TLS   {kb:7.1f} KB")
            process.communicate()  # closes its input


# ── The plot ───


def plot(rows: list[tuple[int, float, float]], path: str) -> None:
    """Both curves, as a picture if there is a path and matplotlib, else as bars."""
    if not path or not importlib.util.find_spec("matplotlib"):
        bars(rows)
        return
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    at_once, us, kb = zip(*rows, strict=True)
    left.plot(at_once, us, "o-", color="tab:blue")
    right.plot(at_once, kb, "s--", color="tab:orange")
    left.set(xscale="log", ylim=(0, 1.1 * max(us)), xlabel="calls in flight")
    right.set_ylim(0)
    left.set_ylabel("CPU of a call in µs", color="tab:blue")
    right.set_ylabel("resident size of a call in KB", color="tab:orange")
    left.set_title("What a call costs Ember")
    figure.savefig(path)
    print(f"\nThe plot is in {path}")


def bars(rows: list[tuple[int, float, float]]) -> None:
    """The curves as lines of characters."""
    for title, column in (("CPU µs of a call", 1), ("KB of a call", 2)):
        print(f"\n{title}, by the number in flight")
        values = {row[0]: row[column] for row in rows if not math.isnan(row[column])}
        for at_once, value in values.items():
            width = round(50 * value / max(values.values()))
            print(f"{at_once:8,} {'█' * width} {value:.0f}")


# ── On paper ───


def ports() -> int:
    """How many connections an address may have to one address and port of another machine."""
    try:
        range_ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
    except OSError:
        return 16_384  # from 49152 on, as in RFC 6335
    low, high = map(int, range_.split())
    return high - low + 1


def say(*sentences: str) -> None:
    """Print a paragraph."""
    print(textwrap.fill(" ".join(sentences), 96, subsequent_indent="    "))


def paper(rows: list[tuple[int, float, float]]) -> None:
    """What is reached by one process, one machine and a cluster, and what limits each."""
    us = max(row for row in rows if row[0] <= 1000)[1]
    kb = max(row[2] for row in rows if not math.isnan(row[2]))
    rate, cores, allowed, all_ports = 1e6 / us, os.cpu_count() or 1, files(), ports()
    fit = min(cores * (allowed - SPARE), all_ports)  # calls in flight on one machine
    quota = 10_000 / 60  # calls a second
    print(f"\nOn paper, from {us:.0f} µs and {kb:.0f} KB a call, and answers that take 2 seconds:")
    say(
        f"One process: {rate:,.0f} calls a second fill a core, with {2 * rate:,.0f} in flight,",
        f"which take {2 * rate * kb / 1024:,.0f} MB. The limits, in this order: connections= of",
        "the provider's row, which is 1,000 unless told, and so 500 calls a second; the core, for",
        f"an event loop has one; the {allowed:,} file descriptors, one to a connection.",
    )
    say(
        f"One machine: {cores} processes on {cores} cores, {cores * rate:,.0f} calls a second,",
        f"{2 * cores * rate:,.0f} in flight. The limits: the cores; the file descriptors, and the",
        f"{all_ports:,} ports from its address to one of a provider's, which its processes share:",
        f"{fit:,} in flight, {fit / 2:,.0f} calls a second. Memory comes last: these take",
        f"{fit * kb / 2**20:.1f} GB.",
    )
    say(
        f"A cluster of 10 such machines: {10 * cores * rate:,.0f} calls a second. The first limit",
        f"is the provider's: 10,000 requests a minute are {quota:.0f} a second, and take",
        f"{100 * quota / rate:.1f} % of one core. Then the scheduler: Dask's needs up to 1 ms a",
        "task, which is 1,000 tasks a second for the whole cluster; one driver of Ray starts some",
        "thousands. So a task is to be many rows, not one call: with 100 rows under",
        "ember.parallel, Dask's scheduler feeds 100,000 calls a second. Then the address, if all",
        f"machines leave by the same one: {all_ports:,} ports are {all_ports / 2:,.0f} calls a",
        "second for them all.",
    )


def main() -> None:
    """All of it."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--quick", action="store_true", help="one turn, a tenth of the calls")
    parser.add_argument("--turns", type=int, default=0, help="3 unless told")
    parser.add_argument("--plot", default="", help="where the picture goes: .svg or .png")
    given = parser.parse_args()
    turns, share = given.turns or (1 if given.quick else 3), 0.1 if given.quick else 1
    fast = "with" if importlib.util.find_spec("httptools") else "without"
    print(f"CPython {platform.python_version()}, {os.cpu_count()} cores, {fast} httptools")
    allowed = files()
    with serving(10) as server:
        print(f"The server: {server.kind}; {allowed:,} file descriptors a process")
        rows = compare_scales(server, turns, share)
        show_long(server, int(FIRST * share), int(LONG * share))
        show_idle(server)
    if not rows:
        sys.exit("No row was measured, so there is nothing to plot or to reckon with")
    plot(rows, given.plot)
    paper(rows)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
