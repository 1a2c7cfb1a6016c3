"""Chain of thought: a model that reasons before it answers is more often right.

You will see a question answered straight away, then after a thought. Both functions are one line
that names what goes in and what comes out, and see the same examples. Words on the command line
are asked instead.
"""

import asyncio
import sys

from ember import models, predict

THOUGHTS = [
    {"question": "Ann has 5 apples and eats 2. How many has she left?",
     "reasoning": "She had 5 and ate 2. 5 - 2 = 3.", "answer": 3},
    {"question": "A box holds 6 eggs. How many eggs are in 4 boxes?",
     "reasoning": "Each box holds 6 and there are 4. 4 * 6 = 24.", "answer": 24},
    {"question": "Tom has 8 euros and gets 7. How many has he now?",
     "reasoning": "He had 8 and got 7. 8 + 7 = 15.", "answer": 15},
]  # fmt: skip
ANSWERS = [{"question": demo["question"], "answer": demo["answer"]} for demo in THOUGHTS]

local = models.local.using(temperature=0, max_tokens=200)
straight = predict("question -> answer: int", model=local, demos=ANSWERS)
thinking = predict("question -> answer: int", model=local, demos=THOUGHTS, reasoning=True)


async def main() -> None:
    question = " ".join(sys.argv[1:]) or "Eve has 12 stamps and gets 6. How many has she now?"
    print(question)
    print("straight away:", await straight(question))
    thought = await thinking(question)
    print(f"after a thought: {thought}. {thought.reasoning}")


if __name__ == "__main__":
    asyncio.run(main())
