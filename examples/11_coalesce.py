"""Coalesce: many calls for one item become one call for a list.

You will see four reviews read, each by a call of its own, and that it took one request.
"""

import asyncio
from typing import Any, Literal

from ember import cache, models, parallel, track


class Nowhere:
    """A store without memory: of `cache` it leaves the flight, which callers share and leave."""

    get = set = lambda *_: None


def coalesce(fn: Any, *, wait: float) -> Any:
    """`fn`, which takes a list, for one item: calls within `wait` seconds go out together."""
    window: dict[Any, Any] = {}  # items that wait; with their answers once these are here

    @cache(store=Nowhere(), key=lambda asked: str(id(asked)))
    async def flight(asked: dict[Any, Any]) -> None:
        nonlocal window
        await asyncio.sleep(wait)
        window = {}
        asked.update(zip(asked, await fn(list(asked)), strict=True))

    async def one(item: Any) -> Any:
        asked = window
        asked[item] = None
        await flight(asked)
        return asked[item]

    return one


async def main() -> None:
    async def sentiments(reviews: list[str]) -> tuple[str, ...]:
        each = tuple[(Literal["positive", "negative"],) * len(reviews)]
        question = f"Is the tone of each of these sentences positive or negative? {reviews}"
        return (await models.local(question, output=each, temperature=0)).data

    reviews = ["Wonderful soup.", "A rude waiter.", "Very fresh bread.", "Cold coffee."]
    with track() as ledger:
        print(await parallel(coalesce(sentiments, wait=0.01), reviews))
    print(f"{len(reviews)} calls, {ledger.requests} request")


if __name__ == "__main__":
    asyncio.run(main())
