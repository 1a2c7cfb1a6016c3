"""Extraction: texts become values of your own types, by functions whose docstring is the prompt.

You will see the tone of two reviews, and what two mails order. No answer can be outside of the type
of the result. `Annotated` says what a field means; in a prompt `{{` stands for a brace.
"""

import asyncio
from dataclasses import dataclass
from typing import Annotated, Literal

from ember import models, parallel, prompt

REVIEWS = ["The soup was wonderful.", "The waiter was rude to us."]
MAILS = [
    "Two blue lamps, please. I live in Oslo.",
    "I would like to order 3 red chairs. I live in Rome.",
]
local = models.local.using(temperature=0, max_tokens=200)


@dataclass
class Order:
    """What a customer wants."""

    quantity: Annotated[int, "how many of it"]
    colour: Literal["red", "green", "blue"]
    product: Annotated[str, "what is ordered, in the singular"]
    city: Annotated[str, "where it is sent"]


@prompt(local)
async def tone(review: str) -> Literal["positive", "negative"]:
    """Say whether the tone of this sentence is positive or negative.

    {review}
    """


@prompt(local)
async def order(mail: str) -> Order:
    """Read quantity, colour, product and city from an order.

    Order: Five green pans, please. I live in Paris.
    {{"quantity": 5, "colour": "green", "product": "pan", "city": "Paris"}}

    Order: {mail}
    """


async def main() -> None:
    print(*await parallel(tone, REVIEWS), sep="\n")
    print(*await parallel(order, MAILS), sep="\n")


if __name__ == "__main__":
    asyncio.run(main())
