"""A graph of functions, each of which runs as soon as what it needs is there.

You will see the graph as text for Mermaid, then a report made of two answers that were asked for
at the same time. A parameter's name is the edge; a tuple names the edges of any function.
"""

import asyncio

from ember import Reply, graph, models

ask = models.local.using(temperature=0, max_tokens=40)


async def good(topic: str) -> Reply[str]:
    return await ask(f"Name one good thing about {topic}.")


async def bad(topic: str) -> Reply[str]:
    return await ask(f"Name one bad thing about {topic}.")


async def advice(good: Reply[str], bad: Reply[str]) -> Reply[str]:
    return await ask(f"{good}\n{bad}\nWhat do you advise?")


def paragraphs(*parts: object) -> str:
    return "\n\n".join(map(str, parts))


discuss = graph(good=good, bad=bad, advice=advice, report=(paragraphs, "good", "bad", "advice"))


async def main() -> None:
    """Run the graph: the results of all nodes, by name."""
    print(discuss.mermaid(), end="\n\n")
    results = await discuss(topic="bicycles")
    print(results["report"])


if __name__ == "__main__":
    asyncio.run(main())
