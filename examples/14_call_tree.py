"""Draw what happened in a run, from the attempts that `on_call` sees, as text for Mermaid.

You will see a flowchart: the function that was called, those that it called, and below each its
requests, with their outcome and their time.
"""

import asyncio
from itertools import pairwise

from ember import Attempt, batch, gather, models, retry, track

ask = models.local.using(temperature=0, max_tokens=20)


@batch(size=2)
async def fact(country: str) -> str:
    return (await ask(f"What is the capital of {country}?")).text


@retry(max_attempts=3)
async def comparison(*countries: str) -> str:
    facts = await gather(*map(fact, countries))
    return (await ask(f"{' '.join(facts)}\nWhich of these cities is larger?")).text


def flowchart(calls: list[Attempt]) -> str:
    """The tree: `call.path` leads from the outermost function to the attempt."""
    ends = {c: (c.id, f"{c.model}<br>{c.outcome}, {c.seconds:.1f} s") for c in calls}
    paths = [(*call.path, end) for call, end in ends.items()]
    names = {key: name.replace('"', "'") for path in paths for key, name in path}
    edges = dict.fromkeys((a, b) for path in paths for (a, _), (b, _) in pairwise(path))
    nodes = [f'    {key}["{name}"]' for key, name in names.items()]
    return "\n".join(["flowchart TD", *nodes, *(f"    {a} --> {b}" for a, b in edges)])


async def main() -> None:
    calls: list[Attempt] = []
    with track(on_call=calls.append):
        await comparison("Norway", "France")
    print(flowchart(calls))


if __name__ == "__main__":
    asyncio.run(main())
