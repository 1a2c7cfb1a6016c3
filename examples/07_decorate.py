"""Put retries, a cache and a rate on a function you already have, without a change in it.

You will see three reviews read, each asked for twice and sent once. Run it again: nothing is sent,
the answers come from the disk, from EMBER_CACHE_DIR or your user's cache directory.
"""

import asyncio
from typing import Literal

from ember import batch, cache, gather, limit, models, retry, track

REVIEWS = ["The soup was wonderful.", "The waiter was rude to us.", "The bread was very fresh."]

polite = limit(rpm=600)  # may stand on many functions, which then share it


@retry(max_attempts=3)  # bounds the attempts of every request inside
@cache(ttl=3600)  # equal calls are asked once, those at the same time too
@batch(size=10)  # at most ten run at once, first come first served
@polite
async def sentiment(review: str) -> str:
    """What a review sounds like."""
    question = f"Is the tone of this sentence positive or negative? {review}"
    reply = await models.local(question, output=Literal["positive", "negative"], temperature=0)
    return reply.data


async def main() -> None:
    """Ask for everything twice at the same time."""
    with track() as ledger:
        answers = await gather(*(sentiment(review) for review in REVIEWS * 2))
    for review, answer in zip(REVIEWS, answers, strict=False):
        print(f"{answer}: {review}")
    print(f"{len(answers)} calls, {ledger.requests} requests, {ledger.hits} answered by the cache")


if __name__ == "__main__":
    asyncio.run(main())
