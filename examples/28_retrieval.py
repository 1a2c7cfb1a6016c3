"""Retrieval-augmented answering: look up the best passages, answer from them, check the quote.

You will see the passages for a question, the answer, and whether the words that it rests on stand
in one of them. Words are weighed by BM25; with `models.embedding.embed` it would be vectors. Words
on the command line are asked instead.
"""

import asyncio
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence

from ember import models, predict

DOCUMENTS = [
    "The Nile is 6,650 kilometres long and flows through Egypt.",
    "Mount Everest is 8,849 metres high.",
    "The heart of a blue whale weighs about 180 kilograms.",
    "Honey does not spoil if its jar is closed.",
    "The Eiffel Tower was built in 1889 and is made of iron.",
    "A day on Venus is longer than a year on Venus.",
    "Octopuses have three hearts and blue blood.",
    "The first bicycle without pedals was built in 1817.",
    "Bananas grow upwards, towards the sun.",
    "Glass is made of sand, soda and lime.",
]
DEMO = {
    "question": "How long is the Rhine?",
    "passages": ["The Rhine is 1,230 kilometres long.", "Cologne lies on the Rhine."],
    "quote": "The Rhine is 1,230 kilometres long.",
    "answer": "1,230 kilometres",
}
local = models.local.using(temperature=0, max_tokens=200)
respond = predict("question, passages: list[str] -> quote, answer", model=local, demos=[DEMO])


def top(query: str, documents: Sequence[str], k: int) -> list[str]:
    """The k documents that fit a query best, by BM25: rare words weigh more than common ones."""
    bags = [Counter(re.findall(r"\w+", text.lower())) for text in [query, *documents]]
    asked, *bags = bags
    mean = sum(map(Counter.total, bags)) / len(bags)

    def fit(number: int) -> float:
        bag, score = bags[number], 0.0
        for word in asked.keys() & bag.keys():
            having = sum(word in other for other in bags)
            rarity = math.log(1 + (len(bags) - having + 0.5) / (having + 0.5))
            score += rarity * bag[word] / (bag[word] + 0.3 + 0.9 * bag.total() / mean)
        return score

    return [documents[n] for n in sorted(range(len(bags)), key=fit, reverse=True)[:k]]


async def main() -> None:
    question = " ".join(sys.argv[1:]) or "When was the Eiffel Tower built?"
    passages = top(question, DOCUMENTS, 2)
    print(*passages, sep="\n")
    found = await respond(question, passages)
    quoted = any(found.quote.strip() and found.quote in text for text in passages)
    print(f"\n{found.answer}\n{found.quote!r} is {'a' if quoted else 'no'} quote")


if __name__ == "__main__":
    asyncio.run(main())
