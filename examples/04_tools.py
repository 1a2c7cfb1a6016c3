"""Let a model call your functions, async and plain ones side by side.

You will see two calls, then an answer. The model is a recording: with a key, take `models.gpt4`.
"""

import asyncio

import httpx

from ember import model


async def weather(city: str) -> str:
    """The weather in a city now."""
    print(f"the weather in {city}?")
    return "4 degrees and rain"


def inhabitants(city: str) -> int:
    """How many people live in a city."""
    print(f"the inhabitants of {city}?")
    return {"Oslo": 720_000}[city]


def recorded(request: httpx.Request) -> httpx.Response:
    """What OpenAI answered: to the question two tool calls, to their results a text."""
    names = [] if b"tool_call_id" in request.content else ["weather", "inhabitants"]
    calls = [{"id": f, "function": {"name": f, "arguments": '{"city": "Oslo"}'}} for f in names]
    message = {"tool_calls": calls} if calls else {"content": "720,000 people, 4 degrees, rain."}
    return httpx.Response(200, json={"choices": [{"message": message}]})


async def main() -> None:
    """Give the model both functions: it sees their names, types and docstrings."""
    gpt = model("openai:gpt-4.1", api_key="none", transport=httpx.MockTransport(recorded))
    print(await gpt("Tell me about Oslo", tools=[weather, inhabitants]))


if __name__ == "__main__":
    asyncio.run(main())
