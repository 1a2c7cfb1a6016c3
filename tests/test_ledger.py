"""track: what calls took, counted once in each ledger, wherever they were made."""

import asyncio
import contextvars
import functools
import pickle
import random
import re
import statistics
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import httpx
import pytest
import trio
from conftest import Connect
from server import WIRES, Answer, Server, Wire, until

import ember
from ember import Attempt, Ledger, budget, cache, limit, retry, track

PRICE = (1.0, 2.0)
COST = (11 * 1.0 + 7 * 2.0) / 1e6  # of one answer, by the server's counts

pytestmark = pytest.mark.usefixtures("no_backoff")


@pytest.fixture
def ask(server: Server, connect: Connect) -> ember.Model:
    """A model with a price, whose server answers at once."""
    server.play(WIRES["openai"].good())
    return connect(WIRES["openai"], price=PRICE)


def names(attempt: Attempt) -> list[str]:
    """The functions that an attempt was made in, outermost first."""
    return [name for _, name in attempt.path]


# ── Sums ───


async def test_a_ledger_counts_calls_tokens_and_cost(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    ask = connect(wire, price=PRICE)
    with track() as ledger:
        for _ in range(3):
            await ask("hi")
    await ask("after")
    assert (ledger.requests, ledger.failures, ledger.hits) == (3, 0, 0)
    assert (ledger.tokens_in, ledger.tokens_out) == (33, 21)
    assert ledger.cost == pytest.approx(3 * COST)
    assert (ledger.saved, ledger.uncertain) == (0, 0)
    assert len(ledger.calls) == 3


def test_an_empty_ledger_is_all_zeros() -> None:
    with track() as ledger:
        pass
    sums = (ledger.requests, ledger.failures, ledger.hits, ledger.tokens_in, ledger.tokens_out)
    assert sums == (0, 0, 0, 0, 0)
    assert (ledger.cost, ledger.saved, ledger.uncertain) == (0, 0, 0)
    assert (ledger.p50, ledger.p95) == (0, 0)
    assert (ledger.calls, ledger.by_model, ledger.by_function) == ([], {}, {})
    assert str(ledger)


async def test_an_attempt_says_what_it_was(server: Server, connect: Connect, wire: Wire) -> None:
    server.play(wire.good(pause=0.01))
    before = time.time()
    with track() as ledger:
        reply = await connect(wire, price=PRICE)("hi")
    [attempt] = ledger.calls
    assert (attempt.model, attempt.provider) == (wire.id, wire.provider)
    assert (attempt.function, attempt.parent, attempt.path) == ("", None, ())
    assert (attempt.outcome, attempt.error, attempt.uncertain) == ("ok", None, 0)
    assert (attempt.usage, attempt.cost) == (reply.usage, reply.cost)
    assert before - 1 <= attempt.started <= time.time()
    assert 0 < attempt.seconds <= time.time() - before + 0.001
    with pytest.raises(AttributeError):
        attempt.cost = 0.0  # type: ignore[misc]


async def test_sums_by_model_and_by_function(server: Server, connect: Connect) -> None:
    gpt, claude = (connect(wire, price=PRICE) for wire in WIRES.values())
    server.play(lambda seen: WIRES["anthropic" if "messages" in seen.path else "openai"].good())

    @limit(concurrency=8)
    async def draft() -> None:
        await gpt("hi")

    @retry
    async def check() -> None:
        await gpt("hi")
        await claude("hi")

    with track() as ledger:
        await draft()
        await check()
        await check()
        await claude("hi")
    assert {name: part.requests for name, part in ledger.by_model.items()} == {
        WIRES["openai"].id: 3, WIRES["anthropic"].id: 3,
    }  # fmt: skip
    assert ledger.by_model[WIRES["openai"].id].cost == pytest.approx(3 * COST)
    assert ledger.by_function["draft"].requests == 1
    assert ledger.by_function["check"].requests == 4
    assert ledger.by_function["check"].tokens_in == 44
    assert ledger.by_function["check"].by_model[WIRES["anthropic"].id].requests == 2


async def test_failed_attempts_are_counted_with_their_errors(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(
        Answer(wire.problem("busy"), 503),
        wire.good(fault="reset"),
        Answer(b"this is no JSON"),
        wire.good(),
    )
    with track() as ledger:
        await connect(wire, retries=3, price=PRICE)("hi")
    assert (ledger.requests, ledger.failures) == (4, 3)
    assert ledger.cost == pytest.approx(COST)
    kinds = [type(attempt.error) for attempt in ledger.calls]
    assert kinds == [ember.CallError, ember.CallError, ember.ReplyError, type(None)]
    for attempt in ledger.calls[:3]:
        assert attempt.outcome.startswith(f"{type(attempt.error).__name__}: ")
        assert attempt.usage == ember.Usage()
    assert "503" in ledger.calls[0].outcome
    assert ledger.calls[3].outcome == "ok"


async def test_a_call_that_fails_for_good_is_counted(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(Answer(wire.problem("invalid_request_error"), 400))
    with track() as ledger, pytest.raises(ember.CallError):
        await connect(wire)("hi")
    assert (ledger.requests, ledger.failures, ledger.cost) == (1, 1, 0)


async def test_a_cancelled_attempt_is_counted_as_such(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good(fault="hang"))
    with track() as ledger:
        async with anyio.create_task_group() as group:
            group.start_soon(connect(wire), "hi")
            await until(lambda: len(server.requests) == 1)
            group.cancel_scope.cancel()
    [attempt] = ledger.calls
    assert (attempt.outcome, attempt.error, ledger.failures) == ("cancelled", None, 1)


async def test_the_cost_of_an_unknown_price_is_none(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    with track() as ledger:
        await connect(wire, price=None)("hi")
        await connect(wire, price=PRICE)("hi")
    assert [attempt.cost for attempt in ledger.calls] == [None, pytest.approx(COST)]
    assert ledger.cost == pytest.approx(COST)


async def test_the_typed_answer_that_was_wrong_is_counted_too(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good("seven"), wire.good('{"value": 7}'))
    with track() as ledger:
        reply = await connect(wire, price=PRICE)("hi", output=int)
    assert (reply.data, ledger.requests) == (7, 2)
    assert ledger.cost == pytest.approx(2 * COST) == reply.cost


async def test_latencies_are_quantiles_of_the_attempts(
    server: Server, ask: ember.Model
) -> None:
    pauses = [random.Random(7).uniform(0, 0.01) for _ in range(21)]
    server.play(*(WIRES["openai"].good(pause=pause) for pause in pauses))
    with track() as ledger:
        for _ in range(21):
            await ask("hi")
    seconds = sorted(attempt.seconds for attempt in ledger.calls)
    assert ledger.p50 == statistics.median(seconds)
    assert seconds[18] <= ledger.p95 <= seconds[20]


async def test_embeddings_and_streams_are_counted(
    server: Server, connect: Connect, wire: Wire
) -> None:
    with track() as ledger:
        server.play(wire.stream("a", "b"))
        async with connect(wire, price=PRICE).stream("hi") as stream:
            assert [piece async for piece in stream] == ["a", "b"]
        assert (ledger.requests, ledger.tokens_out) == (1, 7)
        if wire.provider == "openai":
            vectors = [{"index": 0, "embedding": [1.0]}]
            server.play(Answer({"data": vectors, "usage": {"prompt_tokens": 5}}))
            await connect(wire, price=PRICE).embed(["hi"])
            assert (ledger.requests, ledger.tokens_in) == (2, 16)


# ── What caches save ───


async def test_a_hit_is_counted_with_what_it_saved(server: Server, ask: ember.Model) -> None:
    @cache(store={})
    async def classify(text: str) -> ember.Reply[str]:
        return await ask(text)

    with track() as ledger:
        replies = [await classify("a") for _ in range(3)]
    assert len(server.requests) == ledger.requests == 1
    assert [reply.cached for reply in replies] == [False, True, True]
    assert ledger.hits == 2
    assert ledger.saved == pytest.approx(2 * COST)
    assert ledger.cost == pytest.approx(COST)
    assert ledger.by_function["classify"].hits == 2
    assert ledger.by_function["classify"].saved == pytest.approx(2 * COST)


async def test_a_joined_flight_is_a_hit(server: Server, ask: ember.Model) -> None:
    server.play(WIRES["openai"].good(pause=0.01))

    @cache(store={})
    async def classify(text: str) -> ember.Reply[str]:
        return await ask(text)

    with track() as ledger:
        replies = await asyncio.gather(*(classify("a") for _ in range(5)))
    assert len(server.requests) == ledger.requests == 1
    assert sum(reply.cached for reply in replies) == ledger.hits == 4
    assert ledger.saved == pytest.approx(4 * COST)


async def test_a_hit_is_counted_in_the_ledger_of_its_caller(ask: ember.Model) -> None:
    @cache(store={})
    async def classify(text: str) -> str:
        return (await ask(text)).text

    with track() as first:
        await classify("a")
    with track() as second:
        await classify("a")
    assert (first.requests, first.hits, second.requests, second.hits) == (1, 0, 0, 1)


# ── on_call, and the tree ───


async def test_on_call_sees_each_attempt_as_it_ends_with_its_place_in_the_tree(
    server: Server, ask: ember.Model
) -> None:
    server.play(Answer(b"", 503), WIRES["openai"].good())

    @retry
    @limit(concurrency=10)
    async def inner(text: str) -> str:
        return (await ask(text)).text

    @limit(concurrency=10)
    async def outer() -> None:
        await inner("first")
        await ember.gather(inner("second"), inner("third"))
        await ask("fourth")

    seen: list[Attempt] = []
    with track(on_call=seen.append) as ledger:
        await outer()
        await ask("fifth")
    assert seen == ledger.calls
    assert len({attempt.id for attempt in seen}) == 6
    places = [names(attempt) for attempt in seen]
    assert places == [["outer", "inner"]] * 4 + [["outer"], []]
    assert [attempt.function for attempt in seen] == ["inner"] * 4 + ["outer", ""]
    assert [attempt.parent for attempt in seen] == [
        attempt.path[-1][0] if attempt.path else None for attempt in seen
    ]
    assert seen[0].parent == seen[1].parent  # the same call, tried again
    assert len({attempt.parent for attempt in seen[1:4]}) == 3
    assert len({attempt.path[0][0] for attempt in seen[:5]}) == 1
    ids = {place[0] for attempt in seen for place in attempt.path}
    assert len(ids) == 4
    assert ids.isdisjoint(attempt.id for attempt in seen)


STACKS: dict[str, Callable[[Any], Any]] = {
    "retry": retry,
    "limit": limit(concurrency=10),
    "cache": cache(store={}, key=lambda _, text: text),
    "batch": ember.batch(size=10),
    "all four": lambda fn: retry(
        cache(store={}, key=lambda _, text: text)(ember.batch(limit(concurrency=10)(fn)))
    ),
    "the same twice": lambda fn: retry(retry(fn)),
}


@pytest.mark.parametrize("stack", STACKS)
async def test_a_stack_of_decorators_is_one_place_in_the_tree(
    ask: ember.Model, stack: str
) -> None:
    class Desk:
        @STACKS[stack]
        async def classify(self, text: str) -> str:
            return (await ask(text)).text

    with track() as ledger:
        assert await Desk().classify(stack) == "right"
    assert names(ledger.calls[0]) == ["Desk.classify"]


async def _classify(ask: ember.Model, text: str) -> str:
    return (await ask(text)).text


async def test_each_call_of_a_recursive_function_is_a_place_in_the_tree(
    ask: ember.Model,
) -> None:
    @limit(concurrency=10)
    async def descend(depth: int) -> None:
        await ask(str(depth))
        if depth:
            await descend(depth - 1)

    with track() as ledger:
        await descend(2)
    assert [len(attempt.path) for attempt in ledger.calls] == [1, 2, 3]
    assert len({place for attempt in ledger.calls for place in attempt.path}) == 3


async def test_two_functions_of_one_name_are_two_places_in_the_tree(ask: ember.Model) -> None:
    def named(call: Callable[[str], Awaitable[Any]]) -> Callable[[str], Awaitable[Any]]:
        @limit(concurrency=10)
        async def step(text: str) -> Any:
            return await call(text)

        return step

    with track() as ledger:
        await named(named(ask))("hi")
    assert names(ledger.calls[0]) == ["step", "step"]


async def test_what_was_sent_and_may_be_billed_is_uncertain_without_a_budget_too(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good(fault="reset"))
    with track() as ledger, pytest.raises(ember.EmberError):
        await connect(wire, price=PRICE, retries=0)("hi", max_tokens=1000)
    assert 1000 * 2e-6 <= ledger.uncertain <= 1000 * 2e-6 + 2000e-6
    with track() as ledger, pytest.raises(ember.EmberError):
        await connect(WIRES["anthropic"], price=PRICE, retries=0)("hi")  # 64,000 are sent
    most = server.requests[-1].json["max_tokens"]
    assert ledger.uncertain >= most * 2e-6


async def test_a_listener_that_fails_is_a_warning_and_costs_no_answer(ask: ember.Model) -> None:
    def broken(attempt: Attempt) -> None:
        raise KeyError("listener")

    seen: list[Attempt] = []
    outer, inner = track(on_call=seen.append), track(on_call=broken)
    with outer, inner, pytest.warns(RuntimeWarning, match="listener"):
        reply = await ask("hi")
    assert reply.text == "right"
    assert len(seen) == outer.requests == inner.requests == 1


# ── Wherever the calls are made ───


async def by_gather(call: Callable[[], Awaitable[Any]]) -> None:
    await ember.gather(call(), call(), call())


async def by_parallel(call: Callable[[], Awaitable[Any]]) -> None:
    async def one(_: int) -> None:
        await call()

    await ember.parallel(one, range(3))


async def by_completed(call: Callable[[], Awaitable[Any]]) -> None:
    async def one(_: int) -> None:
        await call()

    async with aclosing(ember.as_completed(one, range(3))) as results:
        assert [index async for index, _ in results]


async def by_batch(call: Callable[[], Awaitable[Any]]) -> None:
    async def one(_: int) -> None:
        await call()

    await ember.batch(one, range(3), size=2)


async def by_graph(call: Callable[[], Awaitable[Any]]) -> None:
    async def a() -> None:
        await call()

    async def b(a: Any) -> None:
        await call()

    await ember.graph(a=a, b=b, c=(b, "a"))()


async def by_fallback(call: Callable[[], Awaitable[Any]]) -> None:
    async def fails() -> None:
        await call()
        raise KeyError

    async def works() -> None:
        await call()
        await call()

    await ember.fallback(fails, works)()


async def by_asyncio_tasks(call: Callable[[], Awaitable[Any]]) -> None:
    await asyncio.gather(*(asyncio.ensure_future(call()) for _ in range(3)))


async def by_task_group(call: Callable[[], Awaitable[Any]]) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(call)


async def by_threads(call: Callable[[], Awaitable[Any]]) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(anyio.to_thread.run_sync, anyio.from_thread.run, call)


async def by_sync_in_threads(call: Callable[[], Awaitable[Any]]) -> None:
    async def one() -> None:
        await call()

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(anyio.to_thread.run_sync, ember.sync(one))


async def by_sync_in_the_loop(call: Callable[[], Awaitable[Any]]) -> None:
    async def one() -> None:
        await ember.gather(call(), call(), call())

    ember.sync(one)()


WAYS = [
    by_gather, by_parallel, by_completed, by_batch, by_graph, by_fallback, by_asyncio_tasks,
    by_task_group, by_threads, by_sync_in_threads, by_sync_in_the_loop,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
async def test_a_ledger_counts_calls_made_in_any_way_once(
    ask: ember.Model, way: Callable[..., Awaitable[None]]
) -> None:
    @retry
    async def outer() -> None:
        await way(inner)

    @retry
    async def inner() -> str:
        return (await ask("hi")).text

    with track() as ledger, track() as second:
        await outer()
    assert ledger.requests == second.requests == 3
    assert ledger.cost == pytest.approx(3 * COST)
    for attempt in ledger.calls:
        assert (names(attempt)[0], names(attempt)[-1]) == ("outer", "inner")
    assert len({attempt.path[0] for attempt in ledger.calls}) == 1
    assert len({attempt.parent for attempt in ledger.calls}) == 3


@pytest.mark.parametrize("way", [by_gather, by_parallel, by_task_group, by_sync_in_threads])
def test_a_ledger_counts_on_trio(way: Callable[..., Awaitable[None]], ask: ember.Model) -> None:
    async def call() -> None:
        await ask("hi")

    with track() as ledger:
        trio.run(way, call)
    assert ledger.requests == 3


def test_many_threads_lose_no_call() -> None:
    """A transport without a wait: the threads meet in the ledger."""
    answer = WIRES["openai"].answer()
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
    ask = ember.model("openai:gpt-4o", api_key="sk-no-secret", transport=transport, price=PRICE)

    def work() -> None:
        async def main() -> None:
            for _ in range(50):
                await ask("hi")

        asyncio.run(main())

    with track() as ledger:
        contexts = [contextvars.copy_context() for _ in range(8)]
        threads = [threading.Thread(target=context.run, args=(work,)) for context in contexts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ledger.requests == 400
    assert ledger.cost == pytest.approx(400 * COST)


async def test_a_stream_reports_to_the_ledgers_open_when_it_was_created(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("a", "b"))

    @limit(concurrency=5)
    async def start() -> ember.Stream:
        return connect(wire).stream("hi")

    with track() as ledger:
        stream = await start()
    with track() as later:
        async with stream:
            assert [piece async for piece in stream] == ["a", "b"]
    assert (ledger.requests, later.requests) == (1, 0)
    assert names(ledger.calls[0]) == ["start"]


async def test_a_stream_that_is_left_early_is_counted_once(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("a", "b", "c", pause=0.01, piece=60))
    with track() as ledger:
        async with connect(wire).stream("hi") as stream:
            assert await anext(stream) == "a"
    assert ledger.requests == 1
    assert ledger.calls[0].outcome != "ok"


# ── Opening and leaving ───


async def test_ledgers_nest(ask: ember.Model) -> None:
    with track() as outer:
        await ask("hi")
        with track() as inner:
            await ask("hi")
        with track() as other:
            await ask("hi")
            await ask("hi")
        await ask("hi")
    assert (outer.requests, inner.requests, other.requests) == (5, 1, 2)


async def test_tasks_count_in_the_ledgers_of_the_place_where_they_start(
    ask: ember.Model,
) -> None:
    async def one(calls: int) -> Ledger:
        with track() as ledger:
            for _ in range(calls):
                await ask("hi")
        return ledger

    with track() as all_of_them:
        ledgers = await asyncio.gather(*map(one, range(1, 5)))
    assert [ledger.requests for ledger in ledgers] == [1, 2, 3, 4]
    assert all_of_them.requests == 10


async def test_leaving_a_ledger_in_another_context_never_raises(ask: ember.Model) -> None:
    async def answers() -> AsyncGenerator[Ledger]:
        with track() as ledger:
            while True:
                await ask("hi")
                yield ledger

    generator = answers()
    ledger = await asyncio.create_task(anext(generator))
    await asyncio.create_task(anext(generator))
    await asyncio.create_task(generator.aclose())
    with track() as other:
        await ask("hi")
    assert other.requests == 1
    assert ledger.requests >= 1


def test_a_ledger_left_in_another_context_is_over_there_too(ask: ember.Model) -> None:
    def enter() -> Ledger:
        return manager.__enter__()

    manager: Any = track()
    inside, outside = contextvars.copy_context(), contextvars.copy_context()
    ledger = inside.run(enter)
    inside.run(asyncio.run, _classify(ask, "counts"))
    outside.run(manager.__exit__, None, None, None)
    inside.run(asyncio.run, _classify(ask, "does not"))
    asyncio.run(_classify(ask, "nor this"))
    assert ledger.requests == 1


OPEN: dict[str, Callable[[], Any]] = {"track": track, "budget": lambda: budget(usd=1.0)}


@pytest.mark.parametrize("first", OPEN)
@pytest.mark.parametrize("second", OPEN)
async def test_leaving_out_of_order_drops_no_other_ledger(
    ask: ember.Model, first: str, second: str
) -> None:
    managers = [OPEN[first](), track(), OPEN[second]()]
    ledgers = [manager.__enter__() for manager in managers]
    for manager in managers:
        await ask("hi", max_tokens=10)
        manager.__exit__(None, None, None)
    await ask("hi", max_tokens=10)
    assert [ledger.requests for ledger in ledgers] == [1, 2, 3]


async def test_leaving_out_of_order_in_another_context_drops_no_other_ledger(
    ask: ember.Model,
) -> None:
    manager: Any = track()
    ledger = manager.__enter__()
    with track() as other:
        contextvars.copy_context().run(manager.__exit__, None, None, None)
        await ask("hi")
    assert (ledger.requests, other.requests) == (0, 1)


async def test_a_ledger_can_be_opened_again(ask: ember.Model) -> None:
    with track() as ledger:
        await ask("hi")
        with ledger:
            await ask("hi")
        await ask("hi")
    await ask("hi")
    with ledger:
        await ask("hi")
    assert ledger.requests in (4, 5)  # inside itself, once or twice


async def test_an_error_leaves_the_ledger_closed(ask: ember.Model) -> None:
    with pytest.raises(KeyError), track() as ledger:
        await ask("hi")
        raise KeyError
    await ask("hi")
    assert ledger.requests == 1


# ── Ledgers as values ───


async def filled(server: Server, connect: Connect) -> Ledger:
    """A ledger with all there can be in it."""
    wire = WIRES["openai"]
    ask = connect(wire, price=PRICE)
    server.play(Answer(wire.problem("busy"), 503), Answer(b"no JSON"), wire.good())

    @cache(store={})
    async def classify(text: str) -> ember.Reply[str]:
        return await ask(text)

    with track(on_call=lambda attempt: None) as ledger:
        await classify("a")
        await classify("a")
        server.play(Answer(wire.problem("bad"), 400))
        with pytest.raises(ember.CallError):
            await ask("b")
    assert (ledger.requests, ledger.failures, ledger.hits) == (4, 3, 1)
    return ledger


def sums(ledger: Ledger) -> list[Any]:
    """All numbers of a ledger, and of its parts."""
    numbers = ("requests", "failures", "hits", "tokens_in", "tokens_out", "cost", "saved")
    own: list[Any] = [getattr(ledger, name) for name in (*numbers, "uncertain", "p50", "p95")]
    parts = {**ledger.by_model, **ledger.by_function}
    return [own, {name: (part.requests, part.hits, part.cost) for name, part in parts.items()}]


async def test_a_ledger_can_be_pickled(server: Server, connect: Connect) -> None:
    ledger = await filled(server, connect)
    copy = pickle.loads(pickle.dumps(ledger))
    assert sums(copy) == sums(ledger)
    for mine, theirs in zip(ledger.calls, copy.calls, strict=True):
        assert mine._replace(error=None) == theirs._replace(error=None)
        assert repr(mine.error) == repr(theirs.error)
        facts = ("status", "transient", "attempts")
        assert [getattr(mine.error, f, 0) for f in facts] == [
            getattr(theirs.error, f, 0) for f in facts
        ]


async def test_add_brings_in_what_another_ledger_counted(
    server: Server, connect: Connect
) -> None:
    ledger = await filled(server, connect)
    with track() as total:
        total.add(pickle.loads(pickle.dumps(ledger)))
        total.add(ledger)
        await filled(server, connect)
    assert total.requests == 3 * ledger.requests
    assert (total.failures, total.hits) == (9, 3)
    assert total.cost == pytest.approx(3 * ledger.cost)
    assert total.saved == pytest.approx(3 * ledger.saved)
    assert total.by_function["classify"].requests == 9
    assert ledger.requests == 4


async def test_a_ledger_prints_as_a_table(
    server: Server, connect: Connect, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = await filled(server, connect)
    print(ledger)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4
    assert all(word in lines[0] for word in ("requests", "failures", "hits"))
    [row] = [line for line in lines if WIRES["openai"].id in line]
    assert re.findall(r"\s(\d+)(?=\s)", f"{row} ")[:3] == ["4", "3", "0"]
    [row] = [line for line in lines if "classify" in line]
    assert re.findall(r"\s(\d+)(?=\s)", f"{row} ")[:3] == ["3", "2", "1"]
    assert len({len(line) for line in lines}) == 1  # the columns end alike


async def test_a_ledger_can_be_read_while_calls_are_under_way(
    server: Server, ask: ember.Model
) -> None:
    server.play(WIRES["openai"].good(pause=0.001))
    seen: list[int] = []
    with track(on_call=lambda _: seen.append(ledger.requests)) as ledger:
        await asyncio.gather(*(ask(str(n)) for n in range(20)))
    assert seen == [*range(1, 21)]


def test_the_path_crosses_a_plain_thread_with_its_context(ask: ember.Model) -> None:
    @limit(concurrency=1)
    async def outer() -> None:
        context = contextvars.copy_context()
        call = functools.partial(context.run, ember.sync(_classify), ask, "hi")
        await anyio.to_thread.run_sync(call)

    with track() as ledger:
        asyncio.run(outer())
    assert names(ledger.calls[0]) == ["outer"]
