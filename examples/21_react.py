"""ReAct: a model reasons, acts by calling functions, sees what they return, and then answers.

You will see what it looks up and computes, then the typed answer and its reasoning. The model is a
recording, as the small one cannot call functions: with a key, take `models.gpt4`.
"""

import asyncio
import json

import httpx

from ember import model, predict

PEOPLE = {"Oslo": 720_000, "Bergen": 290_000}


async def inhabitants(city: str) -> int:
    """How many people live in a city."""
    print(f"inhabitants of {city}: {PEOPLE[city]:,}")
    return PEOPLE[city]


def ratio(large: float, small: float) -> float:
    """One number divided by another, rounded."""
    print(f"{large:,} / {small:,} = {large / small:.1f}")
    return round(large / small, 1)


ACTS = [  # what the model did: two calls at once, one with their results, then the answer
    [("inhabitants", {"city": "Oslo"}), ("inhabitants", {"city": "Bergen"})],
    [("ratio", {"large": 720_000, "small": 290_000})],
]
ANSWER = {"reasoning": "720,000 are 2.5 times 290,000.", "answer": "Oslo", "times": 2.5}


def recorded(request: httpx.Request) -> httpx.Response:
    """What OpenAI answered, by how often the model has acted before."""
    done = sum(m["role"] == "assistant" for m in json.loads(request.content)["messages"])
    said = [{"name": name, "arguments": json.dumps(given)} for name, given in [*ACTS, ()][done]]
    calls = [{"id": f"{done}-{n}", "function": call} for n, call in enumerate(said)]
    message = {"tool_calls": calls} if calls else {"content": json.dumps(ANSWER)}
    return httpx.Response(200, json={"choices": [{"message": message}]})


async def main() -> None:
    gpt = model("openai:gpt-4.1", api_key="none", transport=httpx.MockTransport(recorded))
    signature, tools = "question -> answer: str, times: float", [inhabitants, ratio]
    solve = predict(signature, model=gpt, tools=tools, reasoning=True)
    found = await solve("Which is larger, Oslo or Bergen, and how many times?")
    print(f"{found.answer}, {found.times} times. {found.reasoning}")


if __name__ == "__main__":
    asyncio.run(main())
