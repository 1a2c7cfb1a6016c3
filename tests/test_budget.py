"""budget: what a server billed, by its own count, never exceeds the dollars that were given."""

import asyncio
import contextvars
import itertools
import json
import pickle
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
import trio
import trio.testing
from conftest import Connect
from server import WIRES, Answer, Seen, Server, Wire, serving, sse, until

import ember
from ember import BudgetExceeded, Price, SetupError, budget, cache, limit, model, retry, track

pytestmark = pytest.mark.usefixtures("no_backoff")

PRICE = (3.0, 15.0)
COST = (11 * 3 + 7 * 15) / 1e6  # of one answer, by the server's counts
LARGE = 10_000_000.0  # dollars


def out_of(body: Any) -> Any:
    """The most tokens of output that a request allows, under whichever name."""
    return body.get("max_completion_tokens", body.get("max_tokens"))


def worst(tokens: int, text: str = "hi") -> float:
    """The least that can be reserved for so many tokens of output, in US dollars."""
    return (len(text.encode()) * PRICE[0] + tokens * PRICE[1]) / 1e6


def said(wire: Wire, tokens_in: int, tokens_out: int) -> dict[str, int]:
    """A usage object."""
    if wire.provider == "anthropic":
        return {"input_tokens": tokens_in, "output_tokens": tokens_out}
    return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}


def answered(wire: Wire, body: Any, usage: Any, **how: Any) -> Answer:
    """An answer or a stream with this usage."""
    if not body.get("stream"):
        return Answer({**wire.answer("right"), "usage": usage}, **how)
    events = wire.events("ri", "ght")
    for event in events:
        if isinstance(event, dict) and event.get("usage"):
            event["usage"] = usage
        elif isinstance(event, dict) and event.get("type") == "message_start":
            event["message"] = {**event["message"], "usage": usage}
    return Answer(sse(events), **{"type": "text/event-stream", "framing": "chunked"} | how)


class Till:
    """A provider that bills at most a token a byte and the output that was allowed.

    With `faults` it refuses calls (and bills nothing), or bills them and breaks off.
    """

    def __init__(self, wire: Wire, seed: int = 7, faults: float = 0.3) -> None:
        self.wire, self.dice, self.faults = wire, random.Random(seed), faults
        self.spent, self.served = 0.0, 0

    def __call__(self, seen: Seen) -> Answer:
        wire, dice, body = self.wire, self.dice, seen.json
        text: str = body["messages"][-1]["content"]
        fault = dice.choice(["refuse", "refuse", "break"]) if dice.random() < self.faults else ""
        if fault == "refuse":
            status = dice.choice([400, 408, 409, 429, 500, 503, 529])
            return Answer(wire.problem("busy"), status, headers=dice.choice([{}, {"x": "y"}]))
        most = (len(text.encode()), out_of(body))
        used = most if dice.random() < 0.5 else tuple(dice.randint(1, count) for count in most)
        self.spent += (used[0] * PRICE[0] + used[1] * PRICE[1]) / 1e6
        self.served += 1
        pause = dice.choice([0, 0, 0.002])
        good = answered(wire, body, said(wire, *used), pause=pause)
        if "in a hurry" in text and dice.random() < 0.3:
            at = dice.choice([None, 0.5])
            return answered(wire, body, said(wire, *used), fault="hang", at=at)
        if fault == "break":
            at = dice.choice([None, 0.0, 0.5])
            broken = answered(
                wire, body, said(wire, *used), fault=dice.choice(["reset", "close"]), at=at
            )
            return dice.choice([broken, broken, Answer(b""), Answer("no JSON")])
        return good


# ── Never more than was given ───


async def one_of_many(ask: ember.Model, dice: random.Random, number: int) -> Any:
    """A call of any kind: what it returned or raised."""
    text = f"{number}: " + "wörd 🜂 "[: dice.randint(1, 7)] * dice.randint(1, 30)
    how = dice.random()
    options: dict[str, Any] = {"max_tokens": dice.randint(10, 300)} if dice.random() < 0.8 else {}
    try:
        if how < 0.15:
            return await ask(f"{text} in a hurry", timeout=0.1, **options)
        if how < 0.3:
            with anyio.move_on_after(dice.uniform(0, 0.05)):
                return await ask(text, **options)
            return "cancelled"
        if how < 0.5:
            async with ask.stream(text, **options) as stream:
                async for _ in stream:
                    if dice.random() < 0.1:
                        return "left"
            return stream.reply
        return await ask(text, **options)
    except ember.EmberError as error:
        return error


@pytest.mark.parametrize("seed", range(10))
async def test_two_hundred_calls_never_cost_more_by_the_servers_own_count(seed: int) -> None:
    dice = random.Random(seed)
    wire = list(WIRES.values())[seed % 2]
    usd = dice.uniform(0.05, 0.4)
    till = Till(wire, seed)
    with serving(till) as server:
        ask = model(
            f"{wire.provider}:{wire.id}", base_url=server.url + wire.base, price=PRICE,
            api_key="sk-no-secret", timeout=20, retries=dice.choice([0, 2, 8]),
        )  # fmt: skip
        spent = budget(usd=usd, assume_tokens=200, on_warn=lambda _: None)
        with spent, anyio.fail_after(20):
            calls = (one_of_many(ask, dice, number) for number in range(200))
            outcomes = await asyncio.gather(*calls)
    assert till.spent <= usd + 1e-9
    assert till.spent <= spent.cost + spent.uncertain + 1e-9
    assert spent.cost + spent.uncertain <= usd + 1e-9
    assert spent.left == pytest.approx(usd - spent.cost - spent.uncertain)
    replies = [outcome for outcome in outcomes if isinstance(outcome, ember.Reply)]
    assert len(replies) >= 5
    assert spent.cost >= sum(reply.cost or 0 for reply in replies) - 1e-9
    if any(isinstance(outcome, BudgetExceeded) for outcome in outcomes):
        assert spent.left < worst(300, "🜂" * 400)  # it was raised only when one did not fit


def test_threads_and_loops_share_one_budget() -> None:
    wire = WIRES["openai"]
    till, usd = Till(wire, 3), 0.15
    with serving(till) as server:
        ask = model(
            f"openai:{wire.id}", base_url=f"{server.url}/v1", price=PRICE, api_key="sk-no-secret",
            timeout=20,
        )  # fmt: skip

        async def some(seed: int) -> None:
            dice = random.Random(seed)
            await asyncio.gather(*(one_of_many(ask, dice, number) for number in range(30)))

        async def in_sync(seed: int) -> None:
            dice = random.Random(seed)
            await ember.gather(*(one_of_many(ask, dice, number) for number in range(30)))

        async def main() -> None:
            with anyio.fail_after(20):
                async with anyio.create_task_group() as group:
                    group.start_soon(some, 1)
                    group.start_soon(anyio.to_thread.run_sync, asyncio.run, some(2))
                    group.start_soon(anyio.to_thread.run_sync, trio.run, in_sync, 3)
                    for seed in (4, 5):
                        group.start_soon(anyio.to_thread.run_sync, ember.sync(in_sync), seed)

        with budget(usd=usd, assume_tokens=200, on_warn=lambda _: None) as spent:
            asyncio.run(main())
    assert till.spent <= usd + 1e-9
    assert till.served > 20
    assert till.spent <= spent.cost + spent.uncertain + 1e-9 <= usd + 2e-9


def greedy(usage: Callable[[int, int], Any]) -> Callable[[Any], Answer]:
    """Anthropic's answer that bills all that a request allows."""

    def play(body: Any) -> Answer:
        [part] = body["messages"][0]["content"]
        size = len(part["text"].encode())
        return answered(WIRES["anthropic"], body, usage(size, body["max_tokens"]))

    return play


USAGES: dict[str, Callable[[int, int], Any]] = {
    "plain": lambda size, out: {"input_tokens": size, "output_tokens": out},
    "written": lambda size, out: {
        "input_tokens": 0, "output_tokens": out, "cache_creation_input_tokens": size,
    },
    "written for an hour": lambda size, out: {
        "input_tokens": 0, "output_tokens": out, "cache_creation_input_tokens": size,
        "cache_creation": {"ephemeral_1h_input_tokens": size},
    },
    "read": lambda size, out: {
        "input_tokens": 0, "output_tokens": out, "cache_read_input_tokens": size,
    },
}  # fmt: skip
PRICES: dict[str, Price] = {
    "plain": Price(3, 15),
    "a price for each": Price(3, 15, 0.3, 3.75),
    "dear from 100 on": Price(3, 15, 0.3, 3.75, (100, 30, 150, 3)),
    "dear input": Price(30, 0.1),
}


@pytest.mark.parametrize("usage", USAGES)
@pytest.mark.parametrize("price", PRICES)
async def test_the_most_that_a_call_can_cost_is_reserved(price: str, usage: str) -> None:
    wire, play = WIRES["anthropic"], greedy(USAGES[usage])
    transport = Desk(play)
    ask = model(
        f"anthropic:{wire.id}", transport=transport, api_key="sk-no-secret", price=PRICES[price]
    )
    kept = {"type": "ephemeral", "ttl": "1h"} if "hour" in usage else {"type": "ephemeral"}
    part = {"type": "text", "text": "ö" * 300, "cache_control": kept}
    prompt, costs = [{"role": "user", "content": [part]}], list[float]()
    with budget(usd=0.15, on_warn=lambda _: None) as spent, pytest.raises(BudgetExceeded):
        while True:
            costs.append((await ask(prompt, max_tokens=40)).cost or 0)
    assert costs
    assert sum(costs) == pytest.approx(spent.cost)
    assert sum(costs) <= 0.15 + 1e-9


class Desk(httpx.AsyncBaseTransport):
    """A provider in the process, which answers `play(body)` after so many seconds."""

    def __init__(self, play: Callable[[Any], Answer], seconds: float = 0.0) -> None:
        self.play, self.seconds = play, seconds
        self.bodies: list[Any] = []
        self.flying = self.peak = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.content))
        self.flying += 1
        self.peak = max(self.peak, self.flying)
        try:
            answer = self.play(self.bodies[-1])
            await anyio.sleep(self.seconds)
        finally:
            self.flying -= 1
        content = b"".join(answer.pieces())
        return httpx.Response(answer.status, headers=answer.headers, content=content)


async def test_a_call_for_several_answers_reserves_all_of_them(
    server: Server, connect: Connect
) -> None:
    """OpenAI's `n` bills the output n times."""

    def script(seen: Seen) -> Answer:
        nonlocal billed
        usage = said(wire, 2, seen.json.get("n", 1) * out_of(seen.json))
        billed += (usage["prompt_tokens"] * PRICE[0] + usage["completion_tokens"] * PRICE[1]) / 1e6
        return answered(wire, seen.json, usage)

    billed, wire, usd = 0.0, WIRES["openai"], worst(250)
    server.play(script)
    with budget(usd=usd, on_warn=lambda _: None), suppress(BudgetExceeded):
        while True:
            await connect(wire, price=PRICE)("hi", max_tokens=100, n=4)
    assert billed <= usd


async def test_embeddings_are_reserved_for(server: Server, connect: Connect) -> None:
    def script(seen: Seen) -> Answer:
        nonlocal billed
        texts = seen.json["input"]
        tokens = sum(len(text.encode()) for text in texts)
        billed += tokens * 3 / 1e6
        data = [{"index": n, "embedding": [1.0]} for n in range(len(texts))]
        return Answer({"data": data, "usage": {"prompt_tokens": tokens}})

    billed, usd = 0.0, 100 * 3 / 1e6
    server.play(script)
    embed = connect(WIRES["openai"], price=(3.0,)).embed
    with budget(usd=usd, on_warn=lambda _: None) as spent:
        assert len(await embed(["x" * 20, "y" * 20])) == 2
        with pytest.raises(BudgetExceeded):
            await embed(["x" * 200])
    assert spent.cost == pytest.approx(billed) == 40 * 3 / 1e6
    assert "max_tokens" not in server.requests[0].json
    assert "max_completion_tokens" not in server.requests[0].json


# ── What is given back, and what is kept ───


async def test_what_an_answer_left_over_is_given_back(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    with budget(usd=1.0) as spent:
        await connect(wire, price=PRICE)("hi", max_tokens=1000)
    assert spent.cost == pytest.approx(COST)
    assert spent.uncertain == 0
    assert spent.left == pytest.approx(1 - COST)
    assert (spent.requests, spent.tokens_in, spent.usd) == (1, 11, 1.0)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 413, 429, 500, 503, 529])
async def test_an_error_status_is_given_back(
    server: Server, connect: Connect, wire: Wire, status: int
) -> None:
    server.play(Answer(wire.problem("some_error"), status))
    with budget(usd=1.0) as spent, pytest.raises(ember.CallError):
        await connect(wire, price=PRICE, retries=1)("hi")
    assert (spent.cost, spent.uncertain, spent.left) == (0, 0, 1)
    assert spent.requests == len(server.requests) >= 1


def unsendable(wire: Wire, url: str) -> dict[str, Callable[[], Any]]:
    """Calls that fail before anything is sent."""
    name, how = f"{wire.provider}:{wire.id}", {"price": PRICE, "api_key": "sk-no-secret"}
    there: Any = how | {"base_url": url + wire.base}
    nobody: Any = how | {"base_url": "http://127.0.0.1:9", "retries": 0}
    return {
        "no one listens": lambda: model(name, **nobody)("hi"),
        "no key": lambda: model(name, price=PRICE)("hi"),
        "an odd key": lambda: model(name, **there | {"api_key": "sk-\n☃"})("hi"),
        "an odd option": lambda: model(name, **there)("hi", metadata={1, 2}),
        "a number that JSON has not": lambda: model(name, **there)("hi", top_p=float("nan")),
        "no such host": lambda: model(name, **there | {"base_url": "ftp://x"})("hi"),
        "a token that fails": lambda: model(name, **there | {"api_key": no_token})("hi"),
        "no prompt": lambda: model(name, **there)(None),
    }


async def no_token() -> str:
    """A function that is asked for a token, and has none."""
    raise KeyError


@pytest.mark.parametrize("how", unsendable(WIRES["openai"], ""))
async def test_what_was_never_sent_is_given_back(server: Server, wire: Wire, how: str) -> None:
    server.play(wire.good())
    with budget(usd=1.0) as spent:
        with pytest.raises((ember.EmberError, TypeError, ValueError)) as caught:
            await unsendable(wire, server.url)[how]()
        assert not isinstance(caught.value, BudgetExceeded)
        assert (spent.cost, spent.uncertain, spent.left) == (0, 0, 1)
    assert server.requests == []


async def test_a_call_cancelled_before_it_is_sent_is_given_back(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    shared = limit(concurrency=1)
    waits = connect(wire, price=PRICE, limit=shared)

    @shared
    async def hold() -> None:
        await held.wait()

    held = anyio.Event()
    with budget(usd=1.0) as spent:
        async with asyncio.TaskGroup() as group:
            group.create_task(hold())
            await anyio.sleep(0.001)
            with anyio.move_on_after(0.01):
                await waits("hi")
            held.set()
        assert (spent.uncertain, spent.left) == (0, 1)
        await waits("hi")
    assert spent.cost == pytest.approx(COST)
    assert len(server.requests) == 1


LOST: dict[str, Callable[[Wire], Answer]] = {
    "reset before the headers": lambda wire: wire.good(fault="reset"),
    "closed before the headers": lambda wire: wire.good(fault="close"),
    "reset in the body": lambda wire: wire.good(fault="reset", at=0.5),
    "closed in the body": lambda wire: wire.good(fault="close", at=0.5),
    "time-out": lambda wire: wire.good(fault="hang"),
    "time-out in the body": lambda wire: wire.good(fault="hang", at=0.5),
    "no JSON": lambda wire: Answer(b"this is no JSON"),
    "empty": lambda wire: Answer(b""),
    "another object": lambda wire: Answer({"status": "ok"}),
    "not http": lambda wire: Answer([b"\x15\x03\x01\r\n\r\n"], head=b"", then="close"),
    "another coding": lambda wire: wire.good(headers={"content-encoding": "br"}),
}


@pytest.mark.parametrize("fault", LOST)
async def test_what_was_sent_and_may_be_billed_is_kept_at_its_worst(
    server: Server, connect: Connect, wire: Wire, fault: str
) -> None:
    server.play(LOST[fault](wire))
    with budget(usd=1.0) as spent, pytest.raises(ember.EmberError):
        await connect(wire, price=PRICE, retries=0)("hi", max_tokens=1000, timeout=0.3)
    assert spent.cost == 0
    assert worst(1000) <= spent.uncertain <= worst(1000) + 2000 * PRICE[0] / 1e6
    assert spent.left == pytest.approx(1 - spent.uncertain)
    assert spent.calls[0].uncertain == spent.uncertain


async def test_a_cancelled_call_that_was_sent_is_kept(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good(fault="hang"))
    with budget(usd=1.0) as spent:
        async with anyio.create_task_group() as group:
            group.start_soon(connect(wire, price=PRICE, max_tokens=1000), "hi")
            await until(lambda: len(server.requests) == 1)
            group.cancel_scope.cancel()
    assert spent.uncertain >= worst(1000)
    assert spent.calls[0].outcome == "cancelled"


async def test_each_attempt_is_kept_or_given_back_by_itself(
    server: Server, connect: Connect, wire: Wire
) -> None:
    broken = LOST["reset in the body"](wire)
    server.play(broken, Answer(b"", 503), LOST["no JSON"](wire), wire.good())
    with budget(usd=1.0) as spent:
        await connect(wire, price=PRICE, retries=3)("hi", max_tokens=1000)
    assert spent.cost == pytest.approx(COST)
    kept = [attempt.uncertain for attempt in spent.calls]
    assert [amount > 0 for amount in kept] == [True, False, True, False]
    assert sum(kept) == spent.uncertain == pytest.approx(1 - COST - spent.left)


async def test_an_answer_that_does_not_say_what_it_took_is_kept_at_its_worst(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(Answer({**wire.answer("right"), "usage": None}))
    with budget(usd=1.0) as spent:
        reply = await connect(wire, price=PRICE)("hi", max_tokens=1000)
    assert (reply.text, reply.cost) == ("right", None)
    assert spent.uncertain >= worst(1000)


async def test_an_error_in_a_200_is_no_answer_that_was_paid(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(Answer(wire.problem("invalid_request_error", code="invalid_value")))
    with budget(usd=1.0) as spent, pytest.raises(ember.CallError):
        await connect(wire, price=PRICE)("hi", max_tokens=1000)
    assert spent.cost == 0
    assert spent.left in (pytest.approx(1 - spent.uncertain), 1)


# ── Streams ───


async def test_a_stream_is_settled_by_what_it_says_at_its_end(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("a", "b"))
    with budget(usd=1.0) as spent:
        stream = connect(wire, price=PRICE).stream("hi", max_tokens=1000)
    async with stream:
        assert [piece async for piece in stream] == ["a", "b"]
    assert spent.cost == pytest.approx(COST)
    assert (spent.uncertain, spent.left) == (0, pytest.approx(1 - COST))


@pytest.mark.parametrize("how", ["left", "broken", "silent"])
async def test_a_stream_without_an_end_is_kept_at_its_worst(
    server: Server, connect: Connect, wire: Wire, how: str
) -> None:
    slow = wire.stream("a", "b", pause=0.005, piece=100)
    events = wire.events("a", "b", usage=False)
    for event in events:
        if how == "silent" and isinstance(event, dict) and event.get("type") == "message_start":
            event["message"] = {**event["message"], "usage": None}
    cut = wire.stream("a", "b", fault="close", at=0.6)
    server.play({"left": slow, "broken": cut, "silent": wire.stream(events=events)}[how])
    with budget(usd=1.0) as spent:
        async with connect(wire, price=PRICE).stream("hi", max_tokens=1000) as stream:
            with suppress(ember.CallError):
                async for _ in stream:
                    if how == "left":
                        break
    assert spent.uncertain >= worst(1000)
    assert spent.left == pytest.approx(1 - spent.uncertain)


async def test_a_stream_that_does_not_fit_is_not_sent(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.stream("a", "b"))
    with budget(usd=worst(900)) as spent, pytest.raises(BudgetExceeded):
        async with connect(wire, price=PRICE).stream("hi", max_tokens=1000) as stream:
            await anext(stream)
    assert server.requests == []
    assert spent.left == spent.usd


# ── What does not fit ───


async def test_a_call_that_does_not_fit_is_not_sent(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    ask = connect(wire, price=PRICE)
    with budget(usd=worst(1000) / 2) as spent:
        with pytest.raises(BudgetExceeded, match=r"\$") as caught:
            await ask("hi", max_tokens=1000)
        assert server.requests == []
        assert (await ask("hi", max_tokens=10)).text == "right"
    error = caught.value
    assert isinstance(error, ember.EmberError)
    assert error.transient is False
    assert wire.id in str(error)
    assert f"{spent.usd:.3g}"[:4] in str(error)


async def test_what_does_not_fit_is_not_tried_again(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    runs: list[int] = []

    @retry(max_attempts=5)
    async def work() -> None:
        runs.append(1)
        await connect(wire, price=PRICE, retries=5)("hi", max_tokens=1000)

    with budget(usd=worst(1000) / 2), pytest.raises(BudgetExceeded):
        await work()
    assert len(runs) == 1
    assert server.requests == []


async def test_a_retry_that_does_not_fit_is_not_sent(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good(fault="reset"))
    quiet: Any = {"on_warn": lambda _: None}
    with budget(usd=worst(1000) * 1.5, **quiet) as spent, pytest.raises(BudgetExceeded):
        await connect(wire, price=PRICE, retries=5)("hi", max_tokens=1000)
    assert len(server.requests) == 1
    assert spent.uncertain >= worst(1000)


async def test_calls_wait_while_others_are_under_way(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good(pause=0.001))
    room = worst(1000) + 2000 * PRICE[0] / 1e6  # for one at a time, whatever is counted as input
    ask = connect(wire, price=PRICE)
    with budget(usd=room, on_warn=lambda _: None) as spent, anyio.fail_after(5):
        replies = await asyncio.gather(*(ask("hi", max_tokens=950) for _ in range(10)))
    assert [reply.text for reply in replies] == ["right"] * 10
    assert server.peak == 1
    assert spent.cost == pytest.approx(10 * COST)


async def test_a_waiter_is_refused_as_soon_as_nothing_more_can_come_back(
    server: Server, connect: Connect, wire: Wire
) -> None:
    def script(seen: Seen) -> Answer:
        return answered(wire, seen.json, said(wire, 1, out_of(seen.json)), pause=0.005)

    server.play(script)
    ask = connect(wire, price=PRICE)
    with budget(usd=worst(1000) * 1.5, on_warn=lambda _: None), anyio.fail_after(5):
        outcomes = await asyncio.gather(
            *(ask("hi", max_tokens=1000) for _ in range(5)), return_exceptions=True
        )
    assert sum(isinstance(outcome, BudgetExceeded) for outcome in outcomes) == 4
    assert len(server.requests) == 1


async def test_a_call_that_can_never_fit_does_not_stop_those_that_do(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good(pause=0.002))
    ask = connect(wire, price=PRICE)
    with budget(usd=worst(2000), on_warn=lambda _: None), anyio.fail_after(5):
        outcomes = await asyncio.gather(
            ask("hi", max_tokens=1500),
            ask("hi", max_tokens=5000),
            *(ask("hi", max_tokens=500) for _ in range(5)),
            return_exceptions=True,
        )
    kinds = [type(outcome).__name__ for outcome in outcomes]
    assert kinds == ["Reply", "BudgetExceeded", *["Reply"] * 5]


async def test_a_waiter_that_is_cancelled_leaves_nothing_behind(
    server: Server, connect: Connect, wire: Wire
) -> None:
    hold = threading.Event()
    server.play(wire.good(hold=hold), wire.good())
    ask = connect(wire, price=PRICE)
    with budget(usd=worst(1000) * 1.5, on_warn=lambda _: None) as spent, anyio.fail_after(5):
        async with asyncio.TaskGroup() as group:
            group.create_task(ask("hi", max_tokens=1000))
            await until(lambda: len(server.requests) == 1)
            with anyio.move_on_after(0.01) as scope:
                await ask("hi", max_tokens=1000)
            assert scope.cancelled_caught
            hold.set()
        await ask("hi", max_tokens=1000)
    assert spent.left == pytest.approx(spent.usd - 2 * COST)
    assert [attempt.outcome for attempt in spent.calls].count("ok") == 2


def test_a_call_waits_for_the_budget_no_longer_than_its_timeout(wire: Wire) -> None:
    desk = Desk(lambda body: wire.good(), 100)
    ask = model(f"{wire.provider}:{wire.id}", transport=desk, price=PRICE, api_key="sk-no-secret")

    async def main() -> float:
        with budget(usd=worst(1000) * 1.5, on_warn=lambda _: None):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask.using(timeout=1000, max_tokens=1000), "hi")
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(ember.CallError, match="timeout=20"):
                    await ask.using(timeout=20, max_tokens=1000)("hi")
                return trio.current_time()

    clock = trio.testing.MockClock(autojump_threshold=0)
    assert trio.run(main, clock=clock) <= 20.1
    assert len(desk.bodies) == 1


def test_what_waits_for_the_budget_holds_no_place_in_a_limit(wire: Wire) -> None:
    desk = Desk(lambda body: wire.good(), 100)
    ask = model(
        f"{wire.provider}:{wire.id}", transport=desk, price=PRICE, api_key="sk-no-secret",
        max_tokens=1000,
    )  # fmt: skip

    async def main() -> float:
        limited = ask.using(limit=limit(concurrency=1))
        outside = contextvars.copy_context()
        with budget(usd=worst(1000) * 1.5, on_warn=lambda _: None):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, "holds the budget")
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(limited, "waits for the budget")
                await trio.testing.wait_all_tasks_blocked()
                done = trio.Event()

                async def free() -> None:
                    await limited("has none")
                    done.set()

                trio.lowlevel.spawn_system_task(free, context=outside)
                await done.wait()
                return trio.current_time()

    clock = trio.testing.MockClock(autojump_threshold=0)
    assert trio.run(main, clock=clock) == 100


async def test_a_dollar_is_a_dollar_to_the_last_call(
    server: Server, connect: Connect
) -> None:
    """What fits exactly is sent: sums of floats do not drift away from it."""
    wire = WIRES["openai"]
    server.play(lambda seen: answered(wire, seen.json, said(wire, 0, out_of(seen.json))))
    ask = connect(wire, price=(0, 1.0))
    with budget(usd=100 * 7 / 1e6, on_warn=lambda _: None) as spent:
        for _ in range(100):
            await ask("hi", max_tokens=7)
        with pytest.raises(BudgetExceeded):
            await ask("hi", max_tokens=7)
    assert len(server.requests) == 100
    assert spent.left == pytest.approx(0, abs=1e-12)


# ── What is sent ───


async def test_assume_tokens_is_sent_where_no_maximum_is_given(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    ask = connect(wire, price=PRICE)
    with budget(usd=LARGE):
        await ask("hi")
        await ask("hi", max_tokens=50)
        await ask.using(max_tokens=60)("hi")
    with budget(usd=LARGE, assume_tokens=321):
        await ask("hi")
    await ask("hi")
    sent = [out_of(seen.json) for seen in server.requests]
    assert sent[:4] == [4096, 50, 60, 321]
    assert sent[4] == (None if wire.provider == "openai" else 64_000)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_maximum_among_the_options_is_the_one_that_is_reserved(
    server: Server, connect: Connect, name: str
) -> None:
    wire = WIRES["openai"]
    server.play(wire.good())
    ask = connect(wire, price=PRICE)
    with budget(usd=worst(1000) + 2000 * PRICE[0] / 1e6) as spent:
        await ask("hi", **{name: 900})
        with pytest.raises(BudgetExceeded):
            await ask("hi", **{name: 9000})
    [seen] = server.requests
    assert [seen.json[key] for key in seen.json if key.startswith("max")] == [900]
    assert spent.cost == pytest.approx(COST)


async def test_the_tool_loop_reserves_for_each_step(server: Server, connect: Connect) -> None:
    wire = WIRES["openai"]

    async def look() -> str:
        """Look it up."""
        assert spent.left == pytest.approx(1 - COST)
        return "found"

    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    asked = Answer(wire.answer(None, tool_calls=[call], finish="tool_calls"))
    server.play(asked, wire.good())
    with budget(usd=1.0) as spent:
        await connect(wire, price=PRICE)("hi", tools=[look])
    assert [out_of(seen.json) for seen in server.requests] == [4096, 4096]
    assert spent.cost == pytest.approx(2 * COST)


# ── Prices ───


async def test_an_unknown_price_is_a_setup_error_before_the_request(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    ask = connect(wire, price=None)
    with budget(usd=1.0) as spent:
        with pytest.raises(SetupError, match="price"):
            await ask("hi")
        with pytest.raises(SetupError, match="price"):
            async with ask.stream("hi") as stream:
                await anext(stream)
    assert server.requests == []
    assert spent.left == 1
    assert (await ask("hi")).text == "right"


async def test_what_is_free_needs_no_budget(server: Server, connect: Connect, wire: Wire) -> None:
    server.play(wire.good())
    with budget(usd=0.0) as spent:
        await connect(wire, price=(0, 0))("hi")
        with pytest.raises(BudgetExceeded):
            await connect(wire, price=PRICE)("hi")
    assert (len(server.requests), spent.cost, spent.left) == (1, 0, 0)


async def test_a_hit_needs_no_budget(server: Server, connect: Connect, wire: Wire) -> None:
    server.play(wire.good())

    @cache(store={})
    async def classify(text: str) -> ember.Reply[str]:
        return await connect(wire, price=PRICE)(text)

    await classify("a")
    with budget(usd=0.0) as spent:
        assert (await classify("a")).cached
    assert (spent.requests, spent.hits) == (0, 1)
    assert spent.saved == pytest.approx(COST)


@pytest.mark.parametrize(
    "wrong",
    [{"usd": -1.0}, {"usd": float("nan")}, {"usd": 1.0, "assume_tokens": 0}],
    ids=["less than nothing", "nan", "no tokens"],
)
def test_a_wrong_budget_is_a_setup_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match="budget"):
        budget(**wrong)


# ── Nested ───


@pytest.mark.parametrize(("outer", "inner"), [(1.0, 0.1), (0.1, 1.0)], ids=["inner", "outer"])
async def test_the_smaller_of_nested_budgets_holds(
    server: Server, connect: Connect, wire: Wire, outer: float, inner: float
) -> None:
    server.play(lambda seen: answered(wire, seen.json, said(wire, 1, out_of(seen.json))))
    ask = connect(wire, price=PRICE)
    quiet: Any = {"on_warn": lambda _: None}
    large, small = (share * worst(3000) for share in (outer, inner))
    with budget(usd=large, **quiet) as a, budget(usd=small, **quiet) as b:
        await ask("hi", max_tokens=100)
        with pytest.raises(BudgetExceeded):
            await ask("hi", max_tokens=1000)
        await ask("hi", max_tokens=100)
        assert a.cost == b.cost == pytest.approx(2 * (1 * 3 + 100 * 15) / 1e6)
        assert a.left == pytest.approx(a.usd - a.cost)  # nothing of the refused one is left in it
        assert b.left == pytest.approx(b.usd - b.cost)
    assert len(server.requests) == 2


@pytest.mark.parametrize("seed", range(3))
async def test_nested_budgets_hold_together_under_faults(seed: int) -> None:
    wire, dice = WIRES["anthropic"], random.Random(seed)
    till = Till(wire, seed)
    given = 0.0
    with serving(till) as server:
        ask = model(
            f"anthropic:{wire.id}", base_url=server.url, price=PRICE, api_key="sk-no-secret",
            timeout=20,
        )  # fmt: skip
        quiet: Any = {"on_warn": lambda _: None, "assume_tokens": 200}
        with budget(usd=0.12, **quiet) as outer, anyio.fail_after(20):
            for usd in (0.05, 0.1):
                with budget(usd=usd, **quiet) as inner:
                    await asyncio.gather(*(one_of_many(ask, dice, n) for n in range(60)))
                given += usd
                assert inner.cost + inner.uncertain <= usd + 1e-9
                assert till.spent <= given + 1e-9
    assert till.spent <= outer.cost + outer.uncertain + 1e-9 <= 0.12 + 2e-9
    assert outer.left == pytest.approx(0.12 - outer.cost - outer.uncertain)


async def test_calls_of_two_inner_budgets_share_the_outer_one(
    server: Server, connect: Connect, wire: Wire
) -> None:
    """Neither waits for ever for what the other one holds."""
    server.play(wire.good(pause=0.001))
    ask = connect(wire, price=PRICE)

    async def part() -> None:
        with budget(usd=worst(1000) * 1.6, on_warn=lambda _: None):
            await asyncio.gather(*(ask("hi", max_tokens=1000) for _ in range(5)))

    with budget(usd=worst(1000) * 1.7, on_warn=lambda _: None) as outer, anyio.fail_after(5):
        await asyncio.gather(*(part() for _ in range(4)))
    assert outer.cost == pytest.approx(20 * COST)


async def test_an_inner_refusal_does_not_hang_those_who_wait_for_the_outer_budget(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good(pause=0.001))
    ask = connect(wire, price=PRICE)
    quiet: Any = {"on_warn": lambda _: None}

    async def refused() -> None:
        with budget(usd=worst(100), **quiet), pytest.raises(BudgetExceeded):
            await ask("hi", max_tokens=1000)

    with budget(usd=worst(1000) * 1.3, **quiet) as outer, anyio.fail_after(5):
        calls = [ask("hi", max_tokens=1000) for _ in range(3)]
        mixed = itertools.chain(*zip(calls, [refused() for _ in range(3)], strict=True))
        await asyncio.gather(*mixed)
    assert outer.cost == pytest.approx(3 * COST)


async def test_a_budget_and_a_ledger_count_the_same(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(Answer(b"", 503), LOST["reset in the body"](wire), wire.good())
    with track() as ledger, budget(usd=1.0) as spent, track() as inner:
        await connect(wire, price=PRICE)("hi")
    assert spent.calls == ledger.calls == inner.calls
    assert ledger.uncertain == spent.uncertain > 0


# ── The warning ───


async def test_the_warning_comes_once_and_in_time(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    heard: list[tuple[str, int]] = []
    usd = COST * 10 + worst(100, "x" * 3000)

    def hear(message: str) -> None:
        heard.append((message, len(server.requests)))

    ask = connect(wire, price=PRICE)
    with budget(usd=usd, warn=4.5 * COST / usd, on_warn=hear):
        for _ in range(8):
            await ask("hi", max_tokens=100)
    [(message, requests)] = heard
    assert requests == 5
    assert "$" in message


async def test_the_warning_is_printed(
    server: Server, connect: Connect, wire: Wire, capsys: pytest.CaptureFixture[str]
) -> None:
    server.play(wire.good(fault="close"))
    with budget(usd=worst(1000) * 1.1), pytest.raises(ember.EmberError):
        await connect(wire, price=PRICE, retries=0)("hi", max_tokens=1000)
    printed = capsys.readouterr().out
    assert "budget" in printed
    assert printed.count("\n") == 1


async def test_no_warning_comes_below_the_share(
    server: Server, connect: Connect, wire: Wire, capsys: pytest.CaptureFixture[str]
) -> None:
    server.play(wire.good())
    with budget(usd=1.0):
        await connect(wire, price=PRICE)("hi")
    assert capsys.readouterr().out == ""


async def test_a_listener_that_fails_costs_no_answer(
    server: Server, connect: Connect, wire: Wire
) -> None:
    def broken(message: str) -> None:
        raise KeyError("listener")

    server.play(wire.good())
    ask = connect(wire, price=PRICE)
    with budget(usd=1.0, warn=1e-6, on_warn=broken) as spent:
        with pytest.warns(RuntimeWarning, match="listener"):
            assert (await ask("hi")).text == "right"
        assert (await ask("hi")).text == "right"
    assert spent.requests == 2
    assert spent.left == pytest.approx(1 - 2 * COST)


# ── Leaving ───


async def test_a_call_that_outlives_its_budget_is_still_settled(
    server: Server, connect: Connect, wire: Wire
) -> None:
    hold = threading.Event()
    server.play(wire.good(hold=hold))
    with budget(usd=1.0) as spent:
        task = asyncio.create_task(connect(wire, price=PRICE)("hi"))
        await until(lambda: len(server.requests) == 1)
    hold.set()
    await task
    assert spent.left == pytest.approx(1 - COST)


async def test_a_budget_ends_with_its_block(server: Server, connect: Connect, wire: Wire) -> None:
    server.play(wire.good())
    with budget(usd=0.0):
        pass
    assert (await connect(wire, price=PRICE)("hi")).text == "right"


async def test_a_budget_can_be_pickled_and_added_to_a_ledger(
    server: Server, connect: Connect, wire: Wire
) -> None:
    server.play(wire.good())
    with budget(usd=1.0, on_warn=lambda _: None) as spent:
        await connect(wire, price=PRICE)("hi")
    copy = pickle.loads(pickle.dumps(spent))
    assert (copy.requests, copy.cost) == (1, spent.cost)
    with track() as ledger:
        ledger.add(copy)
    assert ledger.cost == spent.cost
    assert str(spent)
