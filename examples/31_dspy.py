"""One module, two implementations: Ember's own predict and DSPy's, on the same model.

You will see a question answered straight away and after a thought, by Ember, and by DSPy where it
is installed (`pip install dspy`), then whether they agree. Which of them runs is one word: in the
call, around it, or in the environment, as EMBER_ACCEL=dspy.
"""

import asyncio
import os
from typing import Any

from ember import Model, models, predict
from ember_accel.dispatch import Operation, implementations, on_choice, operation, parity, prefer

QUESTIONS = [
    "Eve has 12 stamps and gets 6. How many has she now?",
    "A bag holds 5 balls. How many balls are in 3 bags?",
]
DEMOS = [
    {"question": "Ann has 5 apples and eats 2. How many has she left?",
     "reasoning": "She had 5 and ate 2. 5 - 2 = 3.", "answer": 3},
    {"question": "A box holds 6 eggs. How many eggs are in 4 boxes?",
     "reasoning": "Each box holds 6 and there are 4. 4 * 6 = 24.", "answer": 24},
    {"question": "Tom has 8 euros and gets 7. How many has he now?",
     "reasoning": "He had 8 and got 7. 8 + 7 = 15.", "answer": 15},
]  # fmt: skip
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")  # DSPy needs no prices from a server


def solver(model: Model, *, reasoning: bool = False) -> Operation[Any]:
    """An operation that answers questions; with reasoning it is a chain of thought."""
    keys = ["question", "reasoning", "answer"] if reasoning else ["question", "answer"]
    demos = [{key: demo[key] for key in keys} for demo in DEMOS]
    ask = predict("question -> answer: int", model=model, demos=demos, reasoning=reasoning)

    async def by_ember(question: str) -> int:
        """The answer to a question."""
        return (await ask(question)).answer

    async def by_dspy(question: str) -> int:
        import dspy

        class Server(dspy.LM):
            supports_response_schema = True  # of which DSPy knows only by the names of models
            supported_params = frozenset({"max_tokens", "response_format", "temperature"})

        url = model.base_url or model.provider.base_url
        url = url() if callable(url) else url
        options = {"temperature": 0, "max_tokens": 100, "cache": False, "num_retries": 0}
        server = Server(f"openai/{model.id}", api_base=url, api_key="none", **options)
        module = (dspy.ChainOfThought if reasoning else dspy.Predict)("question -> answer: int")
        examples = [dspy.Example(**demo).with_inputs("question") for demo in demos]
        with dspy.context(lm=server, adapter=dspy.JSONAdapter()):
            return (await module.acall(question=question, demos=examples)).answer

    name = "chain_of_thought" if reasoning else "predict"
    return operation(name, {"ember": by_ember, "dspy": by_dspy})


async def main() -> None:
    local = models.local.using(temperature=0, max_tokens=100)
    answer, thinking = solver(local), solver(local, reasoning=True)
    with on_choice(lambda ran: print(f"{ran.operation} by {ran.implementation}: ", end="")):
        print(await answer(QUESTIONS[0]))
        print(await thinking(QUESTIONS[0]))
        for name, missing in implementations(answer)["predict"].items():
            with prefer(name):
                print(f"{name}: {missing}" if missing else await thinking(QUESTIONS[1]))
    print(await parity(thinking, [(question,) for question in QUESTIONS]))


if __name__ == "__main__":
    asyncio.run(main())
