"""Decorators within decorators: nobody waits in a circle, and no place is lost or counted twice."""

import contextlib
import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import Connect
from server import WIRES, Answer, Server

import ember
from ember import budget, cache, gather, limit, retry, track

OPENAI = WIRES["openai"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A directory for each test."""
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(("status", "requests"), [(200, 2), (503, 1)])
async def test_equal_calls_under_a_limit_of_one_share_a_flight_of_two_requests(
    server: Server, connect: Connect, no_backoff: None, status: int, requests: int
) -> None:
    server.play(OPENAI.good() if status == 200 else Answer(status=503), OPENAI.good())
    model, share = connect(OPENAI), limit(concurrency=1)

    @share
    @cache
    async def ask(question: str) -> str:
        for number in range(requests):
            reply = await model(f"{question} {number}")
        return reply.text

    with anyio.fail_after(5):
        assert await gather(ask("a"), ask("a")) == ["right", "right"]
    assert len(server.requests) == 2
    assert share.running == 0


async def test_a_place_given_back_for_a_wait_is_not_taken_for_a_call_that_has_ended() -> None:
    share, runs = limit(concurrency=1), list[str]()

    @retry(wait=lambda state: 0.05)
    async def flaky(text: str) -> str:
        runs.append(text)
        if len(runs) == 1:
            raise ConnectionError
        await anyio.sleep(0.05)
        return text

    cached = cache(flaky)
    leader = share(cached)
    answers = list[str]()

    async def lead() -> None:
        with anyio.move_on_after(0.03):
            await leader("a")

    async def follow() -> None:
        await anyio.sleep(0.01)
        answers.append(await cached("a"))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(lead)
            group.start_soon(follow)
        assert share.running == 0
        assert await leader("b") == "b"
    assert answers == ["a"]


async def test_two_limits_crosswise_around_a_retry_do_not_wait_for_each_other() -> None:
    one, two, runs = limit(concurrency=1), limit(concurrency=1), Counter[str]()

    @retry(wait=lambda state: 0.03)
    async def flaky(text: str) -> str:
        runs[text] += 1
        if runs[text] == 1:
            raise ConnectionError
        return text

    async def busy(text: str) -> str:
        await anyio.sleep(0.05)
        return text

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(one(two(flaky)), "a")
            await anyio.sleep(0.005)
            group.start_soon(two(one(flaky)), "b")
            await anyio.sleep(0.01)
            group.start_soon(one(busy), "c")
            group.start_soon(two(busy), "d")
    assert runs == {"a": 2, "b": 2}
    assert (one.running, two.running) == (0, 0)


async def test_the_outer_limit_holds_where_the_inner_one_must_be_waited_for() -> None:
    outer, inner, other = limit(concurrency=1), limit(concurrency=1), limit(concurrency=1)
    now = most = 0

    async def work(number: int) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await anyio.sleep(0.005)
        now -= 1

    async def busy(number: int) -> None:
        await anyio.sleep(0.03)

    one, two = outer(inner(work)), outer(other(work))
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(inner(busy), 0)
            group.start_soon(other(busy), 0)
            await anyio.sleep(0.005)
            for number in range(5):
                group.start_soon(one, number)
                group.start_soon(two, number)
    assert most == 1
    assert (outer.running, inner.running, other.running) == (0, 0, 0)


async def test_budgets_opened_in_different_orders_do_not_wait_for_each_other(
    server: Server, connect: Connect
) -> None:
    server.play(OPENAI.good(pause=0.02))
    model = connect(OPENAI, price=(0, 1000)).using(max_tokens=1000)  # at most a dollar a call
    one, two = (budget(usd=1.5, on_warn=lambda text: None) for _ in range(2))

    async def spend(*budgets: ember.Budget) -> None:
        with contextlib.ExitStack() as stack:
            for each in budgets:
                stack.enter_context(each)
            await model("hi")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for budgets in ((two,), (two, one), (one, two)):
                group.start_soon(spend, *budgets)
                await anyio.sleep(0.005)
    assert (one.requests, two.requests) == (2, 3)


async def test_what_was_cancelled_while_it_connected_costs_nothing() -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(6):  # a queue that is full: the next connection is not made
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        name, url = "openai:gpt-4o", f"http://127.0.0.1:{port}/v1"
        model = ember.model(name, base_url=url, api_key="sk-no", retries=0, connect=30)
        with budget(usd=1) as spent:
            with anyio.move_on_after(0.05):
                await model("hi")
            with pytest.raises(ember.CallError):
                await model("hi", timeout=0.05)
    assert (spent.uncertain, spent.left) == (0, 1)


async def test_each_attempt_of_a_stack_has_one_place_in_the_path(
    server: Server, connect: Connect
) -> None:
    server.play(OPENAI.good())
    model, runs = connect(OPENAI), list[Any]()

    async def inner(text: str) -> str:
        runs.append(await model(text))
        if len(runs) == 1:
            raise ConnectionError
        return str(runs[-1])

    slow = retry(wait=lambda state: 0)(inner)
    fast = cache(slow)
    with track() as ledger:
        assert [await fast("a"), await fast("a"), await slow("b")] == ["right"] * 3
    paths = [[name for _, name in call.path] for call in ledger.calls]
    names = {name for path in paths for name in path}
    assert [len(path) for path in paths] == [1, 1, 1]
    assert len(names) == 1


@pytest.mark.parametrize("around", [ember.retry, ember.cache, ember.batch, ember.limit(rpm=600)])
async def test_a_decorated_method_that_is_bound_may_be_decorated_again(
    around: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))

    @dataclass(frozen=True)
    class Bot:
        name: str

        @ember.retry
        async def ask(self, question: str) -> str:
            return f"{self.name}: {question}"

    assert await around(Bot("a").ask)("q") == "a: q"
    assert await ember.ensemble(Bot("a").ask, Bot("b").ask)("q") == ["a: q", "b: q"]
