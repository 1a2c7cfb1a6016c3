"""Print an answer while the model is still writing it.

You will see a short text appear word by word, then how many pieces it came in and what it took.
The model runs inside this process; with `models.claude` in its place the rest stays as it is.
"""

import asyncio

from ember import models


async def main() -> None:
    """Stream one answer; the reply with its usage is there when the stream has ended."""
    pieces = 0
    question = "Tell me about the sea in two sentences."
    async with models.local.stream(question, temperature=0, max_tokens=100) as stream:
        async for piece in stream:
            print(piece, end="", flush=True)
            pieces += 1
    usage, finish = stream.reply.usage, stream.reply.finish
    print(f"\n{pieces} pieces, {usage.tokens_out} tokens, finish: {finish}")


if __name__ == "__main__":
    asyncio.run(main())
