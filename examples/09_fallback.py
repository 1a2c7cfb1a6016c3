"""Ask several providers, one after the other, until one answers.

You will see the answer, who gave it, and each attempt that was made. Without any key that is the
small model in this process: the others fail before a request is sent.
"""

import asyncio

from ember import fallback, models, track

ask = fallback(
    models.gpt4.using(retries=0, timeout=20),
    models.claude.using(retries=0, timeout=20),
    models.local,
)


async def main() -> None:
    """Ask once; only when all have failed, the last one's error is raised."""
    with track() as ledger:
        reply = await ask("What is the capital of Norway?", max_tokens=50, temperature=0)
    print(f"{reply.text}\nby {reply.model}")
    for call in ledger.calls:
        print(f"{call.provider} {call.model}: {call.outcome}")


if __name__ == "__main__":
    asyncio.run(main())
