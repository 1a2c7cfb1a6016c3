"""Add your own implementation to an operation, and have it chosen where it is the fastest.

You will see that it agrees with NumPy's, which one each call has chosen, and how long it took. An
operation is a value: yours has one more implementation, and the library's is as it was.
"""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np

from ember_accel.dispatch import Choice, implementations, on_choice, parity, prefer
from ember_accel.retrieval import topk


def by_sorting(queries: Any, docs: Any, k: int) -> tuple[Any, Any]:
    """The scores and indices of the best documents, by one sort of all scores."""
    scores = np.asarray(queries) @ np.asarray(docs).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, best, axis=1), best


def choose(available: Any, queries: Any, docs: Any, k: int) -> str:
    """Sorting for few documents, else what the library would choose."""
    few = len(docs) <= 100
    return "sorting" if few else topk.choose(available, queries, docs, k)


mine = replace(topk, implementations={**topk.implementations, "sorting": by_sorting}, choose=choose)


def show(choice: Choice) -> None:
    print(f"{choice.operation} by {choice.implementation}: {1e6 * choice.seconds:.0f} µs")


async def main() -> None:
    rng = np.random.default_rng(0)
    queries, few, many = (rng.normal(size=(n, 32)) for n in (2, 50, 5000))
    for name, missing in implementations(mine)["topk"].items():
        print(f"{name}: {missing or 'can run'}")
    print(parity(mine, [(queries, few, 3), (queries, many, 3)], prefer=["numpy", "sorting"]))
    with on_choice(show):
        mine(queries, few, 3)
        mine(queries, many, 3)
        mine(queries, many, 3, prefer="sorting")
        with prefer("sorting"):  # or EMBER_ACCEL=sorting in the environment
            print(mine(queries, many, 3)[1].tolist())
            topk(queries, few, 3)  # which has none of this name


if __name__ == "__main__":
    asyncio.run(main())
