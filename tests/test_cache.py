"""`cache`: what is asked once, what is kept and for how long, and what no file can make it do."""

import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import enum
import functools
import gc
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anyio
import anyio.lowlevel
import cache_worker
import httpx
import pytest
from conftest import Connect, Run, failing
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from server import WIRES, Answer, Seen, Server, anthropic_answer, openai_answer, until
from typing_extensions import TypedDict

import ember
from ember import CallError, Model, Reply, SetupError, cache, model, retry, track

pytestmark = pytest.mark.usefixtures("no_backoff")

OPENAI = WIRES["openai"]
WORKER = Path(cache_worker.__file__)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)



@pytest.fixture(autouse=True)
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path / "cache"))
    cache_worker.runs.clear()
    return tmp_path / "cache"


@pytest.fixture
def elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: Path
) -> Callable[[], Path]:
    """A copy of what is on the disk, as another process finds it: nothing of it is in memory."""
    numbers = itertools.count()

    def elsewhere() -> Path:
        there = tmp_path / f"copy {next(numbers)}"
        shutil.copytree(os.environ["EMBER_CACHE_DIR"], there)
        monkeypatch.setenv("EMBER_CACHE_DIR", str(there))
        return there

    return elsewhere


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Run:
    """`run(main)`, on each event loop."""
    return functools.partial(anyio.run, backend=request.param)


def prompt_of(seen: Seen) -> str:
    """The last message of a request."""
    return seen.json["messages"][-1]["content"]


def numbered() -> Callable[[Seen], Answer]:
    """A script that gives each request another answer."""
    numbers = itertools.count(1)
    return lambda seen: OPENAI.good(f"answer {next(numbers)}")


async def together(count: int, call: Callable[[], Awaitable[Any]]) -> list[Any]:
    """The answers of so many calls at once."""
    answers = list[Any]()

    async def one() -> None:
        answers.append(await call())

    with anyio.fail_after(15):
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(one)
    return answers


# ── Hits ───


@dataclasses.dataclass(frozen=True)
class Classifier:
    """An object whose method asks a model."""

    ask: Model
    kind: str = "plain"

    @cache
    async def classify(self, text: str) -> str:
        """What the model says."""
        return (await self.ask(text, system=self.kind)).text


def cached_function(ask: Model, **options: Any) -> Callable[..., Awaitable[Any]]:
    """A cached function that calls the model."""

    @cache(**options)
    async def classify(text: str) -> str:
        return (await ask(text)).text

    return classify


def cached_bare(ask: Model) -> Callable[..., Awaitable[Any]]:
    """The same, by a bare decorator."""

    @cache
    async def classify(text: str) -> str:
        return (await ask(text)).text

    return classify


SHAPES: dict[str, Callable[[Model], Any]] = {
    "function": cached_function,
    "bare": cached_bare,
    "method": lambda ask: Classifier(ask).classify,
    "model": cache,
    "model()": cache(ttl=60),
    "dict": functools.partial(cached_function, store={}),
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Any:
    """Each thing that can be cached."""
    if request.param == "dict":
        return functools.partial(cached_function, store={})
    return SHAPES[request.param]


def test_an_equal_call_is_asked_once(
    server: Server, connect: Connect, run: Run, shape: Any
) -> None:
    server.play(numbered())
    classify = shape(connect(OPENAI))

    async def main() -> list[str]:
        return [str(await classify(text)) for text in ("a", "b", "a", "b")]

    assert run(main) == ["answer 1", "answer 2", "answer 1", "answer 2"]
    assert len(server.requests) == 2


def test_100_equal_calls_at_once_are_one_request(
    server: Server, connect: Connect, run: Run, shape: Any
) -> None:
    server.play(numbered())
    call = functools.partial(shape(connect(OPENAI)), "hi")
    assert set(map(str, run(functools.partial(together, 100, call)))) == {"answer 1"}
    assert len(server.requests) == 1


def test_a_hit_is_a_reply_that_was_cached_and_cost_nothing(
    server: Server, connect: Connect, run: Run, elsewhere: Any
) -> None:
    server.play(OPENAI.good("right"))
    ask = cache(connect(OPENAI))
    first = run(functools.partial(ask, "hi"))
    assert (first.cached, first.cost) == (False, (11 * 2.5 + 7 * 10) / 1e6)
    from_memory = run(functools.partial(ask, "hi"))
    elsewhere()
    for hit in (from_memory, run(functools.partial(ask, "hi"))):
        assert (type(hit), hit.cached, hit.cost) == (Reply, True, 0)
        same = {"cached": False, "cost": first.cost, "seconds": first.seconds}
        assert dataclasses.replace(hit, **same) == first
        assert (hit.raw, hit.message) == (first.raw, first.message)
        assert hit is not first
    assert len(server.requests) == 1


def test_of_callers_that_join_one_paid_and_the_others_were_cached(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(OPENAI.good("right"))
    ask = cache(connect(OPENAI))
    replies = run(functools.partial(together, 20, functools.partial(ask, "hi")))
    assert Counter(reply.cached for reply in replies) == {False: 1, True: 19}
    assert sum(reply.cost for reply in replies) == (11 * 2.5 + 7 * 10) / 1e6
    assert len({id(reply) for reply in replies}) == 20


def test_the_ledger_counts_hits_and_what_they_saved(
    server: Server, connect: Connect, run: Run, elsewhere: Any, shape: Any
) -> None:
    server.play(OPENAI.good("right"))
    call = functools.partial(shape(connect(OPENAI)), "hi")
    price = (11 * 2.5 + 7 * 10) / 1e6

    async def counted(count: int) -> tuple[int, int, float, float]:
        with track() as ledger:
            await together(count, call)
        return ledger.requests, ledger.hits, ledger.cost, ledger.saved

    assert run(functools.partial(counted, 5)) == (1, 4, price, pytest.approx(4 * price))
    assert run(functools.partial(counted, 2)) == (0, 2, 0, pytest.approx(2 * price))
    if Path(os.environ["EMBER_CACHE_DIR"]).exists():
        elsewhere()
        assert run(functools.partial(counted, 1)) == (0, 1, 0, pytest.approx(price))


def test_what_is_kept_in_memory_is_not_looked_up_on_the_disk(run: Run, directory: Path) -> None:
    call = functools.partial(cache_worker.echo, "hi")
    run(call)
    emptied(directory)
    assert run(call) == "right hi"
    assert cache_worker.runs == ["hi"]


def test_the_memory_keeps_no_more_than_a_thousand_answers(directory: Path) -> None:
    async def main() -> None:
        for number in range(1100):
            await cache_worker.echo(str(number))
        emptied(directory)
        cache_worker.runs.clear()
        await cache_worker.echo("1099")
        await cache_worker.echo("0")

    asyncio.run(main())
    assert cache_worker.runs == ["0"]


def test_another_directory_knows_nothing_of_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call = functools.partial(cache_worker.echo, "hi")
    run(call)
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path / "other"))
    run(call)
    assert cache_worker.runs == ["hi", "hi"]
    assert database(tmp_path / "other").exists()


def test_without_a_variable_the_user_s_cache_directory_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "user"))
    monkeypatch.delenv("EMBER_CACHE_DIR")
    asyncio.run(cache_worker.echo("hi"))
    assert "ember" in database(tmp_path / "user").parent.parts


def test_a_tilde_in_the_variable_is_the_user_s_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("EMBER_CACHE_DIR", "~/kept")
    asyncio.run(cache_worker.echo("hi"))
    assert database(tmp_path).parent == tmp_path / "home" / "kept"
    assert list((tmp_path / "here").iterdir()) == []


def test_a_long_answer_is_kept_on_the_disk(run: Run, elsewhere: Any) -> None:
    call = functools.partial(cache_worker.echo, "long é\ud800\x00 " * 100_000)
    first = run(call)
    elsewhere()
    assert run(call) == first
    assert len(cache_worker.runs) == 1


def test_the_key_of_a_provider_is_in_no_file(
    server: Server, connect: Connect, run: Run, directory: Path
) -> None:
    server.play(OPENAI.good())
    ask = connect(OPENAI, api_key="sk-very-secret-1234567890")
    for call in (cache(ask), cached_function(ask)):
        run(functools.partial(call, "hi"))
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    assert not any(b"very-secret" in path.read_bytes() for path in files)


def test_a_pipeline_of_cached_calls_sends_nothing_the_second_time(
    server: Server, connect: Connect, run: Run, elsewhere: Any
) -> None:
    server.play(numbered())
    ask = cache(connect(OPENAI))

    @cache
    async def shorten(reply: Reply[str]) -> str:
        return (await ask("shorten", system=str(reply))).text

    async def main() -> tuple[str, str]:
        reply = await ask("hi")
        return (await ask(reply)).text, await shorten(reply)

    first = run(main)
    count = len(server.requests)
    elsewhere()
    assert run(main) == first
    assert len(server.requests) == count


# ── Flights ───


def test_cancelling_the_first_of_several_callers_sends_nothing_twice(
    server: Server, connect: Connect, run: Run, shape: Any
) -> None:
    hold = threading.Event()
    server.play(OPENAI.good("right", hold=hold))
    classify = shape(connect(OPENAI))
    answers = list[str]()
    left = list[bool]()

    async def leave(scope: anyio.CancelScope) -> None:
        with scope:
            await classify("hi")
        left.append(scope.cancelled_caught)

    async def stay() -> None:
        answers.append(str(await classify("hi")))

    async def main() -> None:
        scope = anyio.CancelScope()
        with anyio.fail_after(15):
            async with anyio.create_task_group() as group:
                group.start_soon(leave, scope)
                await until(lambda: len(server.requests) == 1)
                for _ in range(5):
                    group.start_soon(stay)
                await anyio.sleep(0.005)
                scope.cancel()
                await until(lambda: bool(left))
                hold.set()

    run(main)
    assert (answers, left) == (["right"] * 5, [True])
    assert len(server.requests) == 1
    assert str(run(functools.partial(classify, "hi"))) == "right"
    assert len(server.requests) == 1


def test_the_last_caller_to_leave_cancels_the_call(
    server: Server, connect: Connect, run: Run, shape: Any
) -> None:
    server.play(OPENAI.good(fault="hang"))
    classify = shape(connect(OPENAI))

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(classify, "hi")
            await until(lambda: len(server.requests) == 1)
            group.cancel_scope.cancel()
        await until(lambda: server.open == 0)
        server.play(OPENAI.good("right"))
        assert str(await classify("hi")) == "right"

    run(main)
    assert len(server.requests) == 1


def test_each_caller_waits_under_its_own_deadline(
    server: Server, connect: Connect, run: Run
) -> None:
    hold = threading.Event()
    server.play(OPENAI.good("right", hold=hold))
    classify = cached_function(connect(OPENAI))
    hasty = retry(classify, timeout=0.02)
    answers = list[str]()

    async def patient() -> None:
        answers.append(await classify("hi"))

    async def main() -> None:
        with anyio.fail_after(15):
            async with anyio.create_task_group() as group:
                group.start_soon(patient)
                with pytest.raises(CallError, match=r"timeout=0\.02 s"):
                    await hasty("hi")
                with pytest.raises(TimeoutError), anyio.fail_after(0.02):
                    await classify("hi")
                hold.set()

    run(main)
    assert answers == ["right"]
    assert len(server.requests) == 1


def test_the_flight_does_not_end_with_the_task_of_its_first_caller(run: Run) -> None:
    started, proceed, answers = list[int](), anyio.Event(), list[str]()

    @cache(store={})
    async def classify() -> str:
        started.append(1)
        await proceed.wait()
        return "right"

    async def stay() -> None:
        answers.append(await classify())

    async def main() -> None:
        with anyio.fail_after(15):
            async with anyio.create_task_group() as all_tasks:
                async with anyio.create_task_group() as first:
                    first.start_soon(classify)
                    await until(lambda: bool(started))
                    all_tasks.start_soon(stay)
                    await anyio.sleep(0.005)
                    first.cancel_scope.cancel()
                proceed.set()

    run(main)
    assert (started, answers) == ([1], ["right"])


def test_a_call_that_follows_a_cancelled_flight_is_a_flight_of_its_own(run: Run) -> None:
    runs = list[int]()

    @cache(store={})
    async def classify() -> str:
        runs.append(1)
        if len(runs) == 1:
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.02)
        return "right"

    async def main() -> None:
        with anyio.fail_after(15):
            async with anyio.create_task_group() as group:
                group.start_soon(classify)
                await until(lambda: bool(runs))
                group.cancel_scope.cancel()
            assert await classify() == "right"

    run(main)
    assert len(runs) == 2


def test_threads_with_loops_of_their_own_have_flights_of_their_own(
    server: Server, connect: Connect
) -> None:
    hold = threading.Event()
    server.play(OPENAI.good("right", hold=hold))
    classify, answers = cached_function(connect(OPENAI)), list[str]()

    def thread() -> None:
        answers.extend(asyncio.run(together(5, functools.partial(classify, "hi"))))

    threads = [threading.Thread(target=thread) for _ in range(3)]
    for one in threads:
        one.start()
    anyio.run(until, lambda: len(server.requests) == 3)
    hold.set()
    for one in threads:
        one.join(15)
    assert answers == ["right"] * 15
    assert len(server.requests) == 3


def test_loops_that_come_and_go_share_what_is_kept(run: Run) -> None:
    assert [run(functools.partial(cache_worker.echo, "hi")) for _ in range(3)] == ["right hi"] * 3
    assert asyncio.run(cache_worker.echo("hi")) == "right hi"
    assert cache_worker.runs == ["hi"]


async def test_a_flight_leaves_no_task_behind(server: Server, connect: Connect) -> None:
    server.play(OPENAI.good(fault="hang"))
    classify = cached_function(connect(OPENAI))
    before = asyncio.all_tasks()
    with anyio.move_on_after(0.02):
        await together(10, functools.partial(classify, "hi"))
    await until(lambda: server.open == 0)
    await until(lambda: asyncio.all_tasks() == before)
    server.play(OPENAI.good("right"))
    await together(10, functools.partial(classify, "hi"))
    await until(lambda: asyncio.all_tasks() == before)
    assert await classify("hi") == "right"


def test_answers_of_one_call_are_not_changed_by_what_another_caller_does_to_them(
    run: Run, elsewhere: Any
) -> None:
    @cache
    async def numbers() -> list[list[int]]:
        await anyio.lowlevel.checkpoint()
        return [[1, 2], [3]]

    joined = run(functools.partial(together, 3, numbers))
    for answer in joined:
        assert answer == [[1, 2], [3]]
        answer[0].append(9)
        answer.clear()
    assert run(numbers) == [[1, 2], [3]]
    run(numbers)[0].append(7)
    assert run(numbers) == [[1, 2], [3]]
    elsewhere()
    assert run(numbers) == [[1, 2], [3]]


# ── Failures ───


def test_a_failure_is_not_kept(server: Server, connect: Connect, run: Run, shape: Any) -> None:
    bad = Answer(OPENAI.problem("invalid_request_error"), status=400)
    server.play(bad, OPENAI.good("right"))
    call = functools.partial(shape(connect(OPENAI)), "hi")
    assert isinstance(failing(run, call), CallError)
    assert str(run(call)) == "right"
    assert len(server.requests) == 2


def test_all_callers_of_one_flight_get_its_error_with_a_traceback_of_their_own(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(Answer(OPENAI.problem("invalid_request_error"), status=400))
    classify = cached_function(connect(OPENAI))
    raised = list[CallError]()

    async def call() -> None:
        with pytest.raises(CallError) as caught:
            await classify("hi")
        raised.append(caught.value)

    run(functools.partial(together, 20, call))
    assert len(server.requests) == 1
    for error in raised:
        assert (error.status, error.attempts) == (400, 1)
        assert "".join(traceback.format_exception(error)).count(ember.__file__) <= 2


@pytest.mark.parametrize("error", [KeyError("x"), ExceptionGroup("g", [ValueError("v")])])
def test_a_function_s_own_error_is_raised_itself_to_a_single_caller(
    run: Run, error: Exception
) -> None:
    @cache
    async def broken() -> str:
        raise error

    raised = failing(run, broken)
    assert raised is error or (type(raised), raised.args) == (type(error), error.args)
    assert raised.__cause__ is None


# ── Time to live ───


@pytest.mark.parametrize("ttl", [0.02, timedelta(milliseconds=20)])
@pytest.mark.parametrize("where", ["memory", "disk", "dict"])
def test_an_answer_is_kept_as_long_as_ttl_says(
    run: Run, elsewhere: Any, ttl: Any, where: str
) -> None:
    runs = list[int]()
    options = {"store": {}} if where == "dict" else {}

    @cache(ttl=ttl, **options)
    async def classify() -> int:
        runs.append(1)
        return len(runs)

    async def later() -> int:
        await anyio.sleep(0.04)
        return await classify()

    assert run(classify) == 1
    if where == "disk":
        elsewhere()
    assert run(later) == 2


@pytest.mark.parametrize("ttl", [60, 1e9, timedelta(days=1), None])
def test_an_answer_is_kept_until_ttl_ends(run: Run, elsewhere: Any, ttl: Any) -> None:
    runs = list[int]()

    @cache(ttl=ttl)
    async def classify() -> int:
        runs.append(1)
        return len(runs)

    assert [run(classify), run(classify)] == [1, 1]
    elsewhere()
    assert run(classify) == 1


# ── Stores ───


class Plain:
    """A store with plain functions, which gives bytes back, as Redis does."""

    def __init__(self) -> None:
        self.held = dict[str, bytes]()

    def get(self, key: str) -> bytes | None:
        return self.held.get(key)

    def set(self, key: str, value: str, *rest: Any, **more: Any) -> None:
        self.held[key] = value.encode()


class Async:
    """A store with async functions."""

    def __init__(self) -> None:
        self.held = dict[str, str]()

    async def get(self, key: str) -> str | None:
        await anyio.lowlevel.checkpoint()
        return self.held.get(key)

    async def set(self, key: str, value: str, *rest: Any, **more: Any) -> None:
        await anyio.lowlevel.checkpoint()
        self.held[key] = value


@pytest.mark.parametrize("make", [dict, Plain, Async])
def test_a_store_is_anything_with_get_and_set(
    server: Server, connect: Connect, run: Run, make: Any, directory: Path
) -> None:
    server.play(numbered())
    store = make()
    held: dict[Any, Any] = store if isinstance(store, dict) else store.held
    first, again = (cache(connect(OPENAI), store=store) for _ in range(2))
    assert run(functools.partial(first, "hi")).text == "answer 1"
    assert run(functools.partial(again, "hi")).text == "answer 1"
    (key,) = held
    assert isinstance(key, str)
    assert isinstance(held[key], str | bytes)
    held.clear()
    assert run(functools.partial(first, "hi")).text == "answer 2"
    assert not directory.exists()


def test_two_functions_in_one_store_do_not_share(run: Run) -> None:
    store = dict[str, str]()

    @cache(store=store)
    async def one(text: str) -> str:
        return f"one {text}"

    @cache(store=store)
    async def two(text: str) -> str:
        return f"two {text}"

    async def main() -> list[str]:
        return [await one("a"), await two("a"), await one("a"), await two("a")]

    assert run(main) == ["one a", "two a", "one a", "two a"]
    assert len(store) == 2


class Broken:
    """A store that fails where it is told to."""

    def __init__(self, *faults: str, error: type[Exception] = ConnectionError) -> None:
        self.faults, self.error, self.held = faults, error, dict[str, str]()

    def get(self, key: str) -> str | None:
        if "get" in self.faults:
            raise self.error("out of order")
        return self.held.get(key)

    async def set(self, key: str, value: str, *rest: Any, **more: Any) -> None:
        if "set" in self.faults:
            raise self.error("out of order")
        self.held[key] = value


@pytest.mark.parametrize("error", [ConnectionError, ValueError, TypeError, OSError, TimeoutError])
@pytest.mark.parametrize("faults", [("get",), ("set",), ("get", "set")])
def test_a_store_that_fails_is_one_warning_and_the_call_goes_through(
    run: Run, faults: tuple[str, ...], error: Any
) -> None:
    @cache(store=Broken(*faults, error=error))
    async def shout(text: str) -> str:
        return text.upper()

    async def main() -> list[str]:
        return [await shout(text) for text in "abc"]

    with pytest.warns(RuntimeWarning, match="out of order") as caught:
        assert run(main) == ["A", "B", "C"]
    assert len(caught) == 1


@pytest.mark.parametrize("store", [3, "directory", object, []])
def test_a_store_without_get_and_set_is_a_setup_error(store: Any) -> None:
    with pytest.raises(SetupError, match="store"):
        cache(whatever, store=store)


@pytest.mark.parametrize(
    "options", [{"ttl": -1}, {"ttl": "60"}, {"key": "text"}, {"key": 3}], ids=str
)
def test_a_wrong_option_is_a_setup_error_that_names_it(options: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match=next(iter(options))):
        cache(whatever, **options)


# ── key= ───


def test_key_is_called_with_the_arguments_and_says_what_is_equal(run: Run) -> None:
    seen = list[tuple[Any, ...]]()

    def key(text: str, *, thing: object = None) -> str:
        seen.append((text, thing))
        return text.lower()

    runs = list[str]()

    @cache(key=key)
    async def classify(text: str, *, thing: object = None) -> str:
        runs.append(text)
        return text

    odd = object()

    async def main() -> list[str]:
        return [await classify("A"), await classify("a", thing=odd), await classify(text="b")]

    assert run(main) == ["A", "A", "b"]
    assert runs == ["A", "b"]
    assert seen[:2] == [("A", None), ("a", odd)]


def test_functions_with_equal_texts_of_key_do_not_share(run: Run) -> None:
    @cache(key=lambda text: "same")
    async def one(text: str) -> str:
        return f"one {text}"

    @cache(key=lambda text: "same")
    async def two(text: str) -> str:
        return f"two {text}"

    async def main() -> list[str]:
        return [await one("a"), await two("b"), await one("c"), await two("d")]

    assert run(main) == ["one a", "two b", "one a", "two b"]


def test_with_key_closure_values_without_a_form_are_no_part_of_it(run: Run) -> None:
    def made(thing: object) -> Any:
        @cache(key=lambda text: text)
        async def classify(text: str) -> str:
            return f"{text} {id(thing)}"

        return classify

    async def main() -> list[str]:
        things = [object(), object(), "en", "fr"]
        return [await made(thing)("a") for thing in things]

    first, second, english, french = run(main)
    assert first == second
    assert len({first, english, french}) == 3


@pytest.mark.parametrize(
    ("raw", "text", "asked"), [({"odds": -float("inf")}, "hi", 1), ({}, "half \ud83d", 2)]
)
def test_a_reply_that_strict_json_cannot_hold_is_not_lost(
    run: Run, raw: Any, text: str, asked: int
) -> None:
    runs = list[str]()

    @cache
    async def classify(prompt: str) -> Reply[str]:
        runs.append(prompt)
        return Reply(text, text, cost=1.0, raw=raw)

    async def main() -> list[Reply[str]]:
        return [await classify("a"), await classify("a")]

    first, second = run(main)
    assert (first.text, second.text, len(runs)) == (text, text, asked)
    assert first.raw == raw


@pytest.mark.parametrize("key", [3, None, b"text", ["text"]])
def test_a_key_that_is_no_text_is_a_type_error_before_the_call(run: Run, key: Any) -> None:
    runs = list[str]()

    @cache(key=lambda text: key)
    async def classify(text: str) -> str:
        runs.append(text)
        return text

    error = failing(run, functools.partial(classify, "a"))
    assert isinstance(error, TypeError)
    assert "classify" in str(error)
    assert runs == []


def test_an_argument_without_a_form_is_a_type_error_that_names_it_and_the_way_out(
    run: Run,
) -> None:
    runs = list[object]()

    @cache
    async def classify(text: str, thing: object = None) -> str:
        runs.append(thing)
        return text

    for thing in (object(), [{"deep": object()}], threading.Lock(), io.StringIO(), iter([])):
        error = failing(run, functools.partial(classify, "a", thing))
        assert type(error) is TypeError
        assert "classify" in str(error)
        assert "thing" in str(error)
        assert "key=" in str(error)
    assert runs == []


def test_an_argument_that_holds_itself_or_is_deep_is_a_key_or_a_type_error(run: Run) -> None:
    @cache
    async def classify(thing: list[Any]) -> str:
        return "right"

    loop: list[Any] = []
    loop.append(loop)
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]

    async def main() -> list[str]:
        said = list[str]()
        for thing in (loop, deep):
            with anyio.fail_after(15):
                try:
                    said.append(await classify(thing))
                except TypeError as error:
                    said.append("right" if "thing" in str(error) else str(error))
        return said

    assert run(main) == ["right", "right"]


# ── Typed values ───


class Colour(enum.Enum):
    """An enumeration."""

    RED = "red"
    BLUE = 2


class Level(enum.IntEnum):
    """One whose members are numbers."""

    LOW = 1


@dataclasses.dataclass
class City:
    """A dataclass."""

    name: str
    at: tuple[float, float] = (0.0, 0.0)
    founded: date | None = None


@dataclasses.dataclass(frozen=True)
class Land:
    """One within which there are others."""

    cities: list[City]
    colours: dict[Colour, int]


class Person(BaseModel):
    """A model of pydantic's."""

    name: str
    born: date
    tags: set[str] = set()


class Place(NamedTuple):
    """A named tuple."""

    x: int
    y: str


class Row(TypedDict):
    """A dict of known keys."""

    name: str
    city: City


PARIS = City("Paris", (48.9, 2.4), date(987, 1, 1))
PERSON = Person(name="Ada", born=date(1815, 12, 10), tags={"a", "b"})
VALUES: list[tuple[Any, Any]] = [
    (str, "text é\x00\ud800"),
    (str, ""),
    (int, 7),
    (int, 2**70),
    (float, 0.1),
    (bool, False),
    (None, None),
    (bytes, b"text\x00"),
    (City, PARIS),
    (City, City("Rome")),
    (Land, Land([PARIS, City("Rome")], {Colour.RED: 1})),
    (Person, PERSON),
    (Colour, Colour.BLUE),
    (Level, Level.LOW),
    (Place, Place(1, "y")),
    (Row, {"name": "x", "city": PARIS}),
    (tuple[int, str], (1, "a")),
    (tuple[City, ...], (PARIS, City("Rome"))),
    (tuple[()], ()),
    (list[City], [PARIS, City("Rome")]),
    (list[list[int]], [[1], []]),
    (dict[str, int], {"b": 1, "a": 2}),
    (dict[int, City], {1: PARIS}),
    (set[int], {3, 1, 2}),
    (frozenset[str], frozenset("abc")),
    (date, date(2026, 11, 21)),
    (datetime, datetime(2026, 11, 21, 1, 2, 3, 4, UTC)),
    (timedelta, timedelta(days=1, microseconds=1)),
    (Decimal, Decimal("1.10")),
    (uuid.UUID, uuid.UUID(int=7)),
    (Path, Path("a/b")),
    (Literal["a", "b"], "b"),
    (City | None, None),
    (City | None, PARIS),
    (int | str, "7"),
    (str | int, 7),
    (list[int | str], [7, "7"]),
    ("City", PARIS),
    ("list[City]", [PARIS]),
    (Any, {"a": [1, 2.5, None, True, "x"]}),
    (object, ["a", {"b": 1}]),
    (ember.Usage, ember.Usage(1, 2, 3)),
]


def kinds(cases: list[tuple[Any, Any]]) -> list[str]:
    """A name for each case."""
    return [f"{number} {type(value).__name__}" for number, (_, value) in enumerate(cases)]


def returning(annotation: Any, value: Any, runs: list[int]) -> Any:
    """An uncached function with this annotation, which returns a fresh value."""

    async def answer() -> Any:
        runs.append(1)
        return copy.deepcopy(value)

    answer.__annotations__["return"] = annotation
    return answer


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of equal types, all the way down."""
    return one == other and form(one) == form(other)


@pytest.mark.parametrize(("annotation", "value"), VALUES, ids=kinds(VALUES))
def test_a_hit_is_an_equal_fresh_value_of_the_annotated_type(
    run: Run, elsewhere: Any, annotation: Any, value: Any
) -> None:
    runs = list[int]()
    answer = cache(returning(annotation, value, runs))
    first, from_memory = run(answer), run(answer)
    elsewhere()
    for got in (first, from_memory, run(answer)):
        assert same(got, value), got
    assert len(runs) == 1
    if isinstance(value, list | dict | set | City | Land | Person):
        assert len({id(first), id(from_memory), id(run(answer))}) == 3


@pytest.mark.parametrize("value", [None, "x", 7, 2.5, True, [1, [None]], {"a": {"b": [1]}}])
def test_without_an_annotation_what_json_restores_is_kept(
    run: Run, elsewhere: Any, value: Any
) -> None:
    runs = list[int]()

    @cache
    async def answer():  # type: ignore[no-untyped-def]  # noqa: ANN202
        runs.append(1)
        return value

    assert same(run(answer), value)
    elsewhere()
    assert same(run(answer), value)
    assert len(runs) == 1


class Thing:
    """What no JSON can say."""


UNRESTORED: list[tuple[Any, Any]] = [
    (Any, (1, 2)),
    (Any, PARIS),
    (Any, {1: "a"}),
    (Any, {1, 2}),
    (Any, b"x"),
    (object, Colour.RED),
    (list, [(1, 2)]),
    (tuple[int, ...], [1, 2]),
    (list[int], (1, 2)),
    (float, float("nan")),
    (bytes, b"\xff"),
    (City, {"name": "Paris"}),
    (str, City("Paris")),
    (Thing, Thing()),
    (Any, Thing()),
    (Any, lambda: 1),
]


@pytest.mark.parametrize(("annotation", "value"), UNRESTORED, ids=kinds(UNRESTORED))
def test_what_cannot_be_restored_equal_is_a_type_error_on_the_first_call(
    run: Run, annotation: Any, value: Any, directory: Path
) -> None:
    async def answer() -> Any:
        return value

    answer.__annotations__["return"] = annotation
    error = failing(run, cache(answer))
    assert type(error) is TypeError
    assert "answer" in str(error)
    assert stored(directory) == []


@dataclasses.dataclass
class Amount:
    """A value that a model fills in."""

    value: int


@dataclasses.dataclass
class Count:
    """Another of the same form."""

    value: int


class Counted(BaseModel):
    """A third one."""

    value: int


class Grade(enum.IntEnum):
    """An enumeration that a model picks from."""

    GOOD = 1


@pytest.mark.parametrize(
    ("output", "data"),
    [(Amount, Amount(1)), (Counted, Counted(value=1)), (int, 1), (Grade, Grade.GOOD),
     (Literal[1, 2], 1), (float, 1.0), (bool, True)],
)  # fmt: skip
def test_a_reply_with_a_typed_value_is_restored_with_it(
    server: Server, connect: Connect, run: Run, elsewhere: Any, output: Any, data: Any
) -> None:
    server.play(OPENAI.good('{"value": 1}'))
    ask = cache(connect(OPENAI))
    call = functools.partial(ask, "hi", output=output)
    replies = [run(call), run(call)]
    elsewhere()
    for reply in (*replies, run(call)):
        assert same(reply.data, data)
        assert reply.text == '{"value": 1}'
    assert len(server.requests) == 1


def test_a_reply_with_a_list_of_dataclasses_is_restored(
    server: Server, connect: Connect, run: Run, elsewhere: Any
) -> None:
    server.play(OPENAI.good('{"value": [{"name": "Paris", "at": [48.9, 2.4]}]}'))
    ask = connect(OPENAI)

    @cache
    async def cities() -> Reply[list[City]]:
        return await ask("hi", output=list[City])

    calls = [cities, functools.partial(cache(ask), "hi", output=list[City])]
    for call in calls:
        first = run(call)
        elsewhere()
        again = run(call)
        assert same(again.data, first.data)
        assert again.data == [City("Paris", (48.9, 2.4))]
        assert again.data[0] is not first.data[0]
        assert (first.cached, again.cached) == (False, True)
    assert len(server.requests) == 2


def test_two_output_types_of_one_form_are_each_restored_as_asked(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(OPENAI.good('{"value": 1}'))
    ask = cache(connect(OPENAI))
    for output in (Amount, Count, Counted, Amount, Count, Counted):
        assert type(run(functools.partial(ask, "hi", output=output)).data) is output


def test_a_reply_with_tool_calls_is_restored_with_them(
    server: Server, connect: Connect, run: Run, elsewhere: Any
) -> None:
    function = {"name": "add", "arguments": '{"x": 1, "y": [1, 2]}'}
    calls = [{"id": "a", "type": "function", "function": function}]
    server.play(Answer(openai_answer(None, finish="tool_calls", tool_calls=calls)))
    ask = cache(connect(OPENAI))
    schema = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = functools.partial(ask, "hi", tools=[schema])
    first = run(call)
    elsewhere()
    again = run(call)
    assert same(again.tool_calls, first.tool_calls)
    assert first.tool_calls == (ember.ToolCall("a", "add", {"x": 1, "y": [1, 2]}),)
    assert (again.message, again.raw, again.usage) == (first.message, first.raw, first.usage)
    assert len(server.requests) == 1


# ── Keys: equal calls share one, different ones never do ───


def form(value: Any) -> Any:
    """A value with the types of all its parts, so that equal forms are equal arguments."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, enum.Enum):
        return kind, value.name
    if isinstance(value, datetime):
        return kind, value.isoformat()  # UTC has several types
    if isinstance(value, dict):
        return kind, [(form(key), form(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return kind, [form(item) for item in value]
    if isinstance(value, set | frozenset):
        return kind, sorted(repr(form(item)) for item in value)
    if dataclasses.is_dataclass(value):
        return kind, [form(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, BaseModel):
        return kind, [(name, form(getattr(value, name))) for name in type(value).model_fields]
    return kind, repr(value)


def key_of(fn: Any, *args: Any, **kwargs: Any) -> str:
    """The key of a call, as a store gets it."""
    store = dict[str, str]()
    asyncio.run(cache(fn, store=store)(*args, **kwargs))
    (key,) = store
    return key


async def whatever(thing: Any) -> str:
    """Anything as an argument."""
    return "right"


def add(x: int, y: int) -> int:
    """The sum."""
    return x + y


@dataclasses.dataclass(frozen=True)
class Town:
    """Like City, but for its name."""

    name: str
    at: tuple[float, float] = (0.0, 0.0)
    founded: date | None = None


class Shade(enum.Enum):
    """Like Colour, but for its name."""

    RED = "red"


class Text(str):
    """A text of a class of its own."""

    __slots__ = ()


DISTINCT: list[Any] = [
    None, "None", "", [], (), {}, set(), frozenset(), b"", 0, False, 0.0, -0.0, 1, True, 1.0, "1",
    b"1", Decimal(1), Decimal("1.0"), 1j, "a", b"a", bytearray(b"a"), ["a"], ("a",), {"a"},
    frozenset("a"), {"a": None}, [["a"]], ["a", None], ["a", "b"], ["a,b"], ["a', 'b"],
    ['a", "b'], '["a"]', "['a']", {"1": 0}, {1: 0}, {True: 0}, {1.0: 0}, {"a": 1, "b": 2},
    {"b": 2, "a": 1}, [("a", 1)], Colour.RED, Shade.RED, "red", Colour.BLUE, Level.LOW,
    City("a"), Town("a"), {"name": "a"}, City("a", (0, 0)), City("a", (1.0, 0.0)),
    Person(name="a", born=date(1, 1, 1)), Person(name="a", born=date(1, 1, 1), tags={"x"}),
    Place(1, "a"), (1, "a"), [1, "a"], date(2026, 11, 21), datetime(2026, 11, 21),  # noqa: DTZ001
    datetime(2026, 11, 21, tzinfo=UTC), "2026-11-21", timedelta(1), Path("a"), uuid.UUID(int=1),
    "é", "e\u0301", "\ud800", "\\ud800", "\udc80", "a\x00b", "a\x00", float("inf"), float("-inf"),
    float("nan"), "inf", 2**64, 2.0**64, 10**30, 1e30, Text("a"), range(3), [0, 1, 2],
    model("openai:gpt-4o"), model("openai:gpt-4.1"), model("openai:gpt-4o", temperature=0),
    model("openai:gpt-4o", base_url="https://other.example/v1"), Reply("a", "a"),
]  # fmt: skip


def test_arguments_that_differ_in_value_or_type_never_share_a_key() -> None:
    keys = dict[str, Any]()
    for value in DISTINCT:
        with contextlib.suppress(TypeError):  # one without a form is no risk
            key = key_of(whatever, value)
            assert key not in keys, f"{value!r} and {keys[key]!r}"
            keys[key] = value
    assert len(keys) > len(DISTINCT) - 10


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0])
    | st.text("a1,'\"[]{}:\\\x00é ", max_size=3)
    | st.binary(max_size=2)
    | st.sampled_from([Colour.RED, Shade.RED, Level.LOW, City("a"), Town("a"), Place(1, "a")])
    | st.sampled_from([date(2026, 1, 1), Decimal("1.0"), Decimal(1), Path("a"), PERSON])
)
HASHABLE = st.integers(-1, 1) | st.booleans() | st.text("a1", max_size=2) | st.sampled_from([1.0])
THINGS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.sets(HASHABLE, max_size=3)
        | st.frozensets(HASHABLE, max_size=3)
    ),
    max_leaves=6,
)
often = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@often
@given(THINGS, THINGS)
def test_two_arguments_share_a_key_if_and_only_if_they_are_equal(one: Any, other: Any) -> None:
    assert (key_of(whatever, one) == key_of(whatever, other)) is (form(one) == form(other))


@often
@given(THINGS)
def test_a_copy_of_an_argument_shares_its_key(thing: Any) -> None:
    assert key_of(whatever, thing) == key_of(whatever, pickle.loads(pickle.dumps(thing)))


@often
@given(st.lists(THINGS, max_size=3), st.lists(THINGS, max_size=3))
def test_arguments_do_not_run_into_each_other(one: list[Any], other: list[Any]) -> None:
    async def many(*things: Any, **named: Any) -> str:
        return "right"

    equal = form(one) == form(other)
    assert (key_of(many, *one) == key_of(many, *other)) is equal
    named = [dict(zip("xyz", things, strict=False)) for things in (one, other)]
    assert (key_of(many, **named[0]) == key_of(many, **named[1])) is equal
    assert not one or key_of(many, *one) != key_of(many, **named[0])


def test_arguments_are_bound_to_the_signature() -> None:
    async def classify(text: str, n: int = 1, *more: int, system: str = "s", **rest: int) -> str:
        return "right"

    keys = [
        key_of(classify, "a"),
        key_of(classify, text="a"),
        key_of(classify, "a", 1),
        key_of(classify, n=1, text="a"),
        key_of(classify, "a", system="s"),
        key_of(classify, "a", 1, system="s"),
    ]
    assert len(set(keys)) == 1
    others = [
        key_of(classify, "a", 2),
        key_of(classify, "a", 1, 2),
        key_of(classify, "a", True),
        key_of(classify, "a", system="t"),
        key_of(classify, "a", more=2),
        key_of(classify, "a", rest=2),
    ]
    assert len({*keys, *others}) == 1 + len(others)


SOURCE = """
async def classify(text, *, n=1, **more):
    def shown(value, end=1):
        return [f"{value}{item}" for item in text.upper() if item != "x"] + [lambda: end + 1]
    result = helper(text, 1)
    return "right"
"""
EDITS = [
    ("n=1", "n=2"), ("n=1", "n=True"), ("n=1", "n=1.0"), ("n=1", "n='1'"), ("n=1", "n=None"),
    ("upper", "lower"), ('"x"', '"y"'), ('"x"', "b'x'"), ("end=1", "end=2"), ("end + 1", "end + 2"),
    ("end + 1", "end - 1"), ("end + 1", "end + True"), ("end + 1", "end + 1.0"), ("!=", "=="),
    ("helper(text, 1)", "helpers(text, 1)"), ("helper(text, 1)", "helper(text, True)"),
    ("helper(text, 1)", "helper(text, 1.0)"), ("helper(text, 1)", "helper(text, (1, 2))"),
    ("helper(text, 1)", "helper(text, (True, 2))"), ("helper(text, 1)", "helper(text, [1, 2])"),
    ("helper(text, 1)", "helper(text, -0.0)"), ("helper(text, 1)", "helper(text, 0.0)"),
    ("helper(text, 1)", "helper.text(1)"), ("helper(text, 1)", "helper(1, text)"),
    ("helper(text, 1)", "await helper(text, 1)"), ("helper(text, 1)", "helper(text, x=1)"),
    ("helper(text, 1)", "helper(text, ...)"), ("helper(text, 1)", "helper(text, '1')"),
    ("helper(text, 1)", "helper(text, {'a', 'b'} & text)"), ('f"{value}', 'f"{value!r}'),
    ("helper(text, 1)", "text in {'a', 'b'}"), ("helper(text, 1)", "text in {'a', 'c'}"),
    ("**more", "**most"), ("text, *, n", "text, n"), ('f"{value}', 'f"{value:>3}'),
]  # fmt: skip


def compiled(source: str, filename: str = "edited.py") -> Any:
    """The function in a source, as if it stood in this module."""
    space = {"__name__": __name__, "helper": lambda *args, **more: 1, "helpers": lambda *args: 1}
    exec(compile(source, filename, "exec"), space)
    return space["classify"]


def test_edited_code_never_shares_a_key() -> None:
    async def key(source: str) -> str:
        store = dict[str, str]()
        with contextlib.suppress(TypeError, AttributeError):  # it need not work, but be kept
            await cache(compiled(source), store=store, ttl=60)("A")
        return next(iter(store), "")

    sources = {SOURCE, *(SOURCE.replace(*edit) for edit in EDITS)}
    assert len(sources) == 1 + len(EDITS)
    # What is called does not matter, only that it is: it is never reached.
    texts = [s.replace("    result =", '    if text:\n        return "right"\n    result =')
             for s in sources]  # fmt: skip
    keys = [asyncio.run(key(text)) for text in texts]
    assert "" not in keys
    assert len(set(keys)) == len(texts)


def test_the_same_code_shares_a_key_wherever_it_stands() -> None:
    keys = {
        key_of(compiled(SOURCE.replace("result = helper(text, 1)", "pass")), "a"),
        key_of(compiled(SOURCE.replace("result = helper(text, 1)", "pass")), "a"),
        key_of(compiled("\n\n\n" + SOURCE.replace("result = helper(text, 1)", "pass")), "a"),
        key_of(compiled(SOURCE.replace("result = helper(text, 1)", "pass"), "moved.py"), "a"),
        key_of(compiled(SOURCE.replace("result = helper(text, 1)", "pass  # a comment")), "a"),
    }
    assert len(keys) == 1


def test_names_and_modules_are_part_of_a_key() -> None:
    def renamed(name: str, module: str) -> Any:
        async def classify(text: str) -> str:
            return "right"

        classify.__qualname__, classify.__module__ = name, module
        return classify

    whos = [("classify", "one"), ("classify", "two"), ("other", "one"), ("one.classify", "")]
    assert len({key_of(renamed(*who), "a") for who in whos}) == len(whos)


def closing_over(value: Any) -> Any:
    """A function whose closure holds a value."""

    async def classify(text: str) -> str:
        return f"{text}{value!r:.0}"

    return classify


def test_closure_values_that_differ_never_share_a_key() -> None:
    keys = dict[str, Any]()
    for value in DISTINCT:
        key = key_of(closing_over(value), "a")
        assert key not in keys, f"{value!r} and {keys[key]!r}"
        keys[key] = value


@often
@given(THINGS, THINGS)
def test_two_closures_share_a_key_if_and_only_if_their_values_are_equal(
    one: Any, other: Any
) -> None:
    keys = [key_of(closing_over(value), "a") for value in (one, other)]
    assert (keys[0] == keys[1]) is (form(one) == form(other))


def test_helpers_in_a_closure_are_part_of_the_key() -> None:
    def helper(number: int) -> Any:
        def helped(text: str) -> str:
            return f"{text} {number}"

        return helped

    keys = {
        key_of(closing_over(value), "a")
        for value in (
            helper(1), helper(2), lambda x: x + 1, lambda x: x + 2, len, max, str.upper, str.lower,
            functools.partial(add, 1), functools.partial(add, 2), City("a").__eq__, City, Town, add,
        )
    }  # fmt: skip
    assert len(keys) == 14


class Slotted:
    """An object without a form, and so small that the next one often gets its address."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def test_a_value_without_a_form_in_a_closure_is_shared_with_no_other() -> None:
    store = dict[str, str]()

    def made(thing: Slotted) -> Any:
        @cache(store=store)
        async def classify() -> int:
            return thing.number

        return classify

    async def main() -> None:
        for number in range(100):
            classify = made(Slotted(number))
            assert [await classify(), await classify()] == [number, number]
            assert len(store) == number + 1
            del classify
            if number % 20 == 0:
                gc.collect()

    asyncio.run(main())


CLASSES = {
    "method": "class Helper:\n def prompt(self): return {0!r}",
    "static method": "class Helper:\n @staticmethod\n def prompt(): return {0!r}",
    "class method": "class Helper:\n @classmethod\n def prompt(cls): return {0!r}",
    "property": "class Helper:\n @property\n def prompt(self): return {0!r}",
    "attribute": "class Helper:\n prompt = {0!r}",
    "base": "class Base:\n def prompt(self): return {0!r}\nclass Helper(Base): pass",
}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_in_a_closure_is_known_by_what_it_does(kind: str) -> None:
    keys = list[str]()
    for text in ("one", "two", "one"):  # as in a notebook, where a cell is run again
        space = {"__name__": __name__}
        exec(CLASSES[kind].format(text), space)
        keys.append(key_of(closing_over(space["Helper"]), "a"))
    assert keys[0] == keys[2] != keys[1]


def test_what_a_function_appends_to_a_list_does_not_change_its_key(run: Run) -> None:
    seen, counts = list[str](), dict[str, int]()

    @cache
    async def classify(text: str) -> str:
        seen.append(text)
        counts[text] = counts.get(text, 0) + 1
        return text

    for _ in range(3):
        run(functools.partial(classify, "a"))
        run(functools.partial(classify, "b"))
    assert (seen, counts) == (["a", "b"], {"a": 1, "b": 1})


def test_binding_a_closure_s_variable_anew_changes_the_key(run: Run) -> None:
    style = "short"

    @cache
    async def classify(text: str) -> str:
        return f"{style} {text}"

    assert run(functools.partial(classify, "a")) == "short a"
    style = "long"
    assert run(functools.partial(classify, "a")) == "long a"
    style = "short"
    assert run(functools.partial(classify, "a")) == "short a"


def test_a_variable_that_the_function_binds_itself_is_no_part_of_its_key(run: Run) -> None:
    count = 0

    @cache
    async def classify(text: str) -> str:
        nonlocal count
        count += 1
        return f"{text} {count}"

    assert [run(functools.partial(classify, "a")) for _ in range(3)] == ["a 1"] * 3
    assert count == 1


def test_a_function_that_calls_itself_is_cached(run: Run) -> None:
    runs = list[int]()

    @cache
    async def fibonacci(n: int) -> int:
        runs.append(n)
        return n if n < 2 else await fibonacci(n - 1) + await fibonacci(n - 2)

    assert run(functools.partial(fibonacci, 20)) == 6765
    assert sorted(runs) == list(range(21))


def test_two_functions_that_call_each_other_are_cached(run: Run) -> None:
    runs = list[int]()

    @cache
    async def even(n: int) -> bool:
        runs.append(n)
        return n == 0 or await odd(n - 1)

    @cache
    async def odd(n: int) -> bool:
        runs.append(n)
        return n != 0 and await even(n - 1)

    assert run(functools.partial(even, 10)) is True
    assert run(functools.partial(even, 10)) is True
    assert len(runs) == 11


def test_objects_are_part_of_the_key_of_their_methods(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(numbered())
    ask = connect(OPENAI)
    answers = [
        run(functools.partial(Classifier(model, kind).classify, "hi"))
        for model in (ask, ask.using(temperature=0), connect(OPENAI))
        for kind in ("plain", "rude")
    ]
    assert answers == [f"answer {n}" for n in (1, 2, 3, 4, 1, 2)]


def test_decorators_below_are_part_of_the_key(run: Run) -> None:
    store = dict[str, str]()

    async def classify(text: str) -> str:
        return text

    for fn in (classify, retry(classify), retry(classify, max_attempts=5), ember.batch(classify)):
        run(functools.partial(cache(fn, store=store), "a"))
    assert 1 <= len(store) <= 4


# ── Keys of models ───


def subtract(x: int, y: int) -> int:
    """The sum."""
    return x - y


def other_add() -> Any:
    """A tool with the name, the signature and the words of `add`, which does something else."""

    def add(x: int, y: int) -> int:
        """The sum."""
        return x * y

    return add


TOOLS = [add, subtract, other_add()]
PROMPTS: list[Any] = [
    "hi",
    "hi ",
    "",
    "[]",
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}],
    [{"role": "user", "content": "short"}, {"role": "user", "content": "hi"}],
    [{"role": "user", "content": "short"}, {"role": "assistant", "content": "hi"}],
    [{"role": "user", "content": "short\nhi"}],
    Reply("hi", "hi"),
]
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "system": st.sampled_from(["short", "", "hi"]),
    "temperature": st.sampled_from([0, 1, 0.5]),
    "max_tokens": st.sampled_from([1, 10]),
    "stop": st.sampled_from(["a", ["a"], ["a", "b"], ["ab"]]),
    "seed": st.sampled_from([0, 1]),
    "tools": st.sampled_from([[tool] for tool in TOOLS] + [[add, subtract]]),
    "images": st.sampled_from([[PNG], [PNG, PNG], [PNG + b"x"], ["https://x.example/a.png"]]),
    "output": st.sampled_from([int, float, bool, Literal[1], Literal[1, 2], Amount, Count]),
    "top_p": st.sampled_from([0.5, 1]),
    "user": st.sampled_from(["a", "b"]),
    "metadata": st.sampled_from([{"a": 1}, {"a": "1"}, {"a": True}, {"a": None}]),
}
MODELS = [
    ("openai:gpt-4o", "https://one.example/v1"),
    ("openai:gpt-4o", "https://two.example/v1"),
    ("openai:gpt-4.1", "https://one.example/v1"),
    ("mistral:gpt-4o", "https://one.example/v1"),
    ("anthropic:gpt-4o", "https://one.example/v1"),
    ("anthropic:claude-sonnet-4-5", "https://one.example/v1"),
]
REQUESTS = st.tuples(
    st.sampled_from(MODELS),
    st.sampled_from(PROMPTS),
    st.fixed_dictionaries({}, optional=OPTIONS),
)


def asked(request: Any) -> tuple[str, Any]:
    """The key of a model's call, and all that the answer depends on."""
    (name, url), prompt, options = request
    if name.startswith("anthropic"):  # it has no seed, and says so
        options = {key: value for key, value in options.items() if key != "seed"}
    sent = list[Any]()

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((str(request.url), json.loads(request.content)))
        make = anthropic_answer if request.url.path.endswith("messages") else openai_answer
        return httpx.Response(200, json=make('{"value": 1}'))

    transport = httpx.MockTransport(answer)
    ask = model(name, base_url=url, api_key="sk-12345678", transport=transport)
    key = key_of(ask, prompt, **options)
    assert len(sent) == 1
    depends = [sent, options.get("output"), [id(tool) for tool in options.get("tools", [])]]
    return key, (name.partition(":")[0], json.dumps(depends, default=str, sort_keys=True))


@often
@given(REQUESTS, REQUESTS, st.sampled_from([0, 1, 2]))
def test_two_requests_share_a_key_if_and_only_if_they_are_the_same(
    one: Any, other: Any, alike: int
) -> None:
    if alike:  # they differ in one part, or in one option
        other = (one[0], one[1], other[2]) if alike == 1 else (one[0], other[1], one[2])
    (key, depends), (other_key, other_depends) = asked(one), asked(other)
    if depends != other_depends:
        assert key != other_key
    if (one[0], one[1]) == (other[0], other[1]) and [*one[2].items()] == [*other[2].items()]:
        assert key == other_key


@pytest.mark.parametrize("name", OPTIONS)
def test_one_option_more_or_another_value_of_it_is_another_key(name: str) -> None:
    values: list[Any] = [*OPTIONS[name].elements]  # type: ignore[attr-defined]
    if name == "stop":
        values.remove("a")  # which is the same as ["a"]
    requests = [(MODELS[0], "hi", {name: value}) for value in values]
    keys = [asked(request)[0] for request in [(MODELS[0], "hi", {}), *requests]]
    assert len(set(keys)) == len(keys)


def test_defaults_of_a_model_and_parameters_of_a_call_are_one_request() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=openai_answer()))
    ask = model("openai:gpt-4o", api_key="sk-12345678", transport=transport)
    keys = {
        key_of(ask, "hi", temperature=0),
        key_of(ask.using(temperature=0), "hi"),
        key_of(ask.using(temperature=1), "hi", temperature=0),
        key_of(ask.using(retries=9, timeout=3.0), "hi", temperature=0),
        key_of(ask.using(api_key="sk-another-one"), "hi", temperature=0),
        key_of(ask, prompt="hi", temperature=0),
    }
    assert len(keys) == 1


def test_an_image_file_that_changed_is_another_request(
    server: Server, connect: Connect, run: Run, tmp_path: Path
) -> None:
    server.play(numbered())
    ask, path = cache(connect(OPENAI)), tmp_path / "image.png"
    answers = list[str]()
    for content in (PNG, PNG, PNG + b"x", PNG):
        path.write_bytes(content)
        answers.append(run(functools.partial(ask, "hi", images=[path])).text)
    assert answers == ["answer 1", "answer 1", "answer 2", "answer 1"]


def test_a_base_url_of_the_environment_is_part_of_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=openai_answer()))
    ask = model("openai:gpt-4o", api_key="sk-12345678", transport=transport)
    keys = set[str]()
    for url in ("https://one.example/v1", "https://two.example/v1"):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        keys.add(key_of(ask, "hi"))
    assert len(keys) == 2


def test_a_wrong_request_is_refused_as_without_a_cache(
    server: Server, connect: Connect, run: Run
) -> None:
    ask = cache(connect(OPENAI))
    assert type(failing(run, functools.partial(ask, None))) is TypeError
    for options in ({"stream": True}, {"retries": 3}, {"images": [b"none"]}, {"tools": [3]}):
        assert isinstance(failing(run, functools.partial(ask, "hi", **options)), SetupError)
    assert server.requests == []


# ── Processes ───


def worker(*arguments: str, **how: Any) -> subprocess.Popen[str]:
    """A process that runs cache_worker.py on this test's directory."""
    paths = [str(WORKER.parents[1]), str(WORKER.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **how.pop("env", {})}
    pipe = subprocess.PIPE
    command = [sys.executable, str(WORKER), *arguments]
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env, **how
    )


def told(process: subprocess.Popen[str]) -> Any:
    """What a worker printed at its end, as JSON."""
    printed, problems = process.communicate(timeout=30)
    assert process.returncode == 0, problems
    return json.loads(printed)


def test_100_equal_calls_from_4_processes_are_at_most_4_requests_and_equal(
    server: Server,
) -> None:
    server.play(numbered())
    workers = [worker("equal", server.url + OPENAI.base, "25") for _ in range(4)]
    for one in workers:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in workers:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    answers = [told(one) for one in workers]
    asked = Counter(map(prompt_of, server.requests))
    assert 1 <= asked["function"] <= 4
    assert 1 <= asked["model"] <= 4
    for kind in (slice(25), slice(25, None)):
        assert len({answer for each in answers for answer in each[kind]}) == 1


def test_a_process_finds_what_another_has_stored() -> None:
    first = told(worker("once", "one", env={"PYTHONHASHSEED": "1"}))
    again = told(worker("once", "one", env={"PYTHONHASHSEED": "2"}))
    assert first == [["right one", True], ["one", "one"]]
    assert again == [["right one", True], []]
    assert asyncio.run(cache_worker.echo("one")) == "right one"
    assert cache_worker.runs == []


def test_many_threads_that_write_at_once_keep_every_answer(directory: Path) -> None:
    asyncio.run(cache_worker.echo("first"))

    async def write(name: int) -> None:
        for number in range(25):
            await cache_worker.echo(f"{name} {number}")

    threads = [threading.Thread(target=asyncio.run, args=(write(name),)) for name in range(16)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for one in threads:
            one.start()
        for one in threads:
            one.join(30)
    assert [str(warning.message) for warning in caught] == []
    assert len(stored(directory)) == 1 + 16 * 25


def test_a_kill_among_1000_writes_leaves_every_answer_that_was_returned(directory: Path) -> None:
    writer = worker("write", "1000")
    assert writer.stdout is not None
    written = [int(writer.stdout.readline()) for _ in range(300)]
    writer.send_signal(signal.SIGKILL)
    rest, _ = writer.communicate(timeout=30)
    written += [int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    assert 300 <= len(written) < 1000

    async def read() -> None:
        for number in written:
            assert await cache_worker.echo(str(number)) == f"right {number}"
        assert cache_worker.runs == []
        assert await cache_worker.echo("more") == "right more"

    asyncio.run(read())
    with contextlib.closing(sqlite3.connect(database(directory))) as file:
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# ── Rows that somebody else wrote ───


def database(directory: Path) -> Path:
    """The cache's file."""
    (found,) = directory.rglob("cache.db")
    return found


def stored(directory: Path) -> list[Any]:
    """The values in the cache's file."""
    if not directory.exists():
        return []
    with contextlib.closing(sqlite3.connect(database(directory))) as file:
        return [value for (value,) in file.execute("SELECT value FROM Cache")]


def emptied(directory: Path) -> None:
    """Delete all rows, as another process may."""
    with contextlib.closing(sqlite3.connect(database(directory))) as file, file:
        assert file.execute("DELETE FROM Cache").rowcount > 0


def craft(directory: Path, table: str = "Cache", **columns: Any) -> None:
    """Write these columns into all rows."""
    names = ", ".join(f"{name} = ?" for name in columns)
    with contextlib.closing(sqlite3.connect(database(directory))) as file, file:
        file.execute(f"UPDATE {table} SET {names}", tuple(columns.values()))


class Payload:
    """What makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def crafted(elsewhere: Any) -> Path:
    """A directory with one row, the answer of `echo("hi")`, that is not in memory."""
    asyncio.run(cache_worker.echo("hi"))
    there: Path = elsewhere()
    (value,) = stored(there)
    assert "right hi" in value
    cache_worker.runs.clear()
    return there


def quietly(*texts: str) -> list[str]:
    """The answers of `echo`, at most one warning, in bounded time."""

    async def main() -> list[str]:
        with anyio.fail_after(5):
            answers = [await cache_worker.echo(text) for text in texts]
            await anyio.sleep(0.001)  # where a stall that blocked the loop is seen
        return answers

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = asyncio.run(main())
    assert [warning.category for warning in caught] in ([], [RuntimeWarning])
    return answers


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4, 5, -1, 10**9, None, "4", b"4"])
@pytest.mark.parametrize("raw", [0, 1])
@pytest.mark.parametrize("in_file", [False, True])
def test_a_pickle_in_a_row_is_never_loaded(
    crafted: Path, tmp_path: Path, mode: Any, raw: int, in_file: bool
) -> None:
    proof = tmp_path / "proof"
    payload = pickle.dumps(Payload(proof))
    (crafted / "x.val").write_bytes(payload)
    columns = {"value": None, "filename": "x.val"} if in_file else {"value": payload}
    craft(crafted, mode=mode, raw=raw, **columns)
    assert quietly("hi", "other") == ["right hi", "right other"]
    assert not proof.exists()


@pytest.mark.parametrize("mode", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["up", "absolute", "link"])
@pytest.mark.parametrize("expired", [False, True])
def test_a_row_never_leads_to_another_file(
    crafted: Path, tmp_path: Path, mode: int, kind: str, expired: bool
) -> None:
    (value,) = stored(crafted)
    victim = tmp_path / "empty but for this" / "secret.txt"
    victim.parent.mkdir()
    victim.write_text(value.replace("right hi", "a secret"), encoding="utf-8")
    before = victim.read_bytes()
    (database(crafted).parent / "link.val").symlink_to(victim)
    up = os.path.relpath(victim, database(crafted).parent)
    filename = {"up": up, "absolute": str(victim), "link": "link.val"}[kind]
    craft(crafted, value=None, mode=mode, filename=filename, expire_time=1.0 if expired else None)
    assert quietly("hi", "other", "hi") == ["right hi", "right other", "right hi"]
    assert victim.read_bytes() == before


VALUES_OF_ROWS: dict[str, Any] = {
    "null": None, "number": 7, "float": 0.5, "bytes": b"\xff\xfe", "empty": "", "blank": " ",
    "no json": "{", "text": '"right hi"', "json null": "null", "json number": "7", "list": "[]",
    "object": "{}", "nan": "NaN", "deep list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"value":' * 50_000 + "1" + "}" * 50_000, "digits": "9" * 10_000,
    "exponent": "1e999", "surrogate": '"\\ud800"', "zero": "\x00", "list of one": '["x"]',
    "nulls": "[null, null, null]", "numbers": "[1, 2, 3]", "twice": '{"value": 1, "value": 2}',
}  # fmt: skip


@pytest.mark.parametrize("kind", VALUES_OF_ROWS)
def test_a_row_that_does_not_decode_is_a_miss(crafted: Path, kind: str) -> None:
    craft(crafted, value=VALUES_OF_ROWS[kind])
    assert quietly("hi", "other") == ["right hi", "right other"]
    assert cache_worker.runs == ["hi", "other"]


@pytest.mark.parametrize(
    "columns",
    [{"value": "{"}, {"value": None}, {"mode": 4}, {"filename": "x.val"}, {"value": b"\xff"}],
    ids=str,
)
def test_a_row_that_is_of_no_use_is_replaced(
    crafted: Path, elsewhere: Any, columns: dict[str, Any]
) -> None:
    craft(crafted, **columns)

    async def main() -> list[str]:
        return await together(3, functools.partial(cache_worker.echo, "hi"))

    assert asyncio.run(main()) == ["right hi"] * 3
    elsewhere()
    assert quietly("hi") == ["right hi"]
    assert cache_worker.runs == ["hi"]


@pytest.mark.parametrize("body", ["7", "null", "true", "[]", '{"x": 1}', "1.5", '["right hi"]'])
def test_a_row_that_does_not_decode_as_the_annotated_type_is_a_miss(
    crafted: Path, body: str
) -> None:
    (value,) = stored(crafted)
    assert '"right hi"' in value
    craft(crafted, value=value.replace('"right hi"', body))
    assert quietly("hi") == ["right hi"]
    assert cache_worker.runs == ["hi"]


def mutants(value: Any, make: Callable[[Any], Any] = lambda value: value) -> Iterator[Any]:
    """The JSON value with each of its parts replaced by something of another kind, or left out."""
    for odd in (None, 7, -1.5, "x", [], {}, [None], {"x": 7}, True):
        yield make(odd)
    inner = enumerate(value) if isinstance(value, list) else ()
    for key, part in value.items() if isinstance(value, dict) else inner:

        def put(odd: Any, key: Any = key) -> Any:
            copied = value.copy()
            copied[key] = odd
            return make(copied)

        yield from mutants(part, put)
        yield make({name: value[name] for name in value if name != key}
                   if isinstance(value, dict) else value[:key])  # fmt: skip


def right_kinds(reply: Any) -> bool:
    """Whether the fields of a reply are of their types."""
    return (
        type(reply) is Reply
        and isinstance(reply.text, str)
        and isinstance(reply.data, str)
        and isinstance(reply.usage, ember.Usage)
        and {type(count) for count in dataclasses.astuple(reply.usage)} == {int}
        and isinstance(reply.finish, str | None)
        and all(type(call) is ember.ToolCall for call in reply.tool_calls)
        and isinstance(reply.tool_calls, tuple)
        and isinstance(reply.seconds, float | int)
        and isinstance(reply.cached, bool)
        and isinstance(reply.message, dict)
        and isinstance(reply.model, str)
    )


async def test_a_row_with_any_part_of_the_wrong_kind_is_a_miss_or_of_the_right_kinds() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=openai_answer()))
    store = dict[str, str]()
    ask = cache(model("openai:gpt-4o", api_key="sk-12345678", transport=transport), store=store)
    await ask("hi")
    ((key, row),) = store.items()
    lines = [json.loads(line) for line in row.split("\n")]
    rows = ["\n".join(map(json.dumps, mutant)) for mutant in mutants(lines) if type(mutant) is list]
    assert len(rows) > 300
    for crafted_row in random.Random(7).sample(rows, 300):
        store[key] = crafted_row
        with track() as ledger:
            reply = await ask("hi")
        assert right_kinds(reply), crafted_row
        assert isinstance(ledger.saved, float | int)


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e999", "NaN", "-Infinity", "-5", '"5"'])
async def test_what_a_row_says_it_cost_is_a_number_or_the_row_a_miss(number: str) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=openai_answer()))
    store = dict[str, str]()
    ask = cache(model("openai:gpt-4o", api_key="sk-12345678", transport=transport), store=store)
    cost = (await ask("hi")).cost
    ((key, row),) = store.items()
    assert f" {cost}" in row
    for place in (f" {cost}", "null"):  # the cost, and the expiry
        store[key] = row.replace(place, f" {number}", 1)
        with track() as ledger:
            assert (await ask("hi")).text == "right"
        assert math.isfinite(ledger.saved)


@pytest.mark.parametrize("key", ["eviction_policy", "disk_min_file_size", "sqlite_journal_mode",
                                 "sqlite_mmap_size", "cull_limit", "size_limit", "count",
                                 "disk_pickle_protocol", "sqlite_cache_size; DROP TABLE Cache",
                                 "disk_directory", "tag_index", "sqlite_nonsense"])  # fmt: skip
@pytest.mark.parametrize("value", ["nonsense", None, -1, b"\x00", "1; DROP TABLE Cache"])
def test_settings_that_somebody_wrote_into_the_file_are_no_failure(
    crafted: Path, key: str, value: Any
) -> None:
    with contextlib.closing(sqlite3.connect(database(crafted))) as file, file:
        file.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (key, value))
    assert quietly("hi", "other", "other") == ["right hi", "right other", "right other"]


# ── Files that cannot be used ───

HOLDER = """
import sqlite3, sys
file = sqlite3.connect(sys.argv[1], isolation_level=None)
file.execute("CREATE TABLE IF NOT EXISTS held (x)")
if sys.argv[2] == "mode":
    file.execute("PRAGMA locking_mode=EXCLUSIVE")
    file.execute("INSERT INTO held VALUES (1)")
else:
    file.execute(f"BEGIN {sys.argv[2]}")
    file.execute("INSERT INTO held VALUES (1)")
print("held", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def holding(path: Path, how: str) -> Iterator[None]:
    """Another process holds the lock of this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, str(path), how]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield
        finally:
            holder.kill()


@pytest.mark.parametrize("how", ["EXCLUSIVE", "IMMEDIATE", "mode"])
@pytest.mark.parametrize("when", ["before it is opened", "before it is there", "open"])
def test_a_lock_that_another_process_holds_costs_a_miss_and_no_stall(
    elsewhere: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: Path,
    how: str, when: str,
) -> None:  # fmt: skip
    if (when, how) == ("open", "mode"):
        pytest.skip("nobody gets this lock of a file that is in use")
    asyncio.run(cache_worker.echo("before"))
    path = database(directory)
    if when == "before it is opened":
        path = database(elsewhere())
    if when == "before it is there":
        monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path / "new"))
        path = tmp_path / "new" / path.relative_to(directory)
    with holding(path, how):
        assert quietly("one", "two", "three") == ["right one", "right two", "right three"]
    assert cache_worker.runs == ["before", "one", "two", "three"]


def test_some_time_after_a_lock_is_released_answers_are_kept_again(
    elsewhere: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(cache_worker.echo("before"))
    with holding(database(directory), "EXCLUSIVE"):
        quietly("during")
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 60)
    quietly("after")
    elsewhere()
    cache_worker.runs.clear()
    assert quietly("before", "after") == ["right before", "right after"]
    assert cache_worker.runs == []


def garbage(path: Path) -> None:
    """A file that is no database."""
    path.write_bytes(b"no database at all " * 1000)


def truncated(path: Path) -> None:
    """The first half of a database."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scrambled(path: Path) -> None:
    """A database whose pages are noise, behind a header that is none."""
    content = path.read_bytes()
    path.write_bytes(content[:100] + random.Random(7).randbytes(len(content) - 100))


def another(path: Path) -> None:
    """A database with other tables of these names."""
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("CREATE TABLE Cache (odd TEXT)")
        file.execute("CREATE TABLE Settings (odd TEXT)")


def folder(path: Path) -> None:
    """A directory in the file's place."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [garbage, truncated, scrambled, another, folder])
def test_a_corrupt_file_is_one_warning_and_the_call_goes_through(
    elsewhere: Any, spoil: Any
) -> None:
    asyncio.run(cache_worker.echo("before"))
    there: Path = elsewhere()
    for extra in there.rglob("cache.db-*"):
        extra.unlink()
    spoil(database(there))
    cache_worker.runs.clear()
    assert quietly("one", "two", "one", "before")[:2] == ["right one", "right two"]
    assert {"one", "two"} <= set(cache_worker.runs)


@pytest.mark.parametrize("spoil", [garbage, truncated])
def test_a_file_that_is_spoilt_while_it_is_open_is_one_warning(
    directory: Path, spoil: Any
) -> None:
    asyncio.run(cache_worker.echo("before"))
    spoil(database(directory))
    assert quietly("one", "two") == ["right one", "right two"]


def test_a_file_that_is_cut_off_while_it_is_open_does_not_end_the_process() -> None:
    answers, warned = told(worker("cut"))
    assert answers == [f"right {n}"[:9] for n in range(100, 700)]
    assert len(warned) <= 1


def test_a_directory_that_cannot_be_made_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning) as caught:
        asyncio.run(cache_worker.echo("one"))
        asyncio.run(cache_worker.echo("two"))
    assert len(caught) == 1
    assert cache_worker.runs == ["one", "two"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may write anywhere")
def test_a_directory_that_cannot_be_written_is_one_warning(directory: Path) -> None:
    directory.mkdir(mode=0o500)
    assert quietly("one", "two") == ["right one", "right two"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size")
@pytest.mark.parametrize("size", [0, 4096, 100_000])
def test_a_full_disk_is_one_warning_and_the_call_goes_through(size: int) -> None:
    answers, warned = told(worker("full", str(size)))
    assert answers == ["right 0", "right 1", "right 2", "right 3", "right 4", "right 4"]
    assert len(warned) == 1


def test_a_directory_that_is_removed_while_it_is_used_is_no_failure(directory: Path) -> None:
    asyncio.run(cache_worker.echo("before"))
    shutil.rmtree(directory)
    assert quietly("one", "two", "before") == ["right one", "right two", "right before"]


def test_waiters_get_values_of_their_own_though_the_time_is_over(run: Run) -> None:
    class Slow(dict[str, str]):
        async def set(self, key: str, text: str) -> None:
            await anyio.sleep(0.02)
            self[key] = text

    @cache(ttl=0.001, store=Slow())
    async def listed(text: str) -> list[str]:
        await anyio.sleep(0)
        return [text]

    async def main() -> list[list[str]]:
        return await ember.gather(*(listed("a") for _ in range(3)))

    answers = run(main)
    assert answers == [["a"]] * 3
    assert len({id(answer) for answer in answers}) == 3


def test_a_parameter_called_timeout_may_be_anything(run: Run) -> None:
    @cache
    async def timed(text: str, timeout: list[int]) -> str:
        return f"{text} {timeout}"

    async def main() -> list[str]:
        return [await timed("a", timeout=[number]) for number in (1, 2, 1)]

    assert run(main) == ["a [1]", "a [2]", "a [1]"]


def test_a_ledger_that_was_left_elsewhere_counts_no_hits(run: Run) -> None:
    @cache
    async def same(text: str) -> str:
        return text

    async def main() -> int:
        ledger = track()
        ledger.__enter__()
        contextvars.copy_context().run(ledger.__exit__, None, None, None)
        for _ in range(2):
            await same("a")
        return ledger.hits

    assert run(main) == 0


def test_forked_processes_share_no_form_of_what_has_none() -> None:
    forms = [ember._form(object(), lenient=True)]
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.write(writer, ember._form(object(), lenient=True).encode())
        os._exit(0)
    forms.append(ember._form(object(), lenient=True))
    os.waitpid(child, 0)
    forms.append(os.read(reader, 1000).decode())
    os.close(reader)
    os.close(writer)
    assert len(set(forms)) == 3
