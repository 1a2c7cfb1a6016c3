"""A question-answering system that is one value: some of it learns, and the rest stays as it is.

You will see what its answers are worth before and after training, 1 if right, -4 if wrong and 0 if
it says that it does not know, and the judge's score that an answer needs. Then that a file holds
what it has learned, and what it says to two questions. The log that it learns from is made up; the
model in this process answers, and judges poorly. Training needs JAX, and answering does not.
"""

import asyncio
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import numpy as np

from ember import judge, models
from ember_accel import combine, partition, restore, save, state, static_field

local = models.local.using(temperature=0)
JUDGE = judge(local.using(frequency_penalty=0.5), criteria="is correct", scale=10)
MODELS = local.using(max_tokens=10), local.using(max_tokens=30)
PROMPTS = "Answer in one word.", "Calculate step by step."
KINDS = {"What is the capital of {}?": (0.9, 0.5), "How much is {} and 8?": (0.1, 0.8)}


def embed(text: str) -> Any:
    """The words of a text, as ones at places that their checksums say."""
    return np.isin(np.arange(64), [crc32(word.encode()) % 64 for word in text.split()])


@state
class HybridQA:
    """Asks one of its models, and gives the answer if its judge finds it good enough."""

    weights: Any  # (64, models), learned: who is asked
    threshold: Any = 0.9  # learned: the share of the full score that an answer needs
    models: tuple[Any, ...] = static_field(default=MODELS)
    prompts: tuple[str, ...] = static_field(default=PROMPTS)
    judge: Any = static_field(default=JUDGE)

    async def __call__(self, question: str) -> str:
        """The answer of the model that is asked, or a safe one."""
        place = int((embed(question) @ self.weights).argmax())
        reply = await self.models[place](question, system=self.prompts[place])
        verdict = await self.judge(question, [reply.text])
        return reply.text if verdict.scores[0] / 10 >= self.threshold else "I do not know."


def worth(system: HybridQA, rows: Any, right: Any, scores: Any) -> Any:
    """What an answer is worth, were models drawn by a softmax, and the threshold a slope."""
    import jax

    asked = jax.nn.softmax(rows @ system.weights)
    given = jax.nn.sigmoid((scores - system.threshold) / 0.05)
    return (asked * given * np.where(right, 1, -4)).sum(1).mean()


def trained(system: HybridQA, log: Any) -> HybridQA:
    """The system after 300 steps along the gradient."""
    import jax

    learned, rest = partition(system)
    slope = jax.jit(jax.grad(lambda part: worth(combine(part, rest), *log)))
    for _ in range(300):
        learned = jax.tree.map(lambda old, by: old + 0.1 * by, learned, slope(learned))
    return combine(learned, rest)


async def main() -> None:
    rng = np.random.default_rng(0)
    kinds, rates = rng.permutation([*KINDS] * 100), np.array([*KINDS.values()])
    right = rng.random((200, 2)) < rates[[[*KINDS].index(kind) for kind in kinds]]
    scores = (rng.integers(1, 7, (200, 2)) + 4 * right) / 10
    log = np.array([embed(kind) for kind in kinds]), right, scores
    start = HybridQA(np.zeros((64, 2)))
    system = trained(start, log)
    for when, one in (("before", start), ("after", system)):
        print(f"{when}: worth {worth(one, *log):.2f}, threshold {one.threshold:.2f}")
    with TemporaryDirectory() as folder:
        save(system, f"{folder}/system.npz")
        system_again = restore(start, f"{folder}/system.npz")
    print("restored:", system_again == system)
    for question in ("What is the capital of France?", "How much is 5 and 8?"):
        print(await system_again(question))


if __name__ == "__main__":
    asyncio.run(main())
