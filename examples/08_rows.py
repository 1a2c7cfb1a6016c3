"""Ask about each of 1,000 rows, 16 at once, with a bar.

You will see the bar, then how often each answer came. A row that fails does not stop the others.
Only three texts differ here, so that the small model in this process is asked three times.
"""

import asyncio
import random
from collections import Counter
from typing import Literal

from ember import cache, models, parallel, track

REVIEWS = "The soup was wonderful.", "The waiter was rude to us.", "The bread was very fresh.", ""
ROWS = random.Random(1).choices(REVIEWS, [49, 30, 20, 1], k=1000)  # noqa: S311


@cache(store={})  # equal rows are asked once, for as long as the dict lives
async def sentiment(review: str) -> str:
    """What a review sounds like."""
    if not review:
        raise ValueError("no review")
    question = f"Is the tone of this sentence positive or negative? {review}"
    reply = await models.local(question, output=Literal["positive", "negative"], temperature=0)
    return reply.data


async def main() -> None:
    """Ask, and count: the answers are in the order of the rows, an error stands in its place."""
    with track() as ledger:
        answers = await parallel(sentiment, ROWS, limit=16, on_error="return", progress=True)
    for answer, number in Counter(map(str, answers)).most_common():
        print(f"{number} {answer}")
    print(f"{len(answers)} rows, {ledger.requests} requests")


if __name__ == "__main__":
    asyncio.run(main())
