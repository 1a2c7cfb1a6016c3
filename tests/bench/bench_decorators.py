"""What each decorator costs a call, in CPU time, beside the libraries that do the same.

    python tests/bench/bench_decorators.py [ROUNDS]

All decorate one function and take turns in each round, so that all meet the same machine. A figure
is the median over the rounds, less that of the bare call; the ratio is to Ember's first line in the
table. Libraries that are not installed are left out: tenacity, stamina, aiometer, diskcache,
cashews.
"""

import asyncio
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

import ember

ANSWER = "a sentence of an answer. " * 20
PROMPTS = [f"{n:04}" + "a word and " * 186 for n in range(2000)]  # of 2 KB
FEW = PROMPTS[:100]  # all of them fit into memory; of 2,000, read in turn, none is there when asked

Fn = Callable[[str], Awaitable[Any]]
Run = Callable[[Sequence[str]], Awaitable[Any]]


class Entry(NamedTuple):
    """A line of a table: what is run, and the most that it may cost, in µs, if that was said."""

    name: str
    run: Run
    target: float | None = None


async def answer(prompt: str) -> str:
    """The function that is decorated."""
    return ANSWER


def each(fn: Fn) -> Run:
    """One call after the other."""

    async def run(prompts: Sequence[str]) -> None:
        for prompt in prompts:
            await fn(prompt)

    return run


# ── What is compared ───


def retries() -> Iterator[Entry]:
    """A first attempt that succeeds."""
    yield Entry("ember.retry", each(ember.retry(max_attempts=3)(answer)), 2)
    with contextlib.suppress(ImportError):
        import tenacity

        stop, wait = tenacity.stop_after_attempt(3), tenacity.wait_random_exponential()
        yield Entry("tenacity.retry", each(tenacity.retry(stop=stop, wait=wait)(answer)))
    with contextlib.suppress(ImportError):
        import stamina

        yield Entry("stamina.retry", each(stamina.retry(on=ConnectionError, attempts=3)(answer)))


def limits() -> Iterator[Entry]:
    """A place, or a token of a rate, that nobody else asks for at the time."""
    yield Entry("ember.limit(concurrency=8)", each(ember.limit(concurrency=8)(answer)), 5)
    rates = ember.limit(concurrency=8, rpm=10**9, tpm=10**12)
    yield Entry("ember.limit(…, rpm=, tpm=)", each(rates(answer)), 5)
    yield Entry("@ember.batch(size=8)", each(ember.batch(size=8)(answer)), 5)
    semaphore = asyncio.Semaphore(8)

    async def held(prompt: str) -> str:
        async with semaphore:
            return await answer(prompt)

    yield Entry("asyncio.Semaphore(8)", each(held))


def windows() -> Iterator[Entry]:
    """A list, at most eight items at once."""

    async def batch(prompts: Sequence[str]) -> None:
        await ember.batch(answer, prompts, size=8)

    yield Entry("ember.batch(fn, items)", batch, 5)
    with contextlib.suppress(ImportError):
        import aiometer

        async def metered(prompts: Sequence[str]) -> None:
            calls = [functools.partial(answer, prompt) for prompt in prompts]
            await aiometer.run_all(calls, max_at_once=8)

        yield Entry("aiometer.run_all", metered)


def hits(target: float, backend: str, *others: Entry) -> Iterator[Entry]:
    """Answers that were asked for before: Ember's caches, others, and cashews' backend."""
    said = {"message": {"content": ANSWER}, "finish_reason": "stop"}
    reply = {"choices": [said], "usage": {"prompt_tokens": 500, "completion_tokens": 100}}
    fake = httpx.MockTransport(lambda request: httpx.Response(200, json=reply))
    model = ember.model("openai:gpt-4.1", api_key="none", transport=fake)
    yield Entry("ember.cache", each(ember.cache(answer)), target)
    yield Entry("ember.cache of a model", each(ember.cache(model)))
    yield from others
    with contextlib.suppress(ImportError):
        from cashews import Cache

        cashews = Cache()
        cashews.setup(backend)
        yield Entry(f"cashews {backend.partition('?')[0]}", each(cashews(ttl="1h")(answer)))


def from_memory(folder: str) -> Iterator[Entry]:
    """Answers in this process."""
    plain = Entry("ember.cache(store={})", each(ember.cache(store={})(answer)))
    return hits(20, "mem://?size=10000", plain)


def from_disk(folder: str) -> Iterator[Entry]:
    """Answers in a file."""
    others: list[Entry] = []
    with contextlib.suppress(ImportError):
        import diskcache

        store = diskcache.Cache(f"{folder}/diskcache", eviction_policy="none")

        async def looked_up(prompt: str) -> Any:
            if (found := store.get(prompt)) is None:
                store.set(prompt, found := await answer(prompt))
            return found

        others.append(Entry("diskcache.get", each(looked_up)))
    return hits(40, f"disk://?directory={folder}/cashews", *others)


# ── Measuring ───


def microseconds(runner: asyncio.Runner, run: Run, prompts: Sequence[str]) -> float:
    """CPU time of this process for one prompt."""

    async def timed() -> float:
        started = time.process_time()
        await run(prompts)
        return time.process_time() - started

    return 1e6 * runner.run(timed()) / len(prompts)


def compare(title: str, rounds: int, prompts: Sequence[str], entries: Iterator[Entry]) -> None:
    """Print one table."""
    with asyncio.Runner() as runner:
        lines = [Entry("bare call", each(answer)), *entries]
        for line in lines:
            microseconds(runner, line.run, prompts)  # fills the caches
        turns = [[microseconds(runner, line.run, prompts) for line in lines] for _ in range(rounds)]
        above = [statistics.median(t - turn[0] for t, turn in zip(times, turns, strict=True))
                 for times in zip(*turns, strict=True)]  # fmt: skip
    bare = statistics.median(turn[0] for turn in turns)
    print(f"\n{title}: CPU µs a call above the bare call's {bare:.2f}, median of {rounds} rounds")
    for line, cost in zip(lines[1:], above[1:], strict=True):
        target = "" if line.target is None else f"  target {line.target:g}"
        print(f"  {line.name:<28} {cost:8.2f}  x {cost / above[1]:5.2f}{target}")


def main(rounds: int) -> None:
    """All tables."""
    many = PROMPTS[:1] * 5000
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EMBER_CACHE_DIR"] = f"{folder}/ember"
        compare("retry, success at once", rounds, many, retries())
        compare("limit, uncontended", rounds, many, limits())
        compare("batch, 5,000 items", rounds, many, windows())
        compare("cache, hit in memory", rounds, FEW * 10, from_memory(folder))
        compare("cache, hit on disk", rounds, PROMPTS, from_disk(folder))


if __name__ == "__main__":
    main(max(5, int(sys.argv[1]) if len(sys.argv) > 1 else 11))
