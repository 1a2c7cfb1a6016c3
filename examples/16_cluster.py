"""Run a function on other processes: on a pool of this machine, then on a cluster of Dask.

You will see that the pool asks for three answers. Dask's workers (or, without Dask, another pool)
find them in the cache, which is on disk and shared. What the workers counted is summed up here.
"""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Literal

from ember import Ledger, cache, models, sync, track

REVIEWS = ["The soup was wonderful.", "The waiter was rude to us.", "The bread was very fresh."]
ask = models.gpt4 if os.environ.get("OPENAI_API_KEY") else models.local


async def sentiment(review: str) -> str:
    question = f"Is the tone of this sentence positive or negative? {review}"
    return (await ask(question, output=Literal["positive", "negative"], temperature=0)).data


def work(review: str) -> tuple[str, Ledger]:
    """What a worker does: a plain function, which brings back its own ledger."""
    with track() as ledger:
        return sync(cache(sentiment))(review), ledger


async def on_pool(reviews: Sequence[str]) -> list[tuple[str, Ledger]]:
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return await asyncio.gather(*(loop.run_in_executor(pool, work, r) for r in reviews))


async def on_dask(reviews: Sequence[str]) -> list[tuple[str, Ledger]]:
    from distributed import Client, LocalCluster

    async with (
        LocalCluster(n_workers=2, asynchronous=True, dashboard_address=None) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        return await client.gather(client.map(work, reviews))


async def main() -> None:
    for run in (on_pool, on_dask if find_spec("distributed") else on_pool):
        ledger = Ledger()
        for answer, counted in await run(REVIEWS):
            ledger.add(counted)
            print(answer, end=", ")
        print(f"{run.__name__}: {ledger.requests} requests, {ledger.hits} from the cache")


if __name__ == "__main__":
    asyncio.run(main())
