"""Cached functions in a module of their own, which processes share, and what the tests run there.

python cache_worker.py equal URL COUNT     COUNT equal calls at once, after a line on stdin
python cache_worker.py write COUNT         COUNT answers, each printed when it is returned
python cache_worker.py once TEXT           a few calls, and what ran for them
python cache_worker.py full BYTES          calls on a disk where no file may be longer
python cache_worker.py cut                 calls before and after the file is cut off
"""

import asyncio
import json
import os
import sqlite3
import sys
import warnings
from pathlib import Path
from typing import Any

import cache_worker  # by its name: a function's module is part of its key

from ember import cache, model

runs = list[str]()


@cache
async def echo(text: str) -> str:
    """The text, and a note that this ran."""
    runs.append(text)
    return f"right {text}"


@cache
async def chosen(text: str, of: frozenset[str]) -> bool:
    """Whether the text is among those, or one of these; sets have another order in each process."""
    runs.append(text)
    return text in of or text in {"one", "two", "three", "four", "five"}


@cache
async def ask(url: str, text: str) -> str:
    """What a model says."""
    reply = await model("openai:gpt-4o", base_url=url, api_key="sk-no-secret")(text)
    return reply.text


async def equal(url: str, count: str) -> None:
    """Equal calls, of a function and of a model."""
    cached = cache(model("openai:gpt-4o", base_url=url, api_key="sk-no-secret"))
    print("ready", flush=True)
    sys.stdin.readline()
    calls: list[Any] = [cache_worker.ask(url, "function") for _ in range(int(count))]
    calls += [cached("model") for _ in range(int(count))]
    print(json.dumps([str(answer) for answer in await asyncio.gather(*calls)]))


async def write(count: str) -> None:
    """Many answers, a few at once."""
    numbers = iter(range(int(count)))

    async def work() -> None:
        for number in numbers:
            await cache_worker.echo(str(number))
            print(number, flush=True)

    await asyncio.gather(*(work() for _ in range(4)))


async def once(text: str) -> None:
    """The answers, and what ran."""
    of = frozenset(["six", "seven", "eight", "nine", text])
    answers = [await cache_worker.echo(text), await cache_worker.chosen(text, of)]
    print(json.dumps([answers, cache_worker.runs]))


async def full(size: str) -> None:
    """The answers and warnings where files may have so many bytes only."""
    import resource  # absent on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = [await cache_worker.echo(str(n) * 20_000) for n in (*range(5), 4)]
    print(json.dumps([[answer[:7] for answer in answers], [str(w.message) for w in caught]]))


async def cut() -> None:
    """The answers and warnings after somebody has cut off the file."""
    directory = Path(os.environ["EMBER_CACHE_DIR"])
    texts = [f"{number} {'x' * 2000}" for number in range(100, 700)]
    for text in texts:
        await cache_worker.echo(text)
    (file,) = directory.rglob("cache.db")  # noqa: ASYNC240
    with sqlite3.connect(file) as other:
        other.execute("PRAGMA wal_checkpoint(PASSIVE)")
    other.close()
    for number in range(1000):
        await cache_worker.echo(str(number))  # until the first ones are in memory no more
    os.truncate(file, 8192)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = [await cache_worker.echo(text) for text in texts]
    print(json.dumps([[answer[:9] for answer in answers], [str(w.message) for w in caught]]))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    asyncio.run(globals()[command](*arguments))
