"""Ask a small language model that runs inside this process: no key, no network.

You will see its answer, and below it the tokens, the cost in US dollars and the seconds it took.
Words on the command line are asked instead: `python examples/01_ask.py How deep is the sea?`
"""

import asyncio
import sys

from ember import models


async def main() -> None:
    """Ask, and print what came back."""
    question = " ".join(sys.argv[1:]) or "What is the capital of France?"
    reply = await models.local(question, temperature=0, max_tokens=100)
    print(reply.text)
    usage, cost, seconds = reply.usage, reply.cost, reply.seconds
    print(f"{usage.tokens_in} tokens in, {usage.tokens_out} out, ${cost:.2f}, {seconds:.2f} s")


if __name__ == "__main__":
    asyncio.run(main())
