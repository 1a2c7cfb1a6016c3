"""What `evaluate` costs a row above the bare calls: CPU time, with and without a file to resume.

    python tests/bench/bench_evaluate.py [ROUNDS]

10,000 rows, 256 at once, and a function that gives way once, as any real call does. The bare calls
are `ember.parallel` on the same function. All take turns in each round, so that they meet the same
machine.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import ember
from ember_accel.evidence import evaluate, exact, f1

COUNT, LIMIT = 10_000, 256
ROWS = [{"input": f"What is {n} and {n}?", "expected": f"It is {2 * n}"} for n in range(COUNT)]


async def answer(text: str) -> str:
    """What is done with a row: half of the answers are right."""
    await asyncio.sleep(0)
    n = int(text.split()[2])
    return f"It is {n + n // 2 * 2}"


def bare(_: Path) -> Awaitable[Any]:
    """The calls by themselves."""
    return ember.parallel(answer, [row["input"] for row in ROWS], limit=LIMIT)


RUNS: dict[str, Callable[[Path], Awaitable[Any]]] = {
    "ember.parallel": bare,
    "evaluate, exact": lambda _: evaluate(answer, ROWS, exact, limit=LIMIT),
    "evaluate, f1 (bootstrap)": lambda _: evaluate(answer, ROWS, f1, limit=LIMIT),
    "evaluate, a new file": lambda path: evaluate(answer, ROWS, limit=LIMIT, resume=path),
    "evaluate, all in the file": lambda path: evaluate(answer, ROWS, limit=LIMIT, resume=path),
}


def microseconds(run: Callable[[Path], Awaitable[Any]], path: Path) -> float:
    """CPU time of this process for one row."""

    async def timed() -> float:
        started = time.process_time()
        await run(path)
        return time.process_time() - started

    return 1e6 * asyncio.run(timed()) / COUNT


def main(rounds: int) -> None:
    """Print the table."""
    turns: list[list[float]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "run.jsonl")
            turns.append([microseconds(run, path) for run in RUNS.values()])
    columns = zip(*turns, strict=True)
    print(f"{COUNT:,} rows at limit={LIMIT}, median of {rounds} rounds: CPU µs a row, and what of")
    print("it is above the bare calls")
    for name, times in zip(RUNS, columns, strict=True):
        above = statistics.median(t - turn[0] for t, turn in zip(times, turns, strict=True))
        target = "  target 20" if name in {"evaluate, exact", "evaluate, a new file"} else ""
        print(f"  {name:<26} {statistics.median(times):7.2f} {above:+8.2f}{target}")


if __name__ == "__main__":
    main(max(3, int(sys.argv[1]) if len(sys.argv) > 1 else 5))
