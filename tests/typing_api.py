"""What the types of the API say. Never run: tests/test_types.py has it type-checked."""

from dataclasses import dataclass
from typing import Any, Literal, assert_type

from ember import Model, Reply, Stream, model, models


@dataclass
class City:
    """A type of the user's own."""

    name: str
    inhabitants: int


async def calls() -> None:
    """A reply's data is text, or what `output=` names."""
    assert_type(await models.gpt4("x"), Reply[str])
    assert_type(await models("openai:gpt-4o", "x"), Reply[str])
    assert_type(await models.gpt4("x", temperature=0, stop=["."], system="y"), Reply[str])
    assert_type(await models.gpt4("x", reasoning_effort="low"), Reply[str])
    assert_type(await models.gpt4([{"role": "user", "content": "x"}]), Reply[str])
    assert_type((await models.gpt4("x")).data, str)
    assert_type((await models.gpt4("x")).cost, float | None)


async def outputs() -> None:
    """`output=` types the data; a form that is no class gives Any."""
    assert_type(await models.gpt4("x", output=int), Reply[int])
    assert_type(await models("openai:gpt-4o", "x", output=int), Reply[int])
    assert_type((await models.gpt4("x", output=City)).data, City)
    assert_type((await models.gpt4("x", output=list[int])).data, list[int])
    assert_type((await models.gpt4("x", output=dict[str, City])).data, dict[str, City])
    assert_type(await models.gpt4("x", output=Literal["a", "b"]), Reply[Any])


async def streams() -> None:
    """A stream's pieces are text, and then there is a reply."""
    assert_type(models.gpt4.stream("x"), Stream)
    async for piece in models.gpt4.stream("x", temperature=0):
        assert_type(piece, str)
    async with models.gpt4.stream("x") as stream:
        async for piece in stream:
            assert_type(piece, str)
        assert_type(stream.reply.text, str)


async def others() -> None:
    """Embeddings, and models of one's own."""
    assert_type(await models.embedding.embed(["x"]), list[list[float]])
    assert_type(models.gpt4.using(temperature=0), Model)
    assert_type(model("openai:gpt-4o", base_url="x", api_key="k", retries=5), Model)


async def mistakes() -> None:
    """Each is an error: a comment here that no checker needs is one too."""
    models.gpt4_mni  # type: ignore[attr-defined]  # pyright: ignore
    await models.gpt4("x", temperature="hot")  # type: ignore[call-overload]  # pyright: ignore
    await models.gpt4("x", max_tokens="many")  # type: ignore[call-overload]  # pyright: ignore
    await models.gpt4()  # type: ignore[call-overload]  # pyright: ignore
    models.gpt4.id = "x"  # type: ignore[misc]  # pyright: ignore
