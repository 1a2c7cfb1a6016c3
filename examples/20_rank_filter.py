"""Rank and filter: many drafts, a score for each, and the best few of them in order.

You will see five drafts shrink to two, best first. The small model in this process writes better
than it judges: take a larger one for `judging`.
"""

import asyncio

from ember import ensemble, judge, models

KEEP = 2
local = models.local.using(temperature=0.7, max_tokens=15, stop="\n")
drafting = ensemble(*(local.using(seed=seed) for seed in range(5)), quorum=KEEP)
judging = models.local.using(temperature=0)


async def main() -> None:
    question = "Write a title for a book about the sea."
    drafts = await drafting(question)
    verdict = await judge(judging, ["is about the sea", "is beautiful"])(question, drafts)
    ranked = sorted(zip(verdict.scores, map(str, drafts), strict=True), reverse=True)
    for score, draft in ranked[:KEEP]:
        print(f"{score:4}  {draft}")
    print(f"the best {KEEP} of {len(drafts)}")


if __name__ == "__main__":
    asyncio.run(main())
