"""Evaluations in a process of their own, which the tests kill.

python evaluate_worker.py run URL COUNT PATH   COUNT rows against a server, 8 at once; prints {n, …}
python evaluate_worker.py hold PATH            an evaluation that does not end, after a line
python evaluate_worker.py bot KIND PATH        a method, an object or a closure; prints its calls
python evaluate_worker.py full PATH BYTES      one where no file may be longer
"""

import asyncio
import json
import sys
from typing import Any

import anyio

from ember import SetupError, model
from ember_accel.evidence import evaluate, exact

LIMIT = 8


def rows(count: int) -> list[Any]:
    """Rows of which some are equal."""
    return [{"input": f"question {n % (count - 5)}", "expected": "right"} for n in range(count)]


async def run(url: str, count: str, path: str) -> None:
    """What is found when it was not killed."""
    ask = model("openai:gpt-4o", base_url=url, api_key="sk-no-secret", retries=0)
    report = await evaluate(ask, rows(int(count)), exact, limit=LIMIT, resume=path)
    inputs = [row.input for row in report.rows]
    told = {"n": report.n, "mean": report.mean, "cost": report.cost, "inputs": inputs}
    print(json.dumps(told), flush=True)


async def hold(path: str) -> None:
    """An evaluation that holds its file."""

    async def wait(text: str) -> str:
        print("running", flush=True)
        await anyio.sleep_forever()
        return text

    await evaluate(wait, [("a", "a")], resume=path)


class Bot:
    """An object that answers, and remembers."""

    def __init__(self) -> None:
        self.calls, self.lock, self.tags = list[str](), asyncio.Lock(), {"a", "b", "c"}

    async def __call__(self, text: str) -> str:
        """The text."""
        self.calls.append(text)
        return text


async def bot(kind: str, path: str) -> None:
    """How often an object is called that is held in this way."""
    one = Bot()

    async def closure(text: str) -> str:
        return await one(text)

    fn = {"method": one.__call__, "object": one, "closure": closure}[kind]
    await evaluate(fn, rows(8), resume=path)
    print(json.dumps(len(one.calls)))


async def long(text: str) -> str:
    """The text, and many letters."""
    return text + "x" * 1000


async def full(path: str, size: str) -> None:
    """What is raised where files may have so many bytes only."""
    import resource  # absent on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
    try:
        await evaluate(long, [(str(n), str(n)) for n in range(100)], resume=path)
    except SetupError as error:
        print(json.dumps(type(error).__name__), flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    report = await evaluate(long, [(str(n), str(n)) for n in range(100)], resume=path)
    print(json.dumps(report.n), flush=True)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    asyncio.run(globals()[command](*arguments))
