"""Multi-chain comparison: several chains of thought, then one that compares them and answers.

You will see each chain with its answer, what comes of the comparison, and what their majority
says, which costs nothing more. Words on the command line are asked instead.
"""

import asyncio
import sys

from ember import ensemble, fallback, majority_vote, models, predict

DEMOS = [
    {"question": "Ann has 5 apples and eats 2. How many has she left?",
     "reasoning": "She had 5 and ate 2. 5 - 2 = 3.", "answer": 3},
    {"question": "A box holds 6 eggs. How many eggs are in 4 boxes?",
     "reasoning": "Each box holds 6 and there are 4. 4 * 6 = 24.", "answer": 24},
]  # fmt: skip

local = models.local.using(max_tokens=100)
variants = [local.using(temperature=0.4, seed=seed) for seed in (1, 2, 3)]
chains = ensemble(*(
    predict("question -> answer: int", model=variant, reasoning=True, demos=DEMOS)
    for variant in variants
))  # fmt: skip
careful = fallback(*(local.using(temperature=t) for t in (0, 0.3, 0.6)))  # if one does not end
compare = predict("question, attempts: list -> answer: int", model=careful, reasoning=True)


async def main() -> None:
    question = " ".join(sys.argv[1:]) or "A bag holds 5 balls. How many balls are in 3 bags?"
    attempts = await chains(question)
    for attempt in attempts:
        print(f"{attempt}. {attempt.reasoning}")
    best = await compare(question, attempts)
    print(f"compared: {best}. {best.reasoning}")
    print("majority:", majority_vote([attempt.answer for attempt in attempts]))


if __name__ == "__main__":
    asyncio.run(main())
