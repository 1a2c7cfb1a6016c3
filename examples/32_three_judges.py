"""Weigh three judges: how each errs is learned from their votes, and from a few known answers.

You will see how often each judge says "right" of wrong and of right answers, as learned and as it
is. Then how many of the other answers the majority gets right, and how many the judges do when they
are weighed by that. The judges here are made up; a model is one as well:
`predict("question, answer -> is_right: bool", model=models.gpt4)`.
"""

import asyncio

import numpy as np

from ember import parallel
from ember_accel.scoring import dawid_skene, weighted_vote

KNOWN, ALL = 20, 500
JUDGES = {"careful": (0.10, 0.90), "lenient": (0.60, 0.95), "hasty": (0.40, 0.55)}
CHANCE = np.random.default_rng(0).random((ALL, 1 + len(JUDGES)))
TRUTH = (CHANCE[:, -1] < 0.6).astype(int)


async def verdict(judge: str, number: int) -> bool:
    """Whether a judge finds an answer right."""
    return bool(CHANCE[number, list(JUDGES).index(judge)] < JUDGES[judge][TRUTH[number]])


async def verdicts(number: int) -> list[bool]:
    """What all judges say of an answer."""
    return [await verdict(judge, number) for judge in JUDGES]


async def main() -> None:
    votes = np.array(await parallel(verdicts, range(ALL)), int)
    counted = np.full((len(JUDGES), 2, 2), 0.5)  # by judge, by what is true, by what is said
    for number in range(KNOWN):
        for judge, said in enumerate(votes[number]):
            counted[judge, TRUTH[number], said] += 1
    found = dawid_skene(votes[KNOWN:], 2, pseudocounts=counted)
    for (judge, rates), confusion in zip(JUDGES.items(), found.confusion, strict=True):
        learned = " and ".join(f"{rate:.2f}" for rate in confusion[:, 1])
        print(f"{judge:8} says right of wrong and of right answers: {learned}, in truth {rates}")
    majority = weighted_vote(votes[KNOWN:], np.ones(len(JUDGES)), 2)
    for name, shares in (("majority", majority), ("weighed", found.posterior)):
        is_right = shares.argmax(1) == TRUTH[KNOWN:]
        print(f"{name:8} {is_right.sum()} of {len(is_right)} right")


if __name__ == "__main__":
    asyncio.run(main())
