"""A network of models: three answer, and a judge picks the best answer.

You will see the answers with their scores, then the judge's choice. Three variants of the small
model in this process stand for three models, and so small a judge judges poorly. With keys, write
`models.gpt4, models.claude, models.gemini`: the rest stays as it is.
"""

import asyncio

from ember import ensemble, judge, models

local = models.local.using(max_tokens=30, stop="\n")
steady, lively, wild = (local.using(temperature=t, seed=1) for t in (0, 0.5, 1))


async def main() -> None:
    ask = ensemble(steady, lively, wild)
    best = judge(models.local.using(temperature=0))
    question = "What is the capital of France?"
    answers = await ask(question)
    verdict = await best(question, answers)
    print(*zip(verdict.scores, map(str, answers), strict=True), sep="\n")
    print(f"The best one: {verdict.answer}")


if __name__ == "__main__":
    asyncio.run(main())
