"""What the types of the API say. Never run: tests/test_types.py has it type-checked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal, assert_type

from ember import (
    Attempt,
    Budget,
    Consensus,
    Ledger,
    Limit,
    Model,
    Reply,
    Stream,
    Verdict,
    Verification,
    as_completed,
    batch,
    best_of,
    budget,
    cache,
    cascade,
    consensus,
    ensemble,
    fallback,
    gather,
    graph,
    judge,
    limit,
    majority_vote,
    model,
    models,
    parallel,
    predict,
    prompt,
    refine,
    retry,
    sync,
    synthesize,
    track,
    transient,
    verify,
)


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


# ── Decorators and concurrency ───


async def classify(text: str, *, more: int = 3) -> str:
    """A function of the user's own."""
    return text * more


async def size(text: str) -> int:
    """Another one."""
    return len(text)


def as_key(text: str, *, more: int = 3) -> str:
    """The key of a call."""
    return f"{text} {more}"


class Desk:
    """Methods, decorated bare and with arguments."""

    @retry
    async def tried(self, text: str) -> int:
        """Bare."""
        return len(text)

    @retry(max_attempts=5, timeout=60)
    @cache(ttl=3600)
    @batch(size=10)
    @limit(rpm=60)
    async def stacked(self, text: str, *, more: int = 3) -> str:
        """All at once."""
        return text * more

    @cache
    @batch
    async def bare(self, text: str) -> City:
        """Two at once, bare."""
        return City(text, 0)

    @sync
    async def blocking(self, text: str) -> int:
        """A twin that binds."""
        return len(text)


async def decorated() -> None:
    """A decorator keeps parameters and result, bare and with arguments; a task can run it."""
    for kept in (
        retry(classify), retry(max_attempts=3)(classify), retry(classify, timeout=5),
        cache(classify), cache(ttl=60)(classify), cache(ttl=timedelta(days=1))(classify),
        cache(store={}, key=str)(classify), cache(key=as_key)(classify),
        batch(classify), batch(size=3)(classify), batch(classify, size=3),
        limit(concurrency=3)(classify), limit(rpm=60, tpm=1000)(classify),
        retry(on=ValueError)(classify), retry(on=(ValueError, KeyError))(classify),
        retry(on=transient)(classify), retry(on=lambda error: True)(classify),
        fallback(classify), fallback(classify, classify),
    ):  # fmt: skip
        assert_type(await kept("x", more=2), str)
        assert_type(await kept(text="x"), str)
        task = asyncio.create_task(kept("x"))
        assert_type(await task, str)


async def methods() -> None:
    """Decorated methods bind."""
    desk = Desk()
    assert_type(await desk.tried("x"), int)
    assert_type(await desk.stacked("x", more=2), str)
    assert_type(await desk.bare(text="x"), City)
    assert_type(desk.blocking("x"), int)
    assert_type(await Desk.tried(desk, "x"), int)


async def decorated_models() -> None:
    """A decorated model is an async function of a prompt."""
    shared = limit(rpm=60)
    assert_type(shared, Limit)
    assert_type(model("openai:gpt-4o", limit=shared), Model)
    for ask in (
        retry(models.gpt4), retry(max_attempts=3)(models.gpt4), cache(models.gpt4),
        cache(ttl=60)(models.gpt4), batch(models.gpt4), batch(size=3)(models.gpt4),
        fallback(models.gpt4, models.claude),
    ):  # fmt: skip
        assert_type(await ask("x"), Reply[str])
        assert_type((await ask("x", temperature=0, system="y")).text, str)
    assert_type(await shared(models.gpt4)("x", output=int), Reply[Any])
    assert_type(sync(models.gpt4)("x"), Reply[str])


async def together() -> None:
    """gather keeps each type; a list of one type stays one."""
    one, two, three = await gather(classify("x"), size("y"), models.gpt4("z"))
    assert_type(one, str)
    assert_type(two, int)
    assert_type(three, Reply[str])
    both = await gather(classify("x"), size("y"), limit=1)
    assert_type(both[0], str)
    assert_type(both[1], int)
    assert_type(await gather(*[size("x"), size("y")]), list[int])
    maybe, _ = await gather(classify("x"), size("y"), return_exceptions=True)
    assert_type(maybe, str | Exception)


async def over_items() -> None:
    """parallel, batch and as_completed give what the function gives."""
    assert_type(await parallel(classify, ["x"]), list[str])
    assert_type(await parallel(size, (text for text in "xy"), limit=3, progress=True), list[int])
    assert_type(await parallel(size, pages()), list[int])
    assert_type(await parallel(models.gpt4, ["x"]), list[Reply[str]])
    assert_type(await parallel(Desk().stacked, ["x"], on_error="raise"), list[str])
    assert_type(await parallel(size, ["x"], on_error="return"), list[int | Exception])
    assert_type(await batch(classify, ["x"], size=32), list[str])
    assert_type(await batch(size, pages()), list[int])
    assert_type(await batch(models.gpt4, ["x"]), list[Reply[str]])
    async for index, result in as_completed(size, ["x"], limit=3):
        assert_type(index, int)
        assert_type(result, int)
    async for _, outcome in as_completed(size, pages(), on_error="return"):
        assert_type(outcome, int | Exception)
    async with aclosing(as_completed(models.gpt4, ["x"])) as results:
        assert_type(await anext(results), tuple[int, Reply[str]])


async def pages() -> AsyncIterator[str]:
    """An async generator of items."""
    yield "x"


async def graphs() -> None:
    """A graph gives its results by name; a twin blocks."""
    calls = graph(classify=classify, size=(size, "classify"), plain=len)
    assert_type(await calls("x"), dict[str, Any])
    assert_type(await graph({"size": size}, limit=3, inner=calls)(text="x"), dict[str, Any])
    assert_type(calls.order, tuple[str, ...])
    assert_type(calls.mermaid(), str)
    assert_type(sync(classify)("x", more=2), str)
    assert_type(sync(size)(text="x"), int)
    assert_type(sync(calls)("x"), dict[str, Any])


async def ledgers() -> None:
    """Ledgers and budgets are context managers that give themselves."""
    with track() as ledger, budget(usd=1.0, warn=0.5, on_warn=print) as spent:
        await models.gpt4("x")
    assert_type(ledger, Ledger)
    assert_type(spent, Budget)
    assert_type((ledger.requests, ledger.cost, spent.left), tuple[int, float, float])
    assert_type(ledger.calls, list[Attempt])
    assert_type(ledger.by_model["x"].tokens_in, int)
    with track(lambda attempt: print(attempt.cost, attempt.parent)):
        pass
    total = Ledger()
    total.add(ledger)


async def more_mistakes() -> None:
    """Each is an error, as those above."""
    await retry(classify)(5)  # type: ignore[arg-type]  # pyright: ignore
    await cache(ttl=5)(classify)("x", mor=2)  # type: ignore[call-arg]  # pyright: ignore
    await batch(size=5)(classify)()  # type: ignore[call-arg]  # pyright: ignore
    await limit(rpm=5)(classify)("x", 2)  # type: ignore[call-arg]  # pyright: ignore
    await fallback(classify, classify)(5)  # type: ignore[arg-type]  # pyright: ignore
    await Desk().stacked(5)  # type: ignore[arg-type]  # pyright: ignore
    retry(max_attempts="3")(classify)  # type: ignore[call-overload]  # pyright: ignore
    cache(ttl="day")(classify)  # type: ignore[call-overload]  # pyright: ignore
    batch(size="10")(classify)  # type: ignore[call-overload]  # pyright: ignore
    limit(rpm="60")  # type: ignore[arg-type]  # pyright: ignore
    limit(60)  # type: ignore[call-arg]  # pyright: ignore
    retry(len)  # type: ignore[arg-type]  # pyright: ignore
    cache(len)  # type: ignore[arg-type]  # pyright: ignore
    sync(len)  # type: ignore[arg-type]  # pyright: ignore
    sync(classify)(5)  # type: ignore[arg-type]  # pyright: ignore
    await gather(5)  # type: ignore[call-overload]  # pyright: ignore
    await parallel(classify, [5])  # type: ignore[arg-type]  # pyright: ignore
    await parallel(classify, 5)  # type: ignore[call-overload]  # pyright: ignore
    await parallel(len, ["x"])  # type: ignore[arg-type]  # pyright: ignore
    await parallel(size, ["x"], on_error="ignore")  # type: ignore[call-overload]  # pyright: ignore
    await batch(classify, [5])  # type: ignore[arg-type]  # pyright: ignore
    as_completed(classify, [5])  # type: ignore[arg-type]  # pyright: ignore
    graph(classify=5)  # type: ignore[arg-type]  # pyright: ignore
    budget("1")  # type: ignore[arg-type]  # pyright: ignore
    track(5)  # type: ignore[arg-type]  # pyright: ignore


# ── Ensembles and prompts ───


async def closeness(text: str) -> float:
    """How good an answer is."""
    return float(len(text))


async def critic(question: object, answer: str) -> Verification[str]:
    """What is wrong with an answer."""
    return Verification(ok=bool(question), reason="", answer=answer)


async def ensembles() -> None:
    """Many answers have the parameters of the function that gives them."""
    assert_type(await ensemble(classify)("x", more=2), list[str])
    assert_type(await ensemble(classify, classify, n=2, quorum=3)(text="x"), list[str])
    asked = await ensemble(models.gpt4, models.claude, n=2)("x", temperature=0)
    assert_type(asked, list[Reply[str]])
    assert_type(majority_vote(asked), Reply[str])
    assert_type(majority_vote([1, 2], key=str), int)
    votes = await consensus(classify, n=5, key=str.casefold)("x", more=2)
    assert_type(votes, Consensus[str])
    assert_type((votes.answer, votes.share), tuple[str, float])
    assert_type((await consensus(models.gpt4)("x")).answer, Reply[str])
    assert_type(await best_of(classify, 3, len)("x", more=2), str)
    assert_type(await best_of(classify, n=3, score=closeness)(text="x"), str)
    assert_type(await cascade(classify, classify, accept=str.isalpha)("x", more=2), str)
    assert_type(await cascade(models.gpt4, models.claude, accept=bool)("x"), Reply[str])


async def judges() -> None:
    """A verdict is of what was judged; what a model writes is what it returns."""
    verdict = await judge(models.gpt4, "is short", scale=5, seed=1)("x?", ["a", "b"])
    assert_type(verdict, Verdict[str])
    assert_type(verdict.answer, str)
    assert_type(verdict.index, int)
    assert_type(verdict.scores, tuple[float, ...])
    replies = await ensemble(models.gpt4)("x?")
    assert_type((await judge(models.gpt4, ["is short"])("x?", replies)).answer, Reply[str])
    assert_type(await synthesize(models.gpt4)("x?", replies), Reply[str])
    assert_type(await synthesize(classify)("x?", ["a", "b"]), str)
    checked = await verify(models.gpt4)("x?", "a")
    assert_type((checked.ok, checked.reason), tuple[bool, str])
    assert_type(checked.answer, str)
    better = refine(classify, critic, until=lambda critique: critique.ok, max_rounds=2)
    assert_type(await better("x?"), str)
    assert_type(await refine(models.gpt4, verify(models.claude))("x?"), Reply[str])


@prompt(models.gpt4)
async def describe(text: str, max_words: int = 100, *, more: list[str] | None = None) -> City:
    """Describe {text} in {max_words} words, and {more}."""
    raise NotImplementedError


@prompt(classify)
async def shorten(text: str) -> Reply[str]:
    """Shorten {text}."""
    raise NotImplementedError


class Pen:
    """Methods that are prompts."""

    @prompt(retry(models.gpt4))
    async def write(self, topic: str) -> Annotated[int, "how many"]:
        """Write about {topic}."""
        raise NotImplementedError

    @retry
    @cache(ttl=60)
    @prompt(models.gpt4)
    async def stacked(self, topic: str) -> list[City]:
        """Write about {topic}."""
        raise NotImplementedError


async def prompts() -> None:
    """A prompt has the parameters and the result that it is written with."""
    assert_type(await describe("x", 5, more=["y"]), City)
    assert_type(await describe(text="x"), City)
    assert_type(await shorten("x"), Reply[str])
    assert_type(await Pen().write("x"), int)
    assert_type(await Pen().stacked(topic="x"), list[City])
    for kept in (retry(describe), cache(describe), batch(describe), fallback(describe)):
        assert_type(await kept("x", max_words=5), City)
    assert_type(await ensemble(describe, n=2)("x", 5), list[City])
    assert_type(await gather(describe("x"), shorten("y")), tuple[City, Reply[str]])
    assert_type(await parallel(describe, ["x"]), list[City])
    assert_type(sync(describe)("x"), City)
    find = predict("question -> answer: str", model=models.gpt4, reasoning=True, demos=[{}])
    assert_type(await find("x"), Any)
    assert_type(await predict("a, b -> c", model=classify, tools=[closeness, len])("x", b=5), Any)
    assert_type(await prompt(find)(classify)("x", more=3), str)


async def still_more_mistakes() -> None:
    """Each is an error, as those above."""
    await ensemble(classify)(5)  # type: ignore[arg-type]  # pyright: ignore
    await ensemble(classify)("x", mor=2)  # type: ignore[call-arg]  # pyright: ignore
    ensemble(classify, n="2")  # type: ignore[arg-type]  # pyright: ignore
    ensemble(len)  # type: ignore[arg-type]  # pyright: ignore
    await consensus(classify)(5)  # type: ignore[arg-type]  # pyright: ignore
    await best_of(classify, 3, len)(5)  # type: ignore[arg-type]  # pyright: ignore
    best_of(classify, 3)  # type: ignore[call-arg]  # pyright: ignore
    cascade(classify, classify)  # type: ignore[call-arg]  # pyright: ignore
    judge(len)  # type: ignore[arg-type]  # pyright: ignore
    await judge(models.gpt4)("x?")  # type: ignore[call-arg]  # pyright: ignore
    await judge(models.gpt4)("x?", 5)  # type: ignore[arg-type]  # pyright: ignore
    await verify(models.gpt4)("x?")  # type: ignore[call-arg]  # pyright: ignore
    refine(classify)  # type: ignore[call-arg]  # pyright: ignore
    await describe(5)  # type: ignore[arg-type]  # pyright: ignore
    await describe("x", "ten")  # type: ignore[arg-type]  # pyright: ignore
    await describe("x", 5, [])  # type: ignore[call-arg]  # pyright: ignore
    await Pen().write()  # type: ignore[call-arg]  # pyright: ignore
    prompt(len)  # type: ignore[arg-type]  # pyright: ignore
    prompt(models.gpt4)(len)  # type: ignore[arg-type]  # pyright: ignore
    predict("a -> b")  # type: ignore[call-arg]  # pyright: ignore
    predict("a -> b", classify)  # type: ignore[call-arg]  # pyright: ignore
    predict("a -> b", model=len)  # type: ignore[arg-type]  # pyright: ignore
