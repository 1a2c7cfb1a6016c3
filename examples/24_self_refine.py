"""Self-refinement: an answer, what a critic says of it, a better one, until the critic is content.

You will see each draft with its critique, at most three, then the last answer. The critic here is
plain Python, which counts; a model is one too: `refine(models.gpt4, verify(models.claude))`.
"""

import asyncio

from ember import models, refine

WORDS = 40
write = models.local.using(temperature=0, max_tokens=80, stop="\n")


async def critic(_: str, draft: object) -> str:
    """What is wrong with a draft: nothing, where it is empty."""
    count = len(str(draft).split())
    critique = f"It has {count} words. Write at most {WORDS}." if count > WORDS else ""
    print(f"{draft}\n  critic: {critique or 'good'}")
    return critique


async def main() -> None:
    careful = refine(write, critic, until=lambda critique: not critique, max_rounds=3)
    print("answer:", await careful("Why is the sky blue?"))


if __name__ == "__main__":
    asyncio.run(main())
