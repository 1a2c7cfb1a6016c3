"""Keep the answers of `cache` in Redis, so that all machines share them.

You will see the answer, and whether it was cached: the second one is, and in the next hour both.
REDIS_URL names the server. Without one you will see a warning, and the answer all the same.
"""

import asyncio
import os

from redis.asyncio import Redis

from ember import cache, models


class Expiring:
    """A store whose entries Redis drops after so many seconds."""

    def __init__(self, redis: Redis, seconds: int) -> None:
        self.redis, self.seconds = redis, seconds

    async def get(self, key: str) -> bytes | None:
        """What was set, or None."""
        return await self.redis.get(f"ember:{key}")

    async def set(self, key: str, value: str) -> None:
        """Keep a row of the cache, which is text."""
        await self.redis.set(f"ember:{key}", value, ex=self.seconds)


async def main() -> None:
    """Ask twice; the client belongs to this event loop, so it is made and closed here."""
    async with Redis.from_url(os.environ.get("REDIS_URL", "redis://localhost")) as redis:
        ask = cache(models.local, store=Expiring(redis, 3600))
        for _ in range(2):
            reply = await ask("What is the capital of France?", temperature=0, max_tokens=50)
            print(f"{reply.text} (cached: {reply.cached})")


if __name__ == "__main__":
    asyncio.run(main())
