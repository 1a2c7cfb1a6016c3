"""What `parallel` and `as_completed` cost an item: CPU time, and the size of the process.

    python tests/bench/bench_parallel.py [ROUNDS]

64 items are under way at once, except where it says all. In the first tables they take turns in
each round, so that all meet the same machine. The call itself is a loop that awaits one item after
the other. aiometer is left out where it is not installed.
"""

import asyncio
import contextlib
import functools
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import ember

ITEMS, MILLION, LIMIT = 100_000, 1_000_000, 64
POINTS = {1, 10_000, 100_000, 250_000, 500_000, 1_000_000}  # where the size is taken

Fn = Callable[[int], Any]
Window = Callable[[Fn, Iterable[int]], Awaitable[Any]]
Stream = Callable[[Iterable[int]], AsyncIterator[Any]]


async def trivial(item: int) -> int:
    """What is done with an item."""
    return item


async def giving_way(item: int) -> int:
    """The same, but others get their turn: as with any real call, the task is suspended."""
    await asyncio.sleep(0)
    return item


# ── CPU time ───


def one_after_the_other(fn: Fn, items: Iterable[int]) -> Awaitable[Any]:
    """The call itself."""

    async def loop() -> list[int]:
        return [await fn(item) for item in items]

    return loop()


def by_hand(fn: Fn, items: Iterable[int]) -> Awaitable[Any]:
    """Workers on one iterator, with no care for errors: the least that a window takes."""

    async def window() -> list[int]:
        results: dict[int, int] = {}
        turns = enumerate(items)

        async def work() -> None:
            for index, item in turns:
                results[index] = await fn(item)

        await asyncio.gather(*(work() for _ in range(LIMIT)))
        return [results[index] for index in range(len(results))]

    return window()


def with_semaphore(fn: Fn, items: Iterable[int]) -> Awaitable[Any]:
    """The usual recipe: a task for each item, which waits for a place."""
    places = asyncio.Semaphore(LIMIT)

    async def held(item: int) -> int:
        async with places:
            return await fn(item)

    return asyncio.gather(*map(held, items))


def aiometers(fn: Fn, items: Iterable[int]) -> Awaitable[Any]:
    """aiometer, which keeps the results too."""
    import aiometer

    calls = [functools.partial(fn, item) for item in items]
    return aiometer.run_all(calls, max_at_once=LIMIT)


WINDOWS: dict[str, Window] = {
    "one after the other": one_after_the_other,
    "ember.parallel": lambda fn, items: ember.parallel(fn, items, limit=LIMIT),
    "64 workers by hand": by_hand,
    "asyncio.gather, all": lambda fn, items: asyncio.gather(*map(fn, items)),
    "Semaphore and gather": with_semaphore,
    "aiometer.run_all": aiometers,
}


def microseconds(window: Window, fn: Fn) -> float:
    """CPU time of this process for one item."""

    async def timed() -> float:
        started = time.process_time()
        await window(fn, range(ITEMS))
        return time.process_time() - started

    return 1e6 * asyncio.run(timed()) / ITEMS


def compare(title: str, fn: Fn, rounds: int) -> None:
    """Print one table."""
    windows = {k: v for k, v in WINDOWS.items() if "aiometer" not in k or find_spec("aiometer")}
    turns = [[microseconds(run, fn) for run in windows.values()] for _ in range(rounds)]
    columns = list(zip(*turns, strict=True))
    above = [statistics.median(t - turn[0] for t, turn in zip(times, turns, strict=True))
             for times in columns]  # fmt: skip
    print(f"\n{ITEMS:,} {title}, median of {rounds} rounds: CPU µs an item, what of it is above")
    print("the call itself, ratio of the first figure to Ember's")
    whole = [statistics.median(times) for times in columns]
    for name, cost, more in zip(windows, whole, above, strict=True):
        target = "  target 3" if name == "ember.parallel" and fn is trivial else ""
        print(f"  {name:<22} {cost:7.2f} {more:+8.2f}  x {cost / whole[1]:6.2f}{target}")


# ── Memory ───


def megabytes() -> float:
    """The resident size of this process now; where that cannot be read, the largest so far."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


async def amapped(items: Iterable[int]) -> AsyncIterator[Any]:
    """`aiometer.amap` as an iterator; it wants a list."""
    import aiometer

    async with aiometer.amap(trivial, list(items), max_at_once=LIMIT) as results:
        async for result in results:
            yield result


async def asyncios(items: Iterable[int]) -> AsyncIterator[Any]:
    """`asyncio.as_completed`: a task for each item."""
    for result in asyncio.as_completed([trivial(item) for item in items]):
        yield await result


STREAMS: dict[str, tuple[Stream, int]] = {
    "ember.as_completed": (lambda it: ember.as_completed(trivial, it, limit=LIMIT), MILLION),
    "aiometer.amap": (amapped, ITEMS),
    "asyncio, all": (asyncios, ITEMS),
}


def follow(name: str) -> None:
    """Print what a stream of results took, and the size after so many of them."""
    sizes: dict[int, float] = {}
    stream, number = STREAMS[name]

    async def timed() -> float:
        before, started, count = megabytes(), time.process_time(), 0
        async for _ in stream(item for item in range(number)):  # a generator, so nobody has a list
            count += 1
            if count in POINTS:
                sizes[count] = megabytes() - before
        return 1e6 * (time.process_time() - started) / count

    cost = asyncio.run(timed())
    grown = ", ".join(f"{size:+.1f} at {point:,}" for point, size in sizes.items())
    print(f"  {name:<22} {cost:7.2f}  {grown}", flush=True)


def main(rounds: int) -> None:
    """All tables. Each stream has a process of its own, so that it finds no freed memory."""
    compare("trivial items", trivial, rounds)
    compare("items that give way once", giving_way, rounds)
    print("\nas completed: CPU µs a result, and MB that the process has grown by after so many")
    for name in STREAMS:
        if name.startswith("aiometer") and not find_spec("aiometer"):
            continue
        process = get_context("spawn").Process(target=follow, args=(name,))
        process.start()
        process.join()


if __name__ == "__main__":
    main(max(3, int(sys.argv[1]) if len(sys.argv) > 1 else 3))
