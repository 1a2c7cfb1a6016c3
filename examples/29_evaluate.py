"""Evaluate two variants on a data set, and see whether one is better than chance would have it.

You will see a report of each, with an interval for its mean, then how much better the model is that
thinks before it answers. The last line is a run that goes on from a file: nothing is left to ask.
Rows of your own: `load("rows.jsonl")`.
"""

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

from ember import models, predict, track
from ember_accel import evaluate, numeric

ROWS = [
    ("A farmer has 3 cows and buys 4 more. How many cows has he?", 7),
    ("A bus has 9 people. 5 get off. How many are left?", 4),
    ("A bag holds 5 balls. How many balls are in 3 bags?", 15),
    ("Eve has 12 stamps and gets 6. How many has she now?", 18),
    ("A shelf has 10 books and 4 are lent. How many are left?", 6),
    ("A cat has 4 legs. How many legs have 5 cats?", 20),
    ("Ben has 2 red pens and 6 blue pens. How many pens has he?", 8),
    ("A room has 7 rows of 3 chairs. How many chairs are there?", 21),
]
THOUGHTS = [
    {"question": "Ann has 5 apples and eats 2. How many has she left?",
     "reasoning": "She had 5 and ate 2. 5 - 2 = 3.", "answer": 3},
    {"question": "A box holds 6 eggs. How many eggs are in 4 boxes?",
     "reasoning": "Each box holds 6 and there are 4. 4 * 6 = 24.", "answer": 24},
    {"question": "Tom has 8 euros and gets 7. How many has he now?",
     "reasoning": "He had 8 and got 7. 8 + 7 = 15.", "answer": 15},
]  # fmt: skip
ANSWERS = [{"question": demo["question"], "answer": demo["answer"]} for demo in THOUGHTS]

local = models.local.using(temperature=0, max_tokens=100)
straight = predict("question -> answer: int", model=local, demos=ANSWERS)
thinking = predict("question -> answer: int", model=local, demos=THOUGHTS, reasoning=True)


async def main() -> None:
    with TemporaryDirectory() as folder:
        done = Path(folder, "done.jsonl")
        before = await evaluate(straight, ROWS, numeric, limit=4)
        after = await evaluate(thinking, ROWS, numeric, limit=4, resume=done)
        print(before, after, f"better by {after.compare(before)}", sep="\n\n")
        with track() as ledger:
            again = await evaluate(thinking, ROWS, numeric, resume=done)
        print(f"again: {again.mean:.4f} by {ledger.requests} requests")


if __name__ == "__main__":
    asyncio.run(main())
