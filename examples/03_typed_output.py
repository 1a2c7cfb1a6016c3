"""Get a value of your own type instead of text.

You will see a `Review` for each text. Its JSON schema goes along, and the model in this process
cannot but follow it: so small a model may read wrongly, but the form is always right.
"""

import asyncio
from dataclasses import dataclass
from typing import Literal

from ember import models

TEXTS = "The soup was wonderful and the bread fresh.", "The waiter was rude to us."


@dataclass
class Review:
    """What a text says."""

    about: Literal["food", "service", "price"]
    sentiment: Literal["positive", "negative"]


async def main() -> None:
    """Read the texts side by side."""
    question = "Is this review positive or negative, and what is it about?"
    read = models.local.using(temperature=0, max_tokens=100)
    asked = [read(f"{question}\n\n{text}", output=Review) for text in TEXTS]
    for reply in await asyncio.gather(*asked):
        print(reply.data)


if __name__ == "__main__":
    asyncio.run(main())
