"""Learn a router from a log of calls, route with it, and plot its cost-quality curve.

You will see, for questions that it has not seen, what the router's choices cost and how good they
are, by how many cents a right answer is worth; then each model alone; then where a picture of that
is: `python examples/33_learn_a_router.py curve.svg` says where to. Last, who answers four more.
The two models are made up, and the embedding only counts words. Real ones would be
`routed(router, {"small": models.gpt5_mini, "large": models.gpt5}, models.embedding.embed)`.
"""

import asyncio
import sys
from tempfile import mkdtemp
from typing import Any
from zlib import crc32

import anyio
import numpy as np

from ember import parallel
from ember_accel import cost_quality_curve, fit_router, routed

KINDS = [  # a question, its answer, and how often the small and the large model are right
    ("What is {a} + {b}?", lambda a, b: a + b, (0.97, 0.98)),
    ("What is {a} - {b}?", lambda a, b: a - b, (0.90, 0.97)),
    ("Ann has {a} bags of {b} apples. How many is that?", lambda a, b: a * b, (0.70, 0.95)),
    ("Tom, who is {a}, is {b} older than Eve. How old is she?", lambda a, b: a - b, (0.20, 0.90)),
]
LOG = {
    text.format(a=a, b=b): (answer(a, b), rates)
    for text, answer, rates in KINDS for a in range(10, 25) for b in range(2, 10)
}  # fmt: skip


async def small(question: str) -> tuple[str, int]:
    """Its name, and its answer."""
    answer, rates = LOG[question]
    return "small", answer + (crc32(f"small {question}".encode()) > rates[0] * 2**32)


async def large(question: str) -> tuple[str, int]:
    """Its name, and its answer."""
    answer, rates = LOG[question]
    return "large", answer + (crc32(f"large {question}".encode()) > rates[1] * 2**32)


def embed(texts: list[str]) -> Any:
    """How often the words of each text are in it, at places that their checksums say."""
    rows = np.zeros((len(texts), 64))
    for row, text in zip(rows, texts, strict=True):
        np.add.at(row, [crc32(word.encode()) % 64 for word in text.split()], 1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


async def main() -> None:
    models, cents = {"small": small, "large": large}, [0.1, 1.0]
    asked = [str(each) for each in np.random.default_rng(0).permutation([*LOG])]
    answers = [await parallel(model, asked) for model in models.values()]
    quality = np.array([[each == LOG[one][0] for one, (_, each) in zip(asked, said, strict=True)]
                        for said in answers]).T  # fmt: skip
    rows, seen, new = embed(asked), slice(300), slice(300, None)
    known = {"prompts": asked[seen], "names": [*models]}
    router = fit_router(rows[seen], quality[seen], cents, **known)
    worth = {"prompts": asked[new], "willingness": [0.5, 1, 2, 4, 8, 99]}
    curve = cost_quality_curve(router, rows[new], quality[new], **worth)
    picture = sys.argv[1] if sys.argv[1:] else f"{mkdtemp()}/curve.svg"
    await anyio.Path(picture).write_text(curve.svg(), encoding="utf-8")
    print(curve, f"picture: {picture}", sep="\n")
    ask = routed(router, models, embed, willingness=4)
    for text, _, _ in KINDS:
        question = text.format(a=17, b=5)
        print(question, *await ask(question))


if __name__ == "__main__":
    asyncio.run(main())
