"""Hedge: ask again when an answer is slow. The first to come wins, the other is cancelled.

You will see one answer, and the two attempts that it took: one is ok, one cancelled.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import ParamSpec, TypeVar

from ember import as_completed, models, track

P, T = ParamSpec("P"), TypeVar("T")


def hedge(fn: Callable[P, Awaitable[T]], after: float) -> Callable[P, Awaitable[T]]:
    """`fn`, called once more if it has not answered `after` seconds later."""

    @functools.wraps(fn)
    async def hedged(*args: P.args, **kwargs: P.kwargs) -> T:
        async def ask(delay: float) -> T:
            await asyncio.sleep(delay)
            return await fn(*args, **kwargs)

        async with aclosing(as_completed(ask, [0, after], on_error="return")) as answers:
            async for _, answer in answers:
                if not isinstance(answer, Exception):
                    return answer
        raise answer

    return hedged


async def main() -> None:
    ask = hedge(models.local.using(temperature=0, max_tokens=50), after=0.05)
    with track() as ledger:
        print(await ask("What is the capital of Sweden?"))
    print(*(f"{call.model}: {call.outcome}" for call in ledger.calls), sep="\n")


if __name__ == "__main__":
    asyncio.run(main())
