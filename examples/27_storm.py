"""A pipeline like STORM's: outline, research each section from several sides, write, assemble.

You will see a page with a section for each heading. For each heading a question is asked from each
side and answered, and the section is written from the answers; all sections run at the same time.
Words on the command line are the topic instead.
"""

import asyncio
import sys
from typing import Annotated

from pydantic import Field

from ember import gather, graph, models, parallel, prompt, track

SIDES = ["a child", "a scientist"]
Heading = Annotated[str, Field(description="two or three words", max_length=30)]
local = models.local.using(temperature=0, max_tokens=20, stop="\n")


@prompt(models.local.using(temperature=0, max_tokens=100))
async def outline(topic: str) -> tuple[Heading, Heading]:
    """Write the headings of two chapters of a book on {topic}."""


@prompt(local)
async def question(topic: str, heading: str, side: str) -> str:
    """Write a question that {side} has on {topic}, on "{heading}"."""


@prompt(local.using(max_tokens=40))
async def section(topic: str, heading: str, notes: list[str]) -> str:
    """Write a paragraph on {topic}, on "{heading}", from these notes: {notes}."""


async def research(topic: str, heading: str, side: str) -> str:
    """What is found when somebody asks."""
    asked = await question(topic, heading, side)
    return f"{asked} {await local(asked)}"


async def sections(topic: str, outline: tuple[str, ...]) -> list[str]:
    """A section for each heading, each written from its own research."""

    async def written(heading: str) -> str:
        notes = await gather(*(research(topic, heading, side) for side in SIDES))
        return f"## {heading}\n\n{await section(topic, heading, notes)}"

    return await parallel(written, outline)


def page(topic: str, sections: list[str]) -> str:
    return "\n\n".join([f"# {topic}", *sections])


storm = graph(outline=outline, sections=sections, page=page)


async def main() -> None:
    with track() as ledger:
        results = await storm(topic=" ".join(sys.argv[1:]) or "The sea")
    print(f"{results['page']}\n\n{ledger.requests} requests")


if __name__ == "__main__":
    asyncio.run(main())
