"""Best of K: ask several times, score each answer, keep the best.

You will see what each sample scores, then the best one. The score is plain Python here: how many
of the wanted words are there. It may be async too, and ask a model.
"""

import asyncio

from ember import best_of, models

WANTED = ["boat", "night", "sea", "wind"]
write = models.local.using(temperature=0.8, max_tokens=30, stop="\n")


def score(story: object) -> int:
    """How many of the wanted words a story has."""
    found = [word for word in WANTED if word in str(story).lower()]
    print(f"{len(found)} of {len(WANTED)}: {', '.join(found)}")
    return len(found)


async def main() -> None:
    best = best_of(write, 5, score)
    print(await best(f"Write a short story with these words: {', '.join(WANTED)}."))


if __name__ == "__main__":
    asyncio.run(main())
