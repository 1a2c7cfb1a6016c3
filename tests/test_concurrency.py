"""gather, parallel, as_completed, batch and fallback: order, limits, faults, and what is left."""

import ast
import asyncio
import contextlib
import functools
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from conftest import Connect
from server import WIRES, Answer, Seen, Server, serving, until

import ember
from ember import as_completed, batch, fallback, gather, parallel

ROOT = Path(__file__).parents[1]
OPENAI = WIRES["openai"]
BACKENDS = ["asyncio", "trio"]


def on_both(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """The test on asyncio and on trio: it has to leave no task, no thread and no coroutine."""

    async def counted(arguments: dict[str, Any]) -> None:
        tasks, threads = len(anyio.get_running_tasks()), threading.active_count()
        await test(**arguments)
        await until(lambda: len(anyio.get_running_tasks()) == tasks)
        assert threading.active_count() <= threads  # an idle worker of trio may have ended

    def run(backend: str, **arguments: Any) -> None:
        anyio.run(counted, arguments, backend=backend)
        gc.collect(1)  # a coroutine that was never awaited would be reported here

    parameters = inspect.signature(test).parameters.values()
    backend = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY)
    functools.update_wrapper(run, test).__signature__ = inspect.Signature([*parameters, backend])
    return pytest.mark.parametrize("backend", BACKENDS)(run)


class Watch:
    """Which calls have begun, which have ended, and how many ran at one time."""

    def __init__(self) -> None:
        self.begun, self.ended = list[Any](), list[Any]()
        self.now = self.peak = 0

    @contextlib.contextmanager
    def __call__(self, item: Any) -> Iterator[None]:
        self.begun.append(item)
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            yield
        finally:
            self.now -= 1
            self.ended.append(item)


def hanging(watch: Watch) -> Callable[[int], Awaitable[int]]:
    """A watched function that ends for 0 only."""

    async def forever(x: int) -> int:
        with watch(x):
            if x:
                await anyio.sleep_forever()
            return x

    return forever


async def double(x: int) -> int:
    """Twice x."""
    await anyio.lowlevel.checkpoint()
    return 2 * x


async def broken(x: int) -> int:
    """An error with x in it."""
    await anyio.lowlevel.checkpoint()
    raise LookupError(x)


async def collected(results: AsyncIterator[tuple[int, Any]]) -> list[Any]:
    """What as_completed gives, in the order of the items."""
    pairs = sorted([pair async for pair in results], key=lambda pair: pair[0])
    assert [index for index, _ in pairs] == list(range(len(pairs)))
    return [result for _, result in pairs]


MAPS: dict[str, Callable[..., Awaitable[list[Any]]]] = {
    "parallel": lambda fn, items, n: parallel(fn, items, limit=n),
    "batch": lambda fn, items, n: batch(fn, items, size=n),
    "as_completed": lambda fn, items, n: collected(as_completed(fn, items, limit=n)),
    "gather": lambda fn, items, n: gather(*map(fn, items), limit=n),
}
each_map = pytest.mark.parametrize("name", MAPS)
each_lazy_map = pytest.mark.parametrize("name", ["parallel", "batch", "as_completed"])


# ── The first page ───

SNIPPET = """
from ember import models, retry, cache, batch, gather, majority_vote

@retry(max_attempts=3)
@cache(ttl=3600)
@batch(size=10)
async def classify(text: str) -> str:
    return (await models.gpt4(f"Classify: {text}")).text

answers = await gather(models.gpt4(q), models.claude(q), models.gemini(q))
best = majority_vote(answers)
"""


@pytest.fixture
def world(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """All named models at the scripted server, as the environment says; a cache of its own."""
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))
    for row in ("openai", "anthropic", "gemini"):
        provider, base = ember.providers[row], WIRES.get(row, OPENAI).base
        monkeypatch.setenv(provider.url_env, server.url + base)
        monkeypatch.setenv(provider.key_env[0], "sk-no-secret")
    anthropic = WIRES["anthropic"]
    server.play(lambda seen: (anthropic if "/messages" in seen.path else OPENAI).good(echo(seen)))
    return server


def echo(seen: Seen) -> str:
    """The prompt, loud."""
    return str(seen.json["messages"][-1]["content"]).upper()


async def snippet() -> dict[str, Any]:
    """The names that the first page's program defines."""
    scope: dict[str, Any] = {"q": "why?", "__name__": "snippet"}
    code = compile(SNIPPET, "snippet", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await eval(code, scope)
    return scope


async def test_the_program_on_the_first_page_runs_word_for_word(world: Server) -> None:
    scope = await snippet()
    assert [str(answer) for answer in scope["answers"]] == ["WHY?"] * 3
    assert scope["best"] is scope["answers"][0]
    assert len(world.requests) == 3
    for _ in range(2):
        assert await scope["classify"]("spam") == "CLASSIFY: SPAM"
    assert len(world.requests) == 4


async def test_many_texts_are_classified_in_order_by_parallel_and_by_batch(world: Server) -> None:
    classify = (await snippet())["classify"]
    texts = [f"text {number}" for number in range(100)]
    right = [f"CLASSIFY: {text.upper()}" for text in texts]
    assert await parallel(classify, texts) == right
    assert len(world.requests) == 103
    assert await batch(classify, texts, size=32) == right
    assert len(world.requests) == 103  # all from the cache
    assert 2 <= world.peak <= 13  # at most ten at once, and three before


# ── Order and limits ───


@each_map
@pytest.mark.parametrize("count", [0, 1, 7, 300])
@on_both
async def test_results_come_in_the_order_of_the_items(name: str, count: int) -> None:
    async def late(x: int) -> int:
        for _ in range(x % 5):
            await anyio.lowlevel.checkpoint()
        return 2 * x

    assert list(await MAPS[name](late, range(count), 8)) == [2 * x for x in range(count)]


async def numbers(count: int) -> AsyncIterator[int]:
    """Numbers from far away."""
    for number in range(count):
        await anyio.lowlevel.checkpoint()
        yield number


ITEMS: dict[str, Callable[[], Any]] = {
    "a list": lambda: list(range(50)),
    "a tuple": lambda: tuple(range(50)),
    "a generator": lambda: (number for number in range(50)),
    "an iterator": lambda: iter(range(50)),
    "a dict": lambda: dict.fromkeys(range(50)),
    "an async generator": lambda: numbers(50),
}


@each_lazy_map
@pytest.mark.parametrize("kind", ITEMS)
@on_both
async def test_items_may_be_iterable_in_any_way(name: str, kind: str) -> None:
    assert await MAPS[name](double, ITEMS[kind](), 8) == [2 * x for x in range(50)]


@each_lazy_map
async def test_an_async_iterable_that_is_no_generator_will_do(name: str) -> None:
    class Pages:
        def __aiter__(self) -> AsyncIterator[int]:
            return numbers(5)

    assert await MAPS[name](double, Pages(), 2) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("kind", ["a range", "a generator"])
async def test_a_hundred_thousand_items_come_in_order(kind: str) -> None:
    async def same(x: int) -> int:
        return x

    items = range(100_000) if kind == "a range" else (x for x in range(100_000))
    assert await parallel(same, items) == list(range(100_000))


@each_map
@pytest.mark.parametrize("limit", [1, 3, 10])
@on_both
async def test_no_more_than_the_limit_run_at_once_and_no_fewer(name: str, limit: int) -> None:
    watch = Watch()

    async def watched(x: int) -> int:
        with watch(x):
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
        return x

    await MAPS[name](watched, range(40), limit)
    assert watch.peak == limit
    assert watch.begun == list(range(40))


@each_map
@on_both
async def test_a_slow_item_holds_up_no_other(name: str) -> None:
    last = anyio.Event()

    async def slow_at_first(x: int) -> int:
        if x == 0:
            await last.wait()
        if x == 30:
            last.set()
        return x

    with anyio.fail_after(5):
        assert list(await MAPS[name](slow_at_first, range(31), 2)) == list(range(31))


@each_lazy_map
@pytest.mark.parametrize("kind", ["plain", "async"])
@on_both
async def test_items_are_taken_only_as_they_are_needed(name: str, kind: str) -> None:
    taken, ahead, watch = list[int](), list[int](), Watch()

    def plain() -> Iterator[int]:
        for x in range(50):
            taken.append(x)
            yield x

    async def slow() -> AsyncIterator[int]:
        for x in plain():
            await anyio.lowlevel.checkpoint()
            yield x

    async def watched(x: int) -> int:
        with watch(x):
            ahead.append(len(taken) - len(watch.ended))
            await anyio.lowlevel.checkpoint()
        return x

    await MAPS[name](watched, slow() if kind == "async" else plain(), 4)
    assert max(ahead) <= 8  # four in flight, and no more than one each to come


async def test_the_default_limits_are_64_and_32() -> None:
    for run, limit in ((parallel, 64), (batch, 32)):
        watch = Watch()

        async def watched(x: int, watch: Watch = watch) -> None:
            with watch(x):
                await anyio.sleep(0.005)

        await run(watched, range(100))
        assert watch.peak == limit


@each_map
@pytest.mark.parametrize("limit", [0, -1])
@on_both
async def test_a_limit_below_one_is_refused(name: str, limit: int) -> None:
    with pytest.raises(ember.SetupError, match=str(limit)):
        await MAPS[name](double, range(3), limit)


@each_map
@on_both
async def test_each_call_has_its_own_copy_of_the_callers_context(name: str) -> None:
    place: ContextVar[str] = ContextVar("place", default="nowhere")

    async def visit(x: int) -> str:
        before = place.get()
        await anyio.lowlevel.checkpoint()
        place.set(f"at {x}")
        return before

    place.set("home")
    assert list(await MAPS[name](visit, range(20), 20)) == ["home"] * 20
    assert place.get() == "home"


@on_both
async def test_the_ledger_counts_the_calls_of_each_way(server: Server, connect: Connect) -> None:
    server.play(OPENAI.good())
    model = connect(OPENAI)
    with ember.track() as ledger:
        for way in MAPS.values():
            await way(model, ["a", "b", "c"], 2)
    assert ledger.requests == len(server.requests) == 3 * len(MAPS)


# ── as_completed ───


@on_both
async def test_as_completed_gives_each_result_as_it_is_there() -> None:
    events = [anyio.Event() for _ in range(4)]

    async def wait(x: int) -> str:
        await events[x].wait()
        return "abcd"[x]

    events[2].set()
    seen = list[tuple[int, str]]()
    async with aclosing(as_completed(wait, range(4))) as results:
        async for index, result in results:
            seen.append((index, result))
            for event in events[: {2: 1, 0: 4}.get(index, 0)]:
                event.set()
    assert seen[:2] == [(2, "c"), (0, "a")]
    assert sorted(seen) == list(enumerate("abcd"))


async def test_as_completed_over_a_million_items_holds_none_of_them() -> None:
    async def text(x: int) -> str:
        return f"the text of {x}"

    blocks, total = list[int](), 0
    async for index, _ in as_completed(text, (x for x in range(1_000_000))):
        total += index
        if index % 100_000 == 50_000:
            blocks.append(sys.getallocatedblocks())
    assert total == sum(range(1_000_000))
    assert max(blocks) - min(blocks) < 5_000


@on_both
async def test_a_slow_reader_holds_up_the_calls() -> None:
    watch = Watch()

    async def watched(x: int) -> int:
        with watch(x):
            return x

    async with aclosing(as_completed(watched, range(1000), limit=4)) as results:
        await anext(results)
        await anyio.sleep(0.01)
        assert len(watch.begun) <= 20


@on_both
async def test_as_completed_that_is_never_read_does_nothing() -> None:
    watch = Watch()

    async def watched(x: int) -> None:
        with watch(x):
            pass

    unread = as_completed(watched, range(5))
    await anyio.sleep(0.001)
    del unread
    gc.collect()
    assert watch.begun == []


@on_both
async def test_leaving_as_completed_early_cancels_and_awaits_what_runs() -> None:
    watch = Watch()

    forever = hanging(watch)

    async with aclosing(as_completed(forever, range(50), limit=8)) as results:
        async for index, _ in results:
            assert index == 0
            break
    assert watch.now == 0
    assert len(watch.begun) <= 9


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio's, about any break
@on_both
async def test_a_break_out_of_as_completed_leaves_no_call_running() -> None:
    watch = Watch()

    forever = hanging(watch)

    async for index, _ in as_completed(forever, range(50), limit=8):
        assert index == 0
        break
    gc.collect()
    await until(lambda: watch.now == 0)
    assert len(watch.begun) <= 9


@on_both
async def test_an_error_in_the_readers_loop_leaves_no_call_running() -> None:
    watch = Watch()

    async def watched(x: int) -> int:
        with watch(x):
            if x:
                await anyio.sleep_forever()
        return x

    with pytest.raises(ZeroDivisionError):
        async with aclosing(as_completed(watched, range(9), limit=4)) as results:
            async for index, _ in results:
                1 / index
    assert watch.now == 0


@on_both
async def test_a_deadline_around_one_result_does_not_end_as_completed() -> None:
    results = as_completed(double, range(5), limit=2)
    seen = list[tuple[int, int]]()
    for _ in range(3):
        with anyio.fail_after(5):
            seen.append(await anext(results))
    seen += [pair async for pair in results]
    assert sorted(seen) == [(x, 2 * x) for x in range(5)]


async def test_as_completed_may_be_started_in_one_task_and_read_in_another() -> None:
    results = as_completed(double, range(5), limit=2)
    seen = [await asyncio.wait_for(anext(results), 5) for _ in range(2)]
    seen += [await asyncio.create_task(anext(results))]
    seen += [pair async for pair in results]
    assert sorted(seen) == [(x, 2 * x) for x in range(5)]


# ── Faults ───


@each_map
@on_both
async def test_the_first_error_itself_is_raised_when_all_others_have_ended(name: str) -> None:
    watch, wrong = Watch(), LookupError("item 3")

    async def fails(x: int) -> int:
        with watch(x):
            if x == 3:
                raise wrong
            await anyio.sleep_forever()
        return x

    with anyio.fail_after(5), pytest.raises(LookupError) as caught:
        await MAPS[name](fails, range(50), 10)
    assert caught.value is wrong
    assert watch.now == 0
    assert len(watch.begun) <= 11
    assert len(watch.ended) == len(watch.begun)


@each_map
@on_both
async def test_what_fails_while_it_is_cancelled_hides_not_the_first_error(name: str) -> None:
    async def fails(x: int) -> int:
        if x == 3:
            raise LookupError(x)
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError(x)

    with pytest.raises(LookupError):
        await MAPS[name](fails, range(5), 10)


@each_map
@on_both
async def test_a_group_that_a_call_raises_stays_what_it_is(name: str) -> None:
    group = ExceptionGroup("mine", [ValueError(1)])

    async def fails(x: int) -> int:
        raise group

    with pytest.raises(ExceptionGroup) as caught:
        await MAPS[name](fails, [1], 2)
    assert caught.value is group


@each_map
@on_both
async def test_errors_pass_through_three_levels_as_they_are(name: str) -> None:
    async def inner(x: int) -> Any:
        return await MAPS[name](broken, [x], 2)

    async def outer(x: int) -> Any:
        return await MAPS[name](inner, [x], 2)

    with pytest.raises(LookupError, match="7"):
        await MAPS[name](outer, [7], 2)


@pytest.mark.parametrize("fatal", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("backend", BACKENDS)
@each_map
def test_an_exit_within_a_call_ends_all(
    name: str, backend: str, fatal: type[BaseException]
) -> None:
    watch = Watch()

    async def fails(x: int) -> int:
        with watch(x):
            await anyio.sleep(0.001)
            if x == 3:
                raise fatal
            await anyio.sleep_forever()
        return x

    async def main() -> None:
        await MAPS[name](fails, range(5), 5)

    with pytest.raises(fatal):
        anyio.run(main, backend=backend)
    gc.collect()
    assert watch.now == 0


@on_both
async def test_errors_may_be_returned_in_their_place() -> None:
    async def odd(x: int) -> int:
        await anyio.lowlevel.checkpoint()
        if x % 2:
            raise LookupError(x)
        return x

    expected = [0, "LookupError(1)", 2, "LookupError(3)", 4]
    results: list[Any] = [
        await parallel(odd, range(5), on_error="return"),
        await parallel(odd, numbers(5), on_error="return", limit=1),
        await collected(as_completed(odd, range(5), on_error="return")),
        await gather(*map(odd, range(5)), return_exceptions=True),
        await gather(*map(odd, range(5)), return_exceptions=True, limit=1),
    ]
    for result in results:
        assert [x if isinstance(x, int) else repr(x) for x in result] == expected


@on_both
async def test_an_unknown_on_error_is_refused() -> None:
    with pytest.raises((ember.SetupError, ValueError, TypeError), match="ignore"):
        await parallel(double, range(3), on_error="ignore")  # type: ignore[call-overload]
    with pytest.raises((ember.SetupError, ValueError, TypeError), match="ignore"):
        await collected(as_completed(double, range(3), on_error="ignore"))  # type: ignore[call-overload]


@each_lazy_map
@pytest.mark.parametrize("kind", ["plain", "async"])
@on_both
async def test_an_error_of_the_items_ends_the_calls(name: str, kind: str) -> None:
    watch = Watch()

    def plain() -> Iterator[int]:
        yield from range(3)
        raise LookupError("no more")

    async def slow() -> AsyncIterator[int]:
        for x in plain():
            await anyio.lowlevel.checkpoint()
            yield x

    async def forever(x: int) -> int:
        with watch(x):
            await anyio.sleep_forever()
        return x

    with anyio.fail_after(5), pytest.raises(LookupError, match="no more"):
        await MAPS[name](forever, slow() if kind == "async" else plain(), 8)
    assert watch.now == 0


@on_both
async def test_an_error_of_the_items_is_no_result() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        await parallel(double, items(), on_error="return")


async def test_an_async_generator_of_items_is_closed_after_an_error() -> None:
    closed = list[bool]()

    async def items() -> AsyncIterator[int]:
        try:
            for x in range(100):
                yield x
        finally:
            closed.append(True)

    with pytest.raises(LookupError):
        await parallel(broken, items(), limit=2)
    gc.collect()
    await until(lambda: closed == [True])


@each_map
@on_both
async def test_a_cancellation_ends_every_call_and_is_no_error(name: str) -> None:
    watch = Watch()

    async def forever(x: int) -> int:
        with watch(x):
            await anyio.sleep_forever()
        return x

    with anyio.move_on_after(0.02) as scope:
        await MAPS[name](forever, range(100), 10)
    assert scope.cancelled_caught
    assert len(watch.begun) == len(watch.ended) == 10


@each_lazy_map
@pytest.mark.parametrize("kind", ["plain", "async"])
@on_both
async def test_calls_that_never_wait_hold_up_nobody(name: str, kind: str) -> None:
    done, most = 0, 1_000_000

    async def endless() -> AsyncIterator[int]:
        for number in range(most):
            yield number

    async def same(x: int) -> int:
        nonlocal done
        done += 1
        return x

    async with anyio.create_task_group() as group:
        items = endless() if kind == "async" else iter(range(most))
        group.start_soon(MAPS[name], same, items, 4)
        for _ in range(3):
            await anyio.sleep(0.001)
        group.cancel_scope.cancel()
    assert 0 < done < most


@each_map
async def test_a_cancelled_task_raises_cancelled(name: str) -> None:
    watch = Watch()

    async def forever(x: int) -> int:
        with watch(x):
            await anyio.sleep_forever()
        return x

    async def call() -> None:
        await MAPS[name](forever, range(100), 10)

    task = asyncio.create_task(call())
    await until(lambda: watch.now == 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert watch.now == 0
    assert len(asyncio.all_tasks()) == 1


@each_map
async def test_a_call_that_was_cancelled_from_within_is_never_a_result(name: str) -> None:
    async def gives_up(x: int) -> int:
        await anyio.lowlevel.checkpoint()
        if x == 1:
            raise asyncio.CancelledError
        return x

    with anyio.fail_after(5), pytest.raises(asyncio.CancelledError):
        await MAPS[name](gives_up, range(3), 3)


@each_map
@on_both
async def test_a_failed_fan_out_leaves_no_connection(
    server: Server, connect: Connect, name: str
) -> None:
    wrong = Answer(OPENAI.problem("invalid_request_error"), 400)
    server.play(lambda seen: wrong if echo(seen) == "BAD" else OPENAI.good(fault="hang"))
    model = connect(OPENAI)

    async def ask(text: str) -> str:
        if text == "bad":
            await until(lambda: len(server.requests) == 5)
        return (await model(text)).text

    with anyio.fail_after(10), pytest.raises(ember.CallError):
        await MAPS[name](ask, ["a", "b", "bad", "c", "d", "e"], 6)
    await until(lambda: server.open <= 1)  # that of the refused call is kept for the next one
    assert len(server.requests) == 6


# ── Coroutines and functions ───


@on_both
async def test_coroutines_that_never_started_are_closed() -> None:
    calls = [broken(1), *(double(x) for x in range(20))]
    with pytest.raises(LookupError):
        await gather(*calls, limit=1)
    assert {inspect.getcoroutinestate(call) for call in calls} == {inspect.CORO_CLOSED}


@on_both
async def test_a_cancelled_gather_closes_what_had_not_started() -> None:
    calls = [double(x) for x in range(20)]
    with anyio.move_on_after(0.01):
        await gather(anyio.sleep_forever(), *calls, limit=1)
    assert {inspect.getcoroutinestate(call) for call in calls} == {inspect.CORO_CLOSED}


@on_both
async def test_a_gather_in_a_scope_that_is_cancelled_already_closes_all() -> None:
    calls = [double(x) for x in range(20)]
    with anyio.CancelScope() as scope:
        scope.cancel()
        await gather(*calls, limit=2)
    assert {inspect.getcoroutinestate(call) for call in calls} == {inspect.CORO_CLOSED}


@on_both
async def test_what_is_no_awaitable_is_refused_and_the_others_are_closed() -> None:
    call = double(1)
    with pytest.raises(TypeError, match="7"):
        await gather(call, 7)  # type: ignore[call-overload]
    assert inspect.getcoroutinestate(call) == inspect.CORO_CLOSED


async def test_gather_takes_tasks_futures_and_any_awaitable() -> None:
    class Soon:
        def __await__(self) -> Any:
            return double(3).__await__()

    future = asyncio.get_running_loop().create_future()
    future.set_result(2)
    task = asyncio.create_task(double(2))
    assert list(await gather(double(0), future, task, Soon())) == [0, 2, 4, 6]


async def test_gather_cancels_the_tasks_it_was_given() -> None:
    task = asyncio.create_task(anyio.sleep_forever())
    with pytest.raises(LookupError):
        await gather(task, broken(1))
    await until(task.done)
    assert task.cancelled()


async def test_a_task_that_was_cancelled_before_is_cancelled_in_gather() -> None:
    task = asyncio.create_task(anyio.sleep_forever())
    task.cancel()
    with anyio.fail_after(5), pytest.raises(asyncio.CancelledError):
        await gather(task, double(1))


@each_lazy_map
@on_both
async def test_a_function_that_is_not_async_is_refused_by_name(name: str) -> None:
    taken = list[int]()

    def shout(x: int) -> str:
        return str(x)

    items = (taken.append(x) or x for x in range(5))
    with pytest.raises(TypeError, match="shout"):
        await MAPS[name](shout, items, 2)
    assert len(taken) <= 1


@each_lazy_map
@on_both
async def test_a_wrong_call_is_pythons_own_error(name: str) -> None:
    async def classify(text: str, more: str) -> str:
        return text + more

    with pytest.raises(TypeError, match=r"classify\(\) missing 1 required positional argument"):
        await MAPS[name](classify, ["a"], 2)
    with pytest.raises(TypeError, match="int"):
        await MAPS[name](double, 5, 2)


class Clerk:
    """Something with methods."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    async def times(self, x: int) -> int:
        """Not always twice x."""
        return self.factor * x

    async def __call__(self, x: int) -> int:
        """As a function."""
        return self.factor * x


@each_lazy_map
@pytest.mark.parametrize(
    "fn",
    [
        functools.partial(Clerk.times, Clerk(3)), Clerk(3).times, Clerk(3),
        functools.partial(Clerk(3)), functools.partial(Clerk(3).times),
    ],
    ids=["partial", "method", "callable", "partial of a callable", "partial of a method"],
)
async def test_whatever_is_async_will_do(name: str, fn: Any) -> None:
    assert await MAPS[name](fn, range(4), 2) == [0, 3, 6, 9]


@each_lazy_map
async def test_a_model_will_do(name: str, server: Server, connect: Connect) -> None:
    server.play(lambda seen: OPENAI.good(echo(seen)))
    replies = await MAPS[name](connect(OPENAI), ["a", "b", "c"], 2)
    assert [reply.text for reply in replies] == ["A", "B", "C"]


# ── The bar ───


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of tqdm, where it is installed."""
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    return tqdm.tqdm


async def test_a_bar_counts_to_the_end(bars: Any, capsys: pytest.CaptureFixture[str]) -> None:
    await parallel(double, range(20), progress=True)
    assert "100%" in (shown := capsys.readouterr().err)
    assert "20/20" in shown
    await collected(as_completed(double, [1, 2, 3], progress=True))
    assert "3/3" in capsys.readouterr().err


async def test_a_bar_over_a_generator_counts_too(
    bars: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    await parallel(double, numbers(20), progress=True)
    assert "20it" in capsys.readouterr().err


async def test_a_bar_counts_failures_and_is_closed_after_an_error(
    bars: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    await parallel(broken, range(20), progress=True, on_error="return")
    assert "20/20" in capsys.readouterr().err
    with pytest.raises(LookupError):
        await parallel(broken, range(20), progress=True)
    with pytest.raises(TypeError):
        await parallel(len, range(20), progress=True)  # type: ignore[arg-type]
    assert list(getattr(bars, "_instances", ())) == []


async def test_no_bar_unless_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    await parallel(double, range(20))
    assert capsys.readouterr() == ("", "")


@on_both
async def test_a_bar_without_tqdm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ember.SetupError, match=r"ember-llm\[progress\]"):
        await parallel(double, range(3), progress=True)


# ── batch ───


@on_both
async def test_a_batched_function_runs_so_many_at_once() -> None:
    watch = Watch()

    @batch(size=3)
    async def watched(x: int) -> int:
        with watch(x):
            for _ in range(x % 4):
                await anyio.lowlevel.checkpoint()
        return 2 * x

    assert list(await gather(*map(watched, range(1000)))) == [2 * x for x in range(1000)]
    assert watch.peak == 3
    assert sorted(watch.begun) == list(range(1000))


async def test_a_bare_batch_runs_32_at_once() -> None:
    watch = Watch()

    @batch
    async def watched(x: int) -> None:
        with watch(x):
            await anyio.sleep(0.005)

    await gather(*map(watched, range(100)))
    assert watch.peak == 32


async def test_those_who_wait_are_served_in_the_order_in_which_they_came() -> None:
    watch = Watch()

    @batch(size=2)
    async def watched(x: int) -> None:
        with watch(x):
            await anyio.lowlevel.checkpoint()

    tasks = [asyncio.create_task(watched(x)) for x in range(1000)]
    await asyncio.wait(tasks)
    assert watch.begun == list(range(1000))


async def test_who_has_been_served_queues_behind_those_who_wait() -> None:
    order = list[str]()

    @batch(size=1)
    async def serve(name: str) -> None:
        order.append(name)
        await anyio.lowlevel.checkpoint()

    async def greedy() -> None:
        for _ in range(3):
            await serve("greedy")

    async def patient(name: str) -> None:
        await serve(name)

    tasks = [asyncio.create_task(greedy()), *(asyncio.create_task(patient(n)) for n in "ab")]
    await asyncio.wait(tasks)
    assert order == ["greedy", "a", "b", "greedy", "greedy"]


@on_both
async def test_a_batched_function_is_a_sliding_window() -> None:
    last = anyio.Event()

    @batch(size=2)
    async def slow_at_first(x: int) -> int:
        if x == 0:
            await last.wait()
        if x == 30:
            last.set()
        return x

    with anyio.fail_after(5):
        assert list(await gather(*map(slow_at_first, range(31)))) == list(range(31))


@on_both
async def test_places_come_back_after_errors_and_cancellations() -> None:
    watch = Watch()

    @batch(size=2)
    async def work(x: str) -> str:
        with watch(x):
            if x == "fails":
                raise LookupError
            if x == "hangs":
                await anyio.sleep_forever()
        return x

    for _ in range(3):
        await gather(*(work("fails") for _ in range(4)), return_exceptions=True)
        with anyio.move_on_after(0.005):  # two hang, and two wait for their places
            await gather(*(work("hangs") for _ in range(4)))
    with anyio.fail_after(5):
        assert list(await gather(*(work("works") for _ in range(4)))) == ["works"] * 4
    assert watch.peak == 2


async def test_a_waiter_that_is_cancelled_as_it_is_served_passes_its_place_on() -> None:
    doors = anyio.Event()

    @batch(size=1)
    async def work(x: int) -> int:
        await doors.wait()
        return x

    tasks = [asyncio.create_task(work(x)) for x in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    doors.set()
    while not tasks[0].done():  # noqa: ASYNC110
        await asyncio.sleep(0)
    tasks[1].cancel()
    with anyio.fail_after(5):
        assert await tasks[2] == 2


@on_both
async def test_a_wrong_call_of_a_batched_function_does_not_wait_in_the_queue() -> None:
    @batch(size=1)
    async def classify(text: str) -> str:
        await anyio.sleep_forever()
        return text

    async with anyio.create_task_group() as group:
        group.start_soon(classify, "a")
        await anyio.sleep(0.001)
        with anyio.fail_after(5), pytest.raises(
            TypeError, match=r"classify\(\) takes 1 positional argument but 2 were given"
        ):
            await classify("a", "b")  # type: ignore[call-arg]
        group.cancel_scope.cancel()


@on_both
async def test_what_waits_in_the_queue_when_it_is_cancelled_is_closed() -> None:
    @batch(size=1)
    async def work(x: int) -> None:
        await anyio.sleep_forever()

    with anyio.move_on_after(0.01) as scope:
        await gather(*map(work, range(5)))
    assert scope.cancelled_caught


def test_each_event_loop_has_a_window_of_its_own() -> None:
    watch, both = Watch(), threading.Barrier(2)

    @batch(size=1)
    async def work(x: int) -> int:
        with watch(x):
            await asyncio.to_thread(both.wait, 10)  # passes only with one from each loop
        return x

    threads = [threading.Thread(target=lambda x=x: asyncio.run(work(x))) for x in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(watch.ended) == [0, 1]
    assert watch.peak == 2


def test_a_loop_that_ended_with_calls_in_flight_takes_no_place_from_the_next() -> None:
    @batch(size=1)
    async def work(x: int) -> int:
        if x == 0:
            await anyio.sleep_forever()
        return x

    async def leave() -> None:
        task = asyncio.create_task(work(0))
        await asyncio.sleep(0.001)
        assert not task.done()

    async def one() -> int:
        with anyio.fail_after(5):
            return await work(1)

    for _ in range(3):
        asyncio.run(leave())
        assert asyncio.run(one()) == 1
        assert anyio.run(one, backend="trio") == 1


def test_many_loops_leave_nothing_in_a_batched_function() -> None:
    @batch(size=1)
    async def work(x: int) -> int:
        return x

    def loops() -> int:
        gc.collect()
        return sum(isinstance(thing, asyncio.AbstractEventLoop) for thing in gc.get_objects())

    before = loops()
    for _ in range(5):
        asyncio.run(work(1))
    assert loops() <= before + 1


async def test_batch_on_methods_and_models(server: Server, connect: Connect) -> None:
    watch = Watch()

    class Desk:
        def __init__(self, name: str) -> None:
            self.name = name

        @batch(size=2)
        async def ask(self, text: str) -> str:
            """Ask here."""
            with watch(text):
                await anyio.lowlevel.checkpoint()
            return self.name + text

    one, two = Desk("one "), Desk("two ")
    answers = await gather(one.ask("a"), two.ask("b"), one.ask(text="c"), two.ask("d"))
    assert list(answers) == ["one a", "two b", "one c", "two d"]
    assert watch.peak == 2
    server.play(lambda seen: OPENAI.good(echo(seen)))
    model = batch(connect(OPENAI), size=2)
    assert inspect.iscoroutinefunction(model)
    assert [str(reply) for reply in await parallel(model, "abcdef")] == list("ABCDEF")
    assert server.peak == 2


def test_a_batched_function_looks_like_the_function() -> None:
    async def classify(text: str, *, more: int = 3) -> str:
        """What kind it is."""
        return text * more

    for decorated in (batch(classify), batch(size=2)(classify), batch(classify, size=2)):
        assert inspect.iscoroutinefunction(decorated)
        assert inspect.signature(decorated) == inspect.signature(classify)
        assert decorated.__name__ == "classify"
        assert decorated.__doc__ == "What kind it is."


@pytest.mark.parametrize("size", [0, -1, 1.5, "many"])
def test_a_size_that_is_none_is_refused_at_once(size: Any) -> None:
    with pytest.raises((ember.SetupError, TypeError), match="size"):
        batch(size=size)(double)


def test_batch_of_a_plain_function_is_refused_by_name() -> None:
    def shout(text: str) -> str:
        return text

    with pytest.raises((ember.SetupError, TypeError), match="shout"):
        batch(size=2)(shout)  # type: ignore[type-var]


# ── fallback ───


@on_both
async def test_the_next_function_is_asked_only_when_one_fails() -> None:
    asked = list[str]()

    def make(name: str, error: Exception | None) -> Callable[[str], Awaitable[str]]:
        async def ask(text: str) -> str:
            asked.append(name)
            await anyio.lowlevel.checkpoint()
            if error:
                raise error
            return f"{name}: {text}"

        return ask

    good, bad = make("good", None), make("bad", LookupError("no"))
    call = ember.CallError("busy", transient=True)
    assert await fallback(good, bad)("x") == "good: x"
    assert await fallback(bad, make("refused", call), good, bad)("x") == "good: x"
    assert await fallback(fallback(bad, bad), good)(text="x") == "good: x"
    assert asked == ["good", "bad", "refused", "good", "bad", "bad", "good"]


@on_both
async def test_when_all_fail_the_last_error_names_the_others() -> None:
    async def first(text: str) -> str:
        raise LookupError("the first is gone")

    async def second(text: str) -> str:
        raise ember.CallError("the second is busy", status=503)

    wrong = ValueError("the third is wrong")

    async def third(text: str) -> str:
        raise wrong

    with pytest.raises(ValueError) as caught:
        await fallback(first, second, third)("x")
    assert caught.value is wrong
    notes = caught.value.__notes__
    assert len(notes) == 2
    assert "LookupError" in notes[0]
    assert "the first is gone" in notes[0]
    assert "the second is busy" in notes[1]


@on_both
async def test_a_spent_budget_ends_a_fallback() -> None:
    async def spent(text: str) -> str:
        raise ember.BudgetExceeded("no more")

    async def never(text: str) -> str:
        raise AssertionError

    with pytest.raises(ember.BudgetExceeded, match="no more"):
        await fallback(spent, never)("x")


@on_both
async def test_a_cancellation_ends_a_fallback() -> None:
    asked = list[str]()

    async def hangs(text: str) -> str:
        await anyio.sleep_forever()
        return text

    async def next_one(text: str) -> str:
        asked.append(text)
        return text

    with anyio.move_on_after(0.005) as scope:
        await fallback(hangs, next_one)("x")
    assert scope.cancelled_caught
    assert asked == []


async def test_a_wrong_call_of_a_fallback_is_the_first_functions_error() -> None:
    async def first(text: str) -> str:
        return text

    async def second(*anything: str) -> str:
        raise AssertionError(anything)

    call: Any = fallback(first, second)
    with pytest.raises(TypeError, match=r"first\(\) takes 1 positional argument but 2 were given"):
        await call("a", "b")


async def test_models_fall_back_on_each_other(server: Server, connect: Connect) -> None:
    down = Answer(OPENAI.problem("invalid_request_error"), 400)
    anthropic = WIRES["anthropic"]
    server.play(lambda seen: anthropic.good("up") if "/messages" in seen.path else down)
    ask = fallback(connect(OPENAI), connect(anthropic))
    assert (await ask("hi", temperature=0)).text == "up"
    assert [request.path for request in server.requests] == ["/v1/chat/completions", "/v1/messages"]


def test_a_fallback_looks_like_the_first_function() -> None:
    async def classify(text: str, *, more: int = 3) -> str:
        """What kind it is."""
        return text * more

    call = fallback(classify, double)
    assert inspect.iscoroutinefunction(call)
    assert inspect.signature(call) == inspect.signature(classify)


def test_a_fallback_on_nothing_or_on_a_plain_function_is_refused() -> None:
    with pytest.raises((ember.SetupError, TypeError)):
        fallback()
    with pytest.raises((ember.SetupError, TypeError), match="len"):
        fallback(double, len)  # type: ignore[arg-type]


# ── Ctrl-C ───

LOUD = {
    "asyncio": ["-W", "always"],
    "trio": ["-W", "always", "-W", "ignore:Async generator:ResourceWarning"],  # httpcore's, in trio
}
LEAVING = """
import sys
import anyio
import ember

model = ember.model("openai:gpt-4o", base_url=sys.argv[1], api_key="sk-no-secret")

async def ask(number):
    return number if number == 0 else await model(str(number))

async def main():
    async for index, _ in ember.as_completed(ask, range(100), limit=20):
        await anyio.sleep(0.05 if sys.argv[3] == "late" else 0)
        break
    print("left")

anyio.run(main, backend=sys.argv[2])
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("when", ["early", "late"])
def test_a_program_that_ends_after_a_break_ends_at_once_and_in_silence(
    backend: str, when: str
) -> None:
    with serving(OPENAI.good(fault="hang")) as server:
        done = subprocess.run(
            [sys.executable, *LOUD[backend], "-c", LEAVING, f"{server.url}/v1", backend, when],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=20, text=True,
            capture_output=True,
        )
        assert (done.stdout, done.stderr, done.returncode) == ("left\n", "", 0)
        anyio.run(until, lambda: server.open == 0)


PROGRAM = """
import gc, os, sys, threading
import anyio
import ember

model = ember.model("openai:gpt-4o", base_url=sys.argv[1], api_key="sk-no-secret")

async def ask(text):
    try:
        return await model(str(text))
    finally:
        ended.append(text)

async def main():
    way = sys.argv[3]
    if way == "parallel":
        await ember.parallel(ask, range(1000), limit=20)
    elif way == "batch":
        await ember.batch(ask, range(1000), size=20)
    elif way == "gather":
        await ember.gather(*map(ask, range(1000)), limit=20)
    elif way == "graph":
        def node(number):
            async def run():
                return await ask(number)
            return run
        await ember.graph({f"n{x}": node(x) for x in range(1000)}, limit=20)()
    else:
        async for _ in ember.as_completed(ask, range(1000), limit=20):
            pass

ended = []
threads = threading.active_count()
try:
    anyio.run(main, backend=sys.argv[2])
except KeyboardInterrupt:
    gc.collect()
    print(len(ended), threading.active_count() - threads)
"""


@pytest.mark.parametrize(
    ("way", "backend"),
    [
        ("parallel", "asyncio"), ("parallel", "trio"), ("as_completed", "asyncio"),
        ("gather", "asyncio"), ("batch", "asyncio"), ("graph", "asyncio"),
    ],
)
def test_ctrl_c_leaves_no_call_no_connection_and_no_thread(way: str, backend: str) -> None:
    with serving(OPENAI.good(fault="hang")) as server:
        command = [sys.executable, *LOUD[backend], "-c", PROGRAM, f"{server.url}/v1", backend, way]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            anyio.run(until, lambda: len(server.requests) == 20, 20)
            process.send_signal(signal.SIGINT)
            shown, errors = process.communicate(timeout=10)
        assert (shown, errors, process.returncode) == ("20 0\n", "", 0)
        anyio.run(until, lambda: server.open == 0)
        assert len(server.requests) == 20
