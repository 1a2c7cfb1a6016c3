"""limit: one rate, one queue and one pause for all that share it, counted on the server's side."""

import asyncio
import bisect
import datetime as dt
import functools
import inspect
import itertools
import json
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import anyio
import httpx
import pytest
import tenacity
import trio
import trio.testing
from conftest import Connect
from server import WIRES, Answer, Seen, Server, Wire, serving, until

import ember
from ember import SetupError, limit, model

Run = Callable[[Callable[[], Any]], Any]


def run_asyncio(main: Callable[[], Any]) -> Any:
    """Like trio.run."""
    return asyncio.run(main())


RUNS = pytest.mark.parametrize("run", [run_asyncio, trio.run], ids=["asyncio", "trio"])


def virtually(main: Callable[[], Awaitable[Any]]) -> Any:
    """What `main` returns, on a clock that goes at once to the next thing that is due."""
    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


class Desk(httpx.AsyncBaseTransport):
    """A provider in the process, which answers `play(body)` after so many seconds."""

    def __init__(self, play: Answer | Callable[[Any], Answer], seconds: float = 0.0) -> None:
        self.play, self.seconds = play, seconds
        self.times: list[float] = []  # when each request came in
        self.bodies: list[Any] = []
        self.flying = self.peak = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.times.append(anyio.current_time())
        self.bodies.append(json.loads(request.content))
        self.flying += 1
        self.peak = max(self.peak, self.flying)
        try:
            answer = self.play if isinstance(self.play, Answer) else self.play(self.bodies[-1])
            await anyio.sleep(self.seconds)
        finally:
            self.flying -= 1
        content = b"".join(answer.pieces())
        return httpx.Response(answer.status, headers=answer.headers, content=content)

    def model(self, wire: Wire, **fields: Any) -> ember.Model:
        """A model that is served here."""
        fields = {"api_key": "sk-no-secret", "timeout": 1e6, "transport": self} | fields
        return model(f"{wire.provider}:{wire.id}", **fields)


class Bucket:
    """A server's own limit: `rate` tokens a second, at most `capacity` of them at one time."""

    def __init__(self, rate: float, capacity: float, clock: Callable[[], float]) -> None:
        self.rate, self.capacity, self.clock = rate, capacity, clock
        self.level, self.seen = capacity, clock()

    def take(self) -> bool:
        """Whether there was one."""
        now = self.clock()
        self.level = min(self.capacity, self.level + (now - self.seen) * self.rate)
        self.seen = now
        if self.level < 1:
            return False
        self.level -= 1
        return True


async def at_once(
    call: Callable[[Any], Awaitable[Any]], items: Iterable[Any], clients: int = 1000
) -> list[Any]:
    """The results of these calls, so many at one time."""
    results: dict[int, Any] = {}
    left = iter(enumerate(items))

    async def client() -> None:
        for index, item in left:
            results[index] = await call(item)

    async with anyio.create_task_group() as group:
        for _ in range(clients):
            group.start_soon(client)
    return [results[index] for index in sorted(results)]


async def driven(limited: Callable[[], Awaitable[Any]], clients: int, seconds: float) -> None:
    """Call it as fast as it allows, for so long."""

    async def client() -> None:
        while True:
            await limited()
            await anyio.lowlevel.checkpoint()

    with anyio.move_on_after(seconds):
        async with anyio.create_task_group() as group:
            for _ in range(clients):
                group.start_soon(client)


def busiest(times: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The most that came in within any 60 seconds."""
    sums = [0, *itertools.accumulate(weights or [1] * len(times))]
    ends = [bisect.bisect_left(times, start + 60 - 1e-6) for start in times]
    return max(sums[end] - sums[begin] for begin, end in enumerate(ends))


SLOW = 30  # calls a minute, which is too few for a burst


def spaced(count: int) -> float:
    """The seconds from the first to the last of so many, at the slow rate."""
    return (count - 1) * 60 / (0.975 * SLOW)


# ── The rate ───


@pytest.mark.parametrize("headers", [{}, {"retry-after": "0.1"}], ids=["", "retry-after"])
def test_a_hundred_calls_pass_a_bucket_of_ten_a_second_with_five_refusals_at_most(
    wire: Wire, headers: dict[str, str]
) -> None:
    async def main() -> float:
        bucket = Bucket(10, 10, trio.current_time)

        def play(body: Any) -> Answer:
            if not bucket.take():
                return Answer(wire.problem("rate_limit_error"), 429, headers=headers)
            question = body["messages"][-1]["content"]
            answered.append(question)
            return wire.good(f"right {question}")

        desk = Desk(play, 0.002)
        ask = desk.model(wire, limit=limit(rpm=600))
        replies = await at_once(ask, map(str, range(100)), 20)
        assert [reply.text for reply in replies] == [f"right {n}" for n in range(100)]
        assert len(desk.times) <= 105
        return trio.current_time()

    answered: list[str] = []
    assert 9 <= virtually(main) <= 12
    assert sorted(answered, key=int) == [*map(str, range(100))]  # each of them once


async def test_twenty_calls_pass_such_a_bucket_of_a_server_with_five_refusals_at_most() -> None:
    async def pass_it(wire: Wire, headers: dict[str, str]) -> None:
        bucket = Bucket(10, 10, time.monotonic)

        def script(seen: Seen) -> Answer:
            if not bucket.take():
                return Answer(wire.problem("rate_limit_error"), 429, headers=headers)
            return wire.good(f"right {seen.json['messages'][-1]['content']}")

        with serving(script) as server:
            name, url = f"{wire.provider}:{wire.id}", server.url + wire.base
            ask = model(name, base_url=url, api_key="sk-no-secret", limit=limit(rpm=600))
            replies = await at_once(ask, map(str, range(20)), 20)
            assert [reply.text for reply in replies] == [f"right {n}" for n in range(20)]
            assert len(server.requests) <= 25
            assert max(server.bought.values()) == 1

    async with anyio.create_task_group() as group:
        for wire in WIRES.values():
            for headers in ({}, {"retry-after": "0.1"}):
                group.start_soon(pass_it, wire, headers)


@pytest.mark.parametrize("rpm", [1, 2, 10, 39, 40, 79, 600])
def test_no_minute_has_more_than_rpm_nor_much_less(rpm: int) -> None:
    times: list[float] = []

    @limit(rpm=rpm)
    async def tick() -> None:
        times.append(trio.current_time())

    async def main() -> None:
        await driven(tick, 50, 4 * 60)
        await trio.sleep(200)  # what is not used does not add up
        await driven(tick, 50, 4 * 60)

    virtually(main)
    assert busiest(times) <= rpm
    first = [moment for moment in times if moment < 240]
    assert len(first) >= 0.97 * rpm * 4 - 1


def test_a_burst_is_at_most_a_fortieth_of_the_rate() -> None:
    times: list[float] = []

    @limit(rpm=600)
    async def tick() -> None:
        times.append(trio.current_time())

    async def main() -> None:
        await trio.sleep(500)
        await driven(tick, 50, 10)

    virtually(main)
    assert times.count(times[0]) <= 15
    assert busiest([moment * 60 for moment in times]) <= 15 + 10  # a second of it: burst and rate


def billed(wire: Wire, tokens_in: int, tokens_out: int) -> Answer:
    """An answer with these counts."""
    names = ("prompt_tokens", "completion_tokens")
    names = names if wire.provider == "openai" else ("input_tokens", "output_tokens")
    usage = dict(zip(names, (tokens_in, tokens_out), strict=True))
    return Answer({**wire.answer("right"), "usage": usage})


@pytest.mark.parametrize("seconds", [0.1, 1, 5])
@pytest.mark.parametrize("off", [(0.8,), (1.2,), (0.8, 1.2)], ids=["less", "more", "either"])
def test_tokens_a_minute_are_used_and_kept_with_estimates_off_by_a_fifth(
    wire: Wire, off: tuple[float, ...], seconds: float
) -> None:
    dice, tpm, spent = random.Random(7), 60_000, list[int]()

    def play(body: Any) -> Answer:
        factor = dice.choice(off)
        spent.append(int(1000 * factor))
        return billed(wire, int(800 * factor), int(200 * factor))

    async def main() -> None:
        ask = desk.model(wire, limit=limit(tpm=tpm))
        prompt = "four " * 640  # 3,200 bytes: 800 tokens of four
        await driven(functools.partial(ask, prompt, max_tokens=240), 20, 4 * 60)

    desk = Desk(play, seconds)
    virtually(main)
    assert busiest(desk.times, spent) <= tpm + 1200
    used = sum(spent[20:]) / (desk.times[-1] - desk.times[20])
    assert used >= 0.9 * tpm / 60


@pytest.mark.parametrize("tpm", [1, 100])
def test_a_call_larger_than_a_minutes_tokens_ends(wire: Wire, tpm: int) -> None:
    async def main() -> None:
        with trio.fail_after(3600 * 24 * 30):
            ask = desk.model(wire, limit=limit(tpm=tpm), timeout=3600 * 24 * 10)
            try:
                await ask("four " * 1000)
                await ask("four " * 1000)
            except ember.EmberError:
                ended.append("error")
            else:
                ended.append("answer")

    ended: list[str] = []
    desk = Desk(WIRES[wire.provider].good())
    virtually(main)
    assert ended


def test_refused_calls_do_not_use_up_the_tokens(wire: Wire, no_backoff: None) -> None:
    """A 500 bills nothing: what was estimated for it is given back."""

    def play(body: Any) -> Answer:
        refuse = len(desk.times) % 2
        return Answer(b"", 500) if refuse else billed(wire, 800, 200)

    async def main() -> None:
        ask = desk.model(wire, limit=limit(tpm=60_000))
        await driven(functools.partial(ask, "four " * 640, max_tokens=200), 5, 4 * 60)

    desk = Desk(play, seconds=0.5)
    virtually(main)
    assert len(desk.times) / 2 >= 0.9 * 60 * 4 - 5


# ── Sharing ───


def test_one_limit_holds_over_three_functions_and_two_models() -> None:
    times: list[float] = []
    desks = [Desk(wire.good()) for wire in WIRES.values()]

    async def main() -> None:
        shared = limit(rpm=60)

        async def plain() -> None:
            times.append(trio.current_time())

        three = [shared(plain), shared(plain), shared(plain)]
        two = [desk.model(w, limit=shared) for desk, w in zip(desks, WIRES.values(), strict=True)]
        async with trio.open_nursery() as nursery:
            for call in (*three, *(functools.partial(one, "hi") for one in two)):
                nursery.start_soon(driven, call, 5, 3 * 60)

    virtually(main)
    counts = [len(times), *(len(desk.times) for desk in desks)]
    everything = sorted(itertools.chain(times, *(desk.times for desk in desks)))
    assert busiest(everything) <= 60
    assert len(everything) >= 0.97 * 60 * 3 - 1
    assert min(counts) >= 20


@RUNS
def test_concurrency_is_shared_by_functions_and_models(run: Run) -> None:
    desks = [Desk(wire.good(), 0.005) for wire in WIRES.values()]
    inside, peak = 0, 0

    async def main() -> None:
        shared = limit(concurrency=3)

        def look() -> None:
            nonlocal peak
            peak = max(peak, inside + sum(desk.flying for desk in desks))

        async def plain(_: Any) -> None:
            nonlocal inside
            inside += 1
            look()
            await anyio.sleep(0.002)
            inside -= 1

        for desk, wire in zip(desks, WIRES.values(), strict=True):
            desk.play = functools.partial(lambda good, _: (look(), good)[1], wire.good())
        calls = [shared(plain), shared(plain), shared(plain)]
        wires = WIRES.values()
        calls += [desk.model(w, limit=shared) for desk, w in zip(desks, wires, strict=True)]
        await at_once(lambda n: calls[n % 5](f"{n}"), range(60))

    run(main)
    assert peak == 3


async def test_a_server_sees_no_more_calls_than_the_limit(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good(pause=0.002))
    await at_once(connect(wire, limit=limit(concurrency=4)), map(str, range(40)))
    assert len(server.requests) == 40
    assert server.peak == 4


# ── Nothing is counted twice ───


def nests(shared: Any, desk: Desk) -> dict[str, tuple[Callable[[], Awaitable[Any]], int]]:
    """Calls under one limit, and how many admissions each of them is."""
    wire = WIRES["openai"]
    within, free = desk.model(wire, limit=shared), desk.model(wire)

    async def plain() -> None:
        desk.times.append(anyio.current_time())

    async def one() -> None:
        await within("hi")

    async def unlimited() -> None:
        await free("hi")

    async def two() -> None:
        await within("hi")
        await within("hi")

    async def abreast() -> None:
        await ember.gather(within("hi"), within("hi"), within("hi"))

    async def tasks() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(within, "hi")
            group.start_soon(within, "hi")

    async def streamed() -> None:
        async with within.stream("hi") as stream:
            assert [piece async for piece in stream] == ["right"]

    async def deep() -> None:
        await shared(shared(one))()

    async def inner_twice() -> None:
        await shared(one)()
        await shared(plain)()

    async def with_tool() -> None:
        async def look() -> str:
            """Look it up."""
            await within("inner")
            return "found"

        await within("use the tool", tools=[look])

    return {
        "a plain function": (shared(plain), 1),
        "a function and its model": (shared(one), 1),
        "a function and a model without it": (shared(unlimited), 1),
        "a limited model with the same limit": (functools.partial(shared(within), "hi"), 1),
        "a function limited twice": (shared(shared(plain)), 1),
        "three functions and a model": (shared(deep), 1),
        "two calls in one function": (shared(two), 2),
        "two functions in one function": (shared(inner_twice), 2),
        "two tasks in one function": (shared(tasks), 2),
        "three calls abreast": (shared(abreast), 3),
        "a stream": (shared(streamed), 1),
        "a tool that calls the model": (with_tool, 3),
        "a limited function with a tool": (shared(with_tool), 3),
    }


NESTS = list(nests(limit(concurrency=1), Desk(Answer())))


def play_tool(body: Any) -> Answer:
    """An answer that asks for the tool, where there is one that was not used yet."""
    if "tools" in body and body["messages"][-1]["role"] == "user":
        call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        wire = WIRES["openai"]
        return Answer(wire.answer(None, tool_calls=[call], finish="tool_calls"))
    return WIRES["openai"].good()


@pytest.mark.parametrize("nest", NESTS)
def test_nothing_is_counted_twice(nest: str) -> None:
    desk, rounds = Desk(play_tool), 7

    async def main() -> float:
        call, count = nests(limit(rpm=SLOW), desk)[nest]
        for _ in range(rounds):
            await call()
        assert len(desk.times) == rounds * count
        return spaced(rounds * count)

    due = virtually(main)
    assert desk.times[-1] - desk.times[0] == pytest.approx(due, abs=0.01)


@pytest.mark.parametrize("nest", NESTS)
@RUNS
def test_nothing_waits_for_itself_at_a_concurrency_of_one(run: Run, nest: str) -> None:
    desk = Desk(play_tool, 0.001)

    async def main() -> None:
        call, count = nests(limit(concurrency=1), desk)[nest]
        with anyio.fail_after(5):
            await at_once(lambda _: call(), range(5))
        assert len(desk.times) == 5 * count

    run(main)
    assert desk.peak <= 1


def test_two_limits_both_count() -> None:
    desk, wire = Desk(WIRES["openai"].good()), WIRES["openai"]

    async def main() -> None:
        outer, inner = limit(rpm=2 * SLOW), limit(rpm=SLOW)
        ask = outer(desk.model(wire, limit=inner))
        for _ in range(6):
            await ask("hi")

    virtually(main)
    assert desk.times[-1] == pytest.approx(spaced(6), abs=0.01)


def test_each_attempt_counts(no_backoff: None) -> None:
    wire = WIRES["openai"]
    desk = Desk(lambda body: wire.good() if len(desk.times) % 3 == 0 else Answer(b"", 500))

    async def main() -> None:
        shared = limit(rpm=SLOW)
        ask = shared(desk.model(wire, limit=shared))
        for _ in range(4):
            await ask("hi")

    virtually(main)
    assert len(desk.times) == 12
    assert desk.times[-1] == pytest.approx(spaced(12), abs=0.01)


def test_embeddings_count() -> None:
    vectors = {"data": [{"index": 0, "embedding": [1.0]}], "usage": {"prompt_tokens": 1}}
    desk = Desk(Answer(vectors))

    async def main() -> None:
        embed = desk.model(WIRES["openai"], limit=limit(rpm=SLOW)).embed
        for _ in range(4):
            await embed(["hi"])

    virtually(main)
    assert desk.times[-1] == pytest.approx(spaced(4), abs=0.01)


# ── No sleep holds a slot ───


def test_a_model_that_waits_to_try_again_gives_its_slot_to_others(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: 10.0)
    desk = Desk(lambda body: Answer(b"", 500) if len(desk.times) == 1 else wire.good(), 1.0)

    async def main() -> None:
        ask = desk.model(wire, limit=limit(concurrency=1))
        await at_once(ask, ["first", "second"])

    virtually(main)
    said = [body["messages"][-1]["content"] for body in desk.bodies]
    assert said in (["first", "second", "first"], ["second", "first", "second"])
    assert desk.times == [0, 1, 11]


def stacked(order: str, shared: Any, wait: Any) -> Callable[[Any], Any]:
    """Limit within retry, or retry within limit."""
    again = ember.retry(max_attempts=2, wait=wait)
    if order == "retry outside":
        return lambda fn: again(shared(fn))
    return lambda fn: shared(again(fn))


@pytest.mark.parametrize("order", ["retry outside", "limit outside"])
def test_a_function_that_waits_to_try_again_gives_its_slot_to_others(order: str) -> None:
    runs: list[tuple[str, float]] = []

    async def main() -> None:
        @stacked(order, limit(concurrency=1), tenacity.wait_fixed(10))
        async def work(name: str) -> None:
            runs.append((name, trio.current_time()))
            await trio.sleep(1)
            if len(runs) == 1:
                raise ConnectionError

        await at_once(work, ["first", "second"])

    virtually(main)
    assert [moment for _, moment in runs] == [0, 1, 11]
    assert runs[0][0] == runs[2][0] != runs[1][0]


async def test_a_stream_holds_its_slot_until_it_ends_or_is_left(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("a", "b"), wire.stream("a", "b", pause=0.01, piece=50), wire.good())
    ask = connect(wire, limit=limit(concurrency=1))
    async with ask.stream("hi") as stream:
        assert [piece async for piece in stream] == ["a", "b"]
    async with ask.stream("hi") as stream:
        assert await anext(stream) == "a"
        with anyio.move_on_after(0.03) as scope:
            await ask("waits")
        assert scope.cancelled_caught
        assert len(server.requests) == 2
    with anyio.fail_after(5):
        assert (await ask("hi")).text == "right"


async def test_a_stream_that_is_dropped_gives_its_slot_back(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("a", "b", pause=0.01, piece=50), wire.good())
    ask = connect(wire, limit=limit(concurrency=1))
    async for _ in ask.stream("hi"):
        break
    with anyio.fail_after(5):
        assert (await ask("hi")).text == "right"


@RUNS
def test_two_limits_that_are_taken_in_either_order_never_wait_for_each_other(run: Run) -> None:
    async def main() -> int:
        a, b = limit(concurrency=1), limit(concurrency=1)
        done: list[int] = []

        async def inner(number: int) -> None:
            await anyio.sleep(0.001)
            done.append(number)

        async def outer(call: Callable[[int], Awaitable[None]], number: int) -> None:
            await anyio.sleep(0.001)
            await call(number)
            await call(number)

        calls = [a(outer), b(outer)], [b(inner), a(inner)]
        with anyio.fail_after(5):
            await at_once(lambda n: calls[0][n % 2](calls[1][n % 2], n), range(10))
        return len(done)

    assert run(main) == 20


# ── The queue ───


@RUNS
def test_a_thousand_waiters_are_served_first_in_first_out(run: Run) -> None:
    arrived, served = list[int](), list[int]()

    async def main() -> None:
        gate = anyio.Event()

        @limit(concurrency=1)
        async def work(number: int) -> None:
            served.append(number)
            await (gate.wait() if number < 0 else anyio.lowlevel.checkpoint())

        async def come(number: int) -> None:
            arrived.append(number)
            await work(number)

        async with anyio.create_task_group() as group:
            group.start_soon(work, -1)
            await until(lambda: served == [-1])
            for number in range(1000):
                group.start_soon(come, number)
                if run is trio.run:
                    await trio.testing.wait_all_tasks_blocked()
            await anyio.lowlevel.checkpoint()
            gate.set()

    run(main)
    assert served == [-1, *arrived]
    assert arrived == [*range(1000)]


def test_a_thousand_waiters_for_a_rate_are_served_first_in_first_out() -> None:
    served: list[int] = []

    async def main() -> None:
        @limit(rpm=60)
        async def work(number: int) -> None:
            served.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(work, number)
                await trio.lowlevel.checkpoint()

    virtually(main)
    assert served == [*range(1000)]


def test_a_large_call_is_not_passed_by_small_ones(wire: Wire) -> None:
    desk = Desk(lambda body: billed(wire, len(body["messages"][-1]["content"]) // 4 + 1, 1))

    async def main() -> None:
        ask = desk.model(wire, limit=limit(tpm=1000))
        for _ in range(5):
            await ask("x" * 2000, max_tokens=1)
        async with trio.open_nursery() as nursery:
            for size in (3000, 40, 40, 40):
                nursery.start_soon(functools.partial(ask, "x" * size, max_tokens=1))
                await trio.sleep(0.01)

    virtually(main)
    sizes = [len(body["messages"][-1]["content"]) for body in desk.bodies]
    assert sizes[5:] == [3000, 40, 40, 40]


@pytest.mark.parametrize("ticks", range(8))
@RUNS
def test_a_waiter_that_is_cancelled_gives_its_place_to_the_next(run: Run, ticks: int) -> None:
    ran: list[str] = []

    async def main() -> None:
        gate = anyio.Event()
        scope = anyio.CancelScope()

        @limit(concurrency=1)
        async def work(name: str) -> None:
            ran.append(name)
            if name == "holder":
                await gate.wait()
            else:
                await anyio.sleep(0.001)

        async def leaves() -> None:
            with scope:
                await work("leaves")

        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                for call in (functools.partial(work, "holder"), leaves):
                    group.start_soon(call)
                    await anyio.sleep(0.001)
                group.start_soon(work, "next")
                await anyio.sleep(0.001)
                gate.set()
                for _ in range(ticks):  # somewhere on its way from the holder to the waiter
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
            await work("later")

    run(main)
    assert [name for name in ran if name != "leaves"] == ["holder", "next", "later"]


@RUNS
@pytest.mark.parametrize("how", ["cancelled", "raised"])
def test_a_holder_that_ends_badly_gives_its_place_back(run: Run, how: str) -> None:
    async def main() -> list[int]:
        @limit(concurrency=1)
        async def work(number: int) -> int:
            if number == 0 and how == "raised":
                raise KeyError(number)
            await anyio.sleep(0 if number else 10)
            return number

        if how == "raised":
            with pytest.raises(KeyError):
                await work(0)
        else:
            with anyio.move_on_after(0.005):
                await work(0)
        with anyio.fail_after(5):
            return [await work(1), await work(2)]

    assert run(main) == [1, 2]


def test_waiters_that_leave_use_up_no_rate() -> None:
    times: list[float] = []

    async def main() -> None:
        @limit(rpm=SLOW)
        async def work() -> None:
            times.append(trio.current_time())

        await work()
        with trio.move_on_after(0.5):
            await at_once(lambda _: work(), range(100))
        await work()

    virtually(main)
    assert times == pytest.approx([0, spaced(2)], abs=0.01)


def test_a_model_waits_for_its_turn_no_longer_than_its_timeout(wire: Wire) -> None:
    desk = Desk(wire.good())

    async def main() -> float:
        ask = desk.model(wire, limit=limit(rpm=1), timeout=20)
        await ask("hi")
        with pytest.raises(ember.CallError, match="timeout=20"):
            await ask("hi")
        return trio.current_time()

    assert virtually(main) <= 20.1
    assert len(desk.times) == 1


# ── What the server says ───


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_refusal_with_a_wait_pauses_all_of_them_once(wire: Wire, status: int) -> None:
    def play(body: Any) -> Answer:
        if len(desk.times) > 5:
            return wire.good()
        return Answer(wire.problem("busy"), status, headers={"retry-after": "10"})

    async def main() -> None:
        ask = desk.model(wire, limit=limit(concurrency=5))
        replies = await at_once(ask, map(str, range(20)), 20)
        assert [reply.text for reply in replies] == ["right"] * 20

    desk = Desk(play, 0.1)
    virtually(main)
    assert len(desk.times) == 25
    assert min(desk.times[5:]) >= 10
    assert max(desk.times) <= 13


def test_a_pause_holds_functions_and_other_models_on_the_limit_and_no_one_else() -> None:
    times: dict[str, float] = {}
    wire = WIRES["openai"]
    refusing = Desk(lambda body: Answer(b"", 429, headers={"retry-after-ms": "30000"}))
    other, free = Desk(wire.good()), Desk(wire.good())

    async def main() -> None:
        shared = limit(concurrency=100)

        @shared
        async def work() -> None:
            times["function"] = trio.current_time()

        with pytest.raises(ember.CallError):
            await refusing.model(wire, limit=shared, retries=0)("hi")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            nursery.start_soon(other.model(wire, limit=shared), "hi")
            nursery.start_soon(free.model(wire), "hi")

    virtually(main)
    assert times["function"] == pytest.approx(30, abs=1)
    assert other.times[0] == pytest.approx(30, abs=1)
    assert free.times[0] == 0


@pytest.mark.parametrize("wait", [None, "0", "soon", "-5", "nan"])
def test_a_refusal_without_a_wait_stops_no_one(wire: Wire, wait: str | None) -> None:
    headers = {} if wait is None else {"retry-after": wait}
    desk = Desk(lambda body: Answer(b"", 429, headers=headers))

    async def main() -> float:
        ask = desk.model(wire, limit=limit(concurrency=2), retries=0)
        for _ in range(3):
            with pytest.raises(ember.CallError):
                await ask("hi")
        return trio.current_time()

    assert virtually(main) < 3


def quota(wire: Wire, kind: str, most: int, left: int, seconds: float) -> dict[str, str]:
    """The headers that say what is left, and when it is whole again."""
    if wire.provider == "openai":
        minutes, rest = divmod(seconds, 60)
        reset = f"{minutes:.0f}m{rest:g}s" if minutes else f"{rest * 1000:.0f}ms"
        said = {"limit": most, "remaining": left, "reset": reset}
        return {f"x-ratelimit-{name}-{kind}": str(value) for name, value in said.items()}
    at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)
    said = {"limit": most, "remaining": left, "reset": at.isoformat().replace("+00:00", "Z")}
    return {f"anthropic-ratelimit-{kind}-{name}": str(value) for name, value in said.items()}


KINDS = [
    ("openai", "requests"), ("openai", "tokens"), ("anthropic", "requests"),
    ("anthropic", "tokens"), ("anthropic", "input-tokens"), ("anthropic", "output-tokens"),
]  # fmt: skip


def gap(wire: Wire, headers: dict[str, str], **limits: int) -> float:
    """The seconds between two calls, where the first was answered with these headers."""
    desk = Desk(wire.good(headers=headers))

    async def main() -> None:
        ask = desk.model(wire, limit=limit(**(limits or {"concurrency": 10})))
        await ask("hi")
        await ask("hi")

    virtually(main)
    return desk.times[1] - desk.times[0]


@pytest.mark.parametrize("limits", [{"concurrency": 10}, {"rpm": 600_000}, {"tpm": 10**9}])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_quota_that_is_used_up_holds_the_next_call(
    name: str, kind: str, limits: dict[str, int]
) -> None:
    most = 1000 if "tokens" in kind else 100
    held = gap(WIRES[name], quota(WIRES[name], kind, most, 0, 30), **limits)
    assert 0.25 <= held <= 31  # until there is one again, or until it is whole


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_quota_with_much_left_holds_no_one(name: str, kind: str) -> None:
    headers = quota(WIRES[name], kind, 1_000_000, 900_000, 90)
    assert gap(WIRES[name], headers) == 0


@pytest.mark.parametrize("odd", ["", "soon", "nan", "-1", "inf", "9" * 400, "1.2.3s", "TTT"])
@pytest.mark.parametrize("part", ["limit", "remaining", "reset"])
def test_a_quota_that_cannot_be_read_holds_no_one(wire: Wire, part: str, odd: str) -> None:
    headers = quota(wire, "requests", 100, 0, 3)
    headers = {name: odd if part in name.split("-") else text for name, text in headers.items()}
    assert gap(wire, headers) <= 3.1


def test_the_headers_slow_it_down_before_the_first_refusal(wire: Wire) -> None:
    async def main() -> float:
        bucket = Bucket(2, 20, trio.current_time)

        def play(body: Any) -> Answer:
            taken = bucket.take()
            full = (bucket.capacity - bucket.level) / bucket.rate
            headers = quota(wire, "requests", 20, int(bucket.level), full)
            if not taken:
                refused.append(trio.current_time())
                return Answer(wire.problem("rate_limit_error"), 429, headers=headers)
            return wire.good(headers=headers)

        desk = Desk(play, 0.2)
        await at_once(desk.model(wire, limit=limit(rpm=60_000)), map(str, range(100)), 5)
        return trio.current_time()

    refused: list[float] = []
    assert virtually(main) <= 200  # at two a second 40 would do
    assert len(refused) <= 5  # one round of them


# ── Event loops ───


def in_loops() -> tuple[Callable[[], Any], list[Any]]:
    """A limited function, and a list that it appends to."""
    done: list[Any] = []

    @limit(concurrency=1, rpm=60_000)
    async def work() -> None:
        await anyio.sleep(0.001)
        done.append(True)

    return work, done


def test_a_second_loop_that_lives_is_a_setup_error_and_a_closed_one_is_forgotten() -> None:
    work, done = in_loops()
    first = asyncio.new_event_loop()
    try:
        first.run_until_complete(work())
        for run in (run_asyncio, trio.run):
            with pytest.raises(SetupError, match="loop"):
                run(work)
        first.run_until_complete(work())
    finally:
        first.close()
    run_asyncio(work)
    assert len(done) == 3


def test_loops_one_after_another_may_share_a_limit() -> None:
    work, done = in_loops()
    for run in (run_asyncio, trio.run, run_asyncio, run_asyncio, trio.run, trio.run):
        run(work)
    assert len(done) == 6


def test_a_running_trio_keeps_other_loops_out() -> None:
    work, done = in_loops()
    caught: list[BaseException] = []

    def elsewhere() -> None:
        with pytest.raises(SetupError, match="loop") as raised:
            asyncio.run(work())
        caught.append(raised.value)

    async def main() -> None:
        await work()
        await trio.to_thread.run_sync(elsewhere)
        await work()

    trio.run(main)
    assert len(caught) == 1
    assert len(done) == 2


async def test_a_model_says_which_loop_its_limit_belongs_to(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    ask = connect(wire, limit=limit(concurrency=1))
    await ask("hi")
    with pytest.raises(SetupError, match=r"(?s)gpt-4o.*loop|claude.*loop"):
        await anyio.to_thread.run_sync(asyncio.run, ask("hi"))
    assert len(server.requests) == 1


def test_a_loop_that_was_closed_in_the_middle_of_a_call_holds_no_slot() -> None:
    inside, peak, left = 0, 0, list[Any]()

    @limit(concurrency=1)
    async def work() -> None:
        nonlocal inside, peak
        inside += 1
        peak = max(peak, inside)
        await anyio.sleep(0.001 if left else 10)
        inside -= 1

    loop = asyncio.new_event_loop()
    tasks: list[Any] = [loop.create_task(work()) for _ in range(2)]
    loop.run_until_complete(asyncio.sleep(0.005))
    loop.close()
    left, inside = [task.get_coro() for task in tasks], 0
    for task in tasks:
        task._log_destroy_pending = False

    async def again() -> None:
        with anyio.fail_after(5):
            await work()
            for coroutine in left:  # as the garbage collector would
                with suppress(RuntimeError):  # of anyio: a scope that is left outside of its task
                    coroutine.close()
            await at_once(lambda _: work(), range(5))

    asyncio.run(again())
    assert peak == 1


def test_a_call_that_is_collected_after_its_loop_ended_is_silent() -> None:
    begun: list[int] = []

    @limit(concurrency=1)
    async def work() -> None:
        begun.append(1)
        await anyio.sleep(10)

    loop = asyncio.new_event_loop()
    tasks: list[Any] = [loop.create_task(work()) for _ in range(2)]
    loop.run_until_complete(asyncio.sleep(0.005))
    loop.close()
    for task in tasks:
        task._log_destroy_pending = False
    tasks[0].get_coro().close()  # as the garbage collector would
    assert begun == [1]


def test_many_threads_that_try_at_once_leave_one_owner() -> None:
    work, done = in_loops()
    barrier, errors = threading.Barrier(4), list[BaseException]()

    async def busy() -> None:
        barrier.wait()
        try:
            await work()
        finally:
            barrier.wait()  # until each has tried

    def thread() -> None:
        try:
            asyncio.run(busy())
        except SetupError as error:
            errors.append(error)

    threads = [threading.Thread(target=thread) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert (len(done), len(errors)) == (1, 3)


# ── What it is put on ───


async def test_bare_misuse_says_what_to_write() -> None:
    async def ask() -> None: ...

    with pytest.raises((TypeError, SetupError), match="limit"):
        limit(ask)  # type: ignore[call-arg]


@pytest.mark.parametrize("wrong", [0, -1])
@pytest.mark.parametrize("name", ["concurrency", "rpm", "tpm"])
def test_a_limit_that_lets_nothing_through_is_a_setup_error(name: str, wrong: int) -> None:
    with pytest.raises(SetupError, match=f"{name}={wrong}"):
        limit(**{name: wrong})


def test_a_plain_function_is_refused_by_name() -> None:
    def classify(text: str) -> str:
        return text

    with pytest.raises(TypeError, match="classify"):
        limit(rpm=60)(classify)  # type: ignore[arg-type,type-var]


async def test_a_wrong_call_is_the_functions_own_type_error_before_it_is_queued() -> None:
    gate = anyio.Event()

    @limit(concurrency=1)
    async def classify(text: str) -> str:
        await gate.wait()
        return text

    async with asyncio.TaskGroup() as group:
        held = group.create_task(classify("a"))
        await anyio.sleep(0.001)
        with anyio.fail_after(5), pytest.raises(TypeError, match=r"classify\(\) takes 1 pos"):
            await classify("a", "b")  # type: ignore[call-arg]
        gate.set()
    assert held.result() == "a"


class Room:
    """A class with a limited method."""

    limited = limit(concurrency=2)

    def __init__(self, name: str) -> None:
        self.name, self.inside, self.peak = name, 0, 0

    @limited
    async def enter(self, who: str, *, pause: float = 0.001) -> str:
        """Enter the room."""
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        await anyio.sleep(pause)
        self.inside -= 1
        return f"{who} in {self.name}"


@RUNS
def test_a_method_is_limited_over_all_objects(run: Run) -> None:
    async def main() -> tuple[list[Any], int]:
        rooms = [Room("a"), Room("b")]
        results = await at_once(lambda n: rooms[n % 2].enter(str(n), pause=0.0005), range(10))
        return results, sum(room.peak for room in rooms)

    results, peak = run(main)
    assert results == [f"{n} in {'ab'[n % 2]}" for n in range(10)]
    assert peak <= 3  # two at one time, whichever rooms they are in


def test_what_is_limited_looks_as_before() -> None:
    enter = Room.enter
    assert inspect.iscoroutinefunction(enter)
    assert (enter.__name__, enter.__doc__) == ("enter", "Enter the room.")
    assert [*inspect.signature(enter).parameters] == ["self", "who", "pause"]
    assert inspect.signature(enter).return_annotation in (str, "str")


async def test_a_limited_model_is_a_plain_async_function(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good("right"))
    ask = limit(concurrency=1)(connect(wire))
    assert inspect.iscoroutinefunction(ask)
    assert "prompt" in inspect.signature(ask).parameters
    assert (await ask("hi", max_tokens=5)).text == "right"
    with pytest.raises(TypeError, match="prompt"):
        await ask()  # type: ignore[call-overload]
    assert len(server.requests) == 1


def test_a_limit_shows_its_numbers() -> None:
    shown = repr(limit(concurrency=7, rpm=601, tpm=90_001))
    assert all(number in shown for number in ("7", "601", "90001")), shown
    assert "601" in repr(model("openai:gpt-4o", limit=limit(rpm=601)))
