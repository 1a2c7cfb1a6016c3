"""`retry`: how often a server is asked, for how long, and what is never asked again."""

import functools
import inspect
import itertools
import random
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
import tenacity
from conftest import Connect, Run, failing
from server import WIRES, Answer, Seen, Server, until
from tenacity import wait as waits

import ember
from ember import CallError, Model, ReplyError, SetupError, batch, cache, limit, retry

pytestmark = pytest.mark.usefixtures("no_backoff")

OPENAI = WIRES["openai"]
BUSY = Answer(OPENAI.problem("server_error", "try another day"), status=503)

Ask = Callable[..., Awaitable[Any]]


@pytest.fixture(autouse=True)
def own_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own for each test."""
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Run:
    """`run(main)`, on each event loop."""
    return functools.partial(anyio.run, backend=request.param)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that were asked for; none is made."""
    slept = list[float]()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(anyio, "sleep", sleep)
    return slept


def prompt_of(seen: Seen) -> str:
    """The last message of a request."""
    return seen.json["messages"][-1]["content"]


# ── Shapes ─── what can be decorated


def decorated_function(ask: Model, decorate: Callable[[Any], Any]) -> Ask:
    """An async function that calls the model."""

    @decorate
    async def classify(text: str) -> str:
        return (await ask(text)).text

    return classify


def decorated_method(ask: Model, decorate: Callable[[Any], Any]) -> Ask:
    """A method that calls the model."""

    class Classifier:
        @decorate
        async def classify(self, text: str) -> str:
            return (await ask(text)).text

    return Classifier().classify


def decorated_model(ask: Model, decorate: Callable[[Any], Any]) -> Ask:
    """The model itself."""
    return decorate(ask)


SHAPES = {"function": decorated_function, "method": decorated_method, "model": decorated_model}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Callable[[Model, Any], Ask]:
    """Each thing that can be decorated: `shape(model, retry)`."""
    return SHAPES[request.param]


# ── Counts ───


@pytest.mark.parametrize("bare", [True, False])
def test_a_server_that_always_fails_is_asked_three_times(
    server: Server, connect: Connect, run: Run, shape: Any, bare: bool
) -> None:
    server.play(BUSY)
    classify = shape(connect(OPENAI, retries=2), retry if bare else retry(max_attempts=3))
    error = failing(run, functools.partial(classify, "hi"))
    assert isinstance(error, CallError)
    assert (error.attempts, error.status, error.transient) == (3, 503, True)
    assert len(server.requests) == 3


@pytest.mark.parametrize("inner", [0, 1, 2, 7])
@pytest.mark.parametrize("outer", [1, 2, 5])
def test_the_count_of_retry_replaces_the_model_s_own(
    server: Server, connect: Connect, run: Run, outer: int, inner: int
) -> None:
    server.play(BUSY)
    classify = decorated_function(connect(OPENAI, retries=inner), retry(max_attempts=outer))
    error = failing(run, functools.partial(classify, "hi"))
    assert isinstance(error, CallError)
    assert error.attempts == len(server.requests) == outer


@pytest.mark.parametrize(("outer", "inner"), [(3, 3), (2, 5), (5, 2), (1, 4), (4, 1)])
def test_nested_retries_send_as_many_as_the_outermost_says(
    server: Server, connect: Connect, run: Run, shape: Any, outer: int, inner: int
) -> None:
    server.play(BUSY)
    within = shape(connect(OPENAI), retry(max_attempts=inner))

    @retry(max_attempts=outer)
    async def classify(text: str) -> Any:
        return await within(text)

    assert isinstance(failing(run, functools.partial(classify, "hi")), CallError)
    assert len(server.requests) == outer


def test_three_retries_on_one_function_are_three_requests(
    server: Server, connect: Connect, run: Run, shape: Any
) -> None:
    server.play(BUSY)
    classify = shape(connect(OPENAI), lambda fn: retry(retry(retry(fn))))
    failing(run, functools.partial(classify, "hi"))
    assert len(server.requests) == 3


def test_the_first_of_two_calls_that_succeeds_is_sent_once(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(lambda seen: OPENAI.good() if prompt_of(seen) == "first" else BUSY)
    ask = connect(OPENAI)

    @retry(max_attempts=3)
    async def both() -> str:
        first = await ask("first")
        second = await ask("second")
        return first.text + second.text

    assert isinstance(failing(run, both), CallError)
    assert Counter(map(prompt_of, server.requests)) == {"first": 1, "second": 3}


def test_a_fault_that_passes_is_followed_by_the_answer(
    server: Server, connect: Connect, run: Run, shape: Any
) -> None:
    server.play(BUSY, OPENAI.good(fault="reset", at=0.5), OPENAI.good("right"))
    classify = shape(connect(OPENAI, retries=0), retry)
    assert str(run(functools.partial(classify, "hi"))) == "right"
    assert len(server.requests) == 3


def test_a_first_attempt_that_succeeds_is_one_request(
    server: Server, connect: Connect, run: Run, shape: Any
) -> None:
    server.play(OPENAI.good("right"))
    assert str(run(functools.partial(shape(connect(OPENAI), retry), "hi"))) == "right"
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_final_status_is_one_request_whatever_on_says(
    server: Server, connect: Connect, run: Run, status: int
) -> None:
    server.play(Answer(OPENAI.problem("invalid_request_error"), status=status))
    error = failing(run, functools.partial(retry(connect(OPENAI)), "hi"))
    assert isinstance(error, CallError)
    assert (error.status, len(server.requests)) == (status, 1)


def test_a_malformed_answer_is_asked_for_again_in_retry_s_count(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(Answer("this is not JSON"))
    error = failing(run, functools.partial(retry(max_attempts=4)(connect(OPENAI)), "hi"))
    assert isinstance(error, ReplyError)
    assert len(server.requests) == 4


@pytest.mark.parametrize("finish", ["content_filter", "length"])
def test_a_refusal_and_a_truncation_are_never_asked_for_again(
    server: Server, connect: Connect, run: Run, finish: str
) -> None:
    server.play(Answer(OPENAI.answer("no", finish=finish)))
    ask = connect(OPENAI)

    @retry
    async def number(text: str) -> int:
        return (await ask(text, output=int)).data

    assert isinstance(failing(run, functools.partial(number, "hi")), ReplyError)
    assert len(server.requests) == 1


def test_a_stream_that_never_begins_is_asked_for_in_retry_s_count(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(BUSY)
    ask = connect(OPENAI)

    @retry(max_attempts=4)
    async def tell(text: str) -> str:
        async with ask.stream(text) as stream:
            return "".join([piece async for piece in stream])

    assert isinstance(failing(run, functools.partial(tell, "hi")), CallError)
    assert len(server.requests) == 4


@pytest.mark.parametrize("order", ["retry(cache)", "cache(retry)", "retry(cache(retry))"])
def test_100_equal_callers_of_a_call_that_always_fails_send_three(
    server: Server, connect: Connect, run: Run, shape: Any, order: str
) -> None:
    server.play(BUSY)
    stacked = {
        "retry(cache)": lambda fn: retry(cached(fn)),
        "cache(retry)": lambda fn: cached(retry(fn)),
        "retry(cache(retry))": lambda fn: retry(cached(retry(fn))),
    }[order]

    def cached(fn: Any) -> Any:
        return cache(fn, key=lambda *args, **_: args[-1])

    classify = shape(connect(OPENAI), stacked)
    raised = list[BaseException]()

    async def call() -> None:
        try:
            await classify("hi")
        except CallError as error:
            raised.append(error)

    async def main() -> None:
        with anyio.fail_after(15):
            async with anyio.create_task_group() as group:
                for _ in range(100):
                    group.start_soon(call)

    run(main)
    assert [type(error) for error in raised] == [CallError] * 100
    assert len(server.requests) == 3


def test_what_a_retry_says_ends_with_it(server: Server, connect: Connect, run: Run) -> None:
    server.play(BUSY)
    ask = connect(OPENAI, retries=2)
    failing(run, functools.partial(retry(ask, max_attempts=1), "inside"))
    failing(run, functools.partial(ask, "outside"))
    assert Counter(map(prompt_of, server.requests)) == {"inside": 1, "outside": 3}


def test_retries_side_by_side_keep_their_own_counts(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(BUSY)
    ask = connect(OPENAI)

    async def call(count: int) -> None:
        with pytest.raises(CallError):
            await retry(ask, max_attempts=count)(str(count))

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for count in range(1, 8):
                group.start_soon(call, count)

    run(main)
    assert Counter(map(prompt_of, server.requests)) == {str(n): n for n in range(1, 8)}


# ── A fan-out inside one retry ───


async def by_task_group(ask: Ask, texts: list[str]) -> list[str]:
    """The answers, from a task each."""
    answers = dict[str, str]()

    async def one(text: str) -> None:
        answers[text] = (await ask(text)).text

    async with anyio.create_task_group() as group:
        for text in texts:
            group.start_soon(one, text)
    return [answers[text] for text in texts]


async def by_gather(ask: Ask, texts: list[str]) -> list[str]:
    """The answers, by Ember's gather."""
    return [reply.text for reply in await ember.gather(*(ask(text) for text in texts))]


async def by_parallel(ask: Ask, texts: list[str]) -> list[str]:
    """The answers, by Ember's parallel."""
    return [reply.text for reply in await ember.parallel(ask, texts, limit=20)]


FAULTS = [
    BUSY,
    OPENAI.good(fault="reset", at=0.5),
    Answer(b'{"choices": ['),
    Answer(OPENAI.problem("rate_limit_exceeded"), 429, headers={"retry-after-ms": "2"}),
]


@pytest.mark.parametrize("spread", [by_task_group, by_gather, by_parallel])
@pytest.mark.parametrize("lasting", [1, 2])
def test_a_fan_out_with_faults_asks_for_no_answered_call_again(
    server: Server, connect: Connect, run: Run, spread: Any, lasting: int
) -> None:
    unlucky = set(map(str, random.Random(7).sample(range(100), 5)))
    asked = Counter[str]()

    def script(seen: Seen) -> Answer:
        text = prompt_of(seen)
        asked[text] += 1
        fault = text in unlucky and asked[text] <= lasting
        return FAULTS[int(text) % len(FAULTS)] if fault else OPENAI.good(f"right {text}")

    server.play(script)
    ask = connect(OPENAI)
    texts = [str(number) for number in range(100)]

    @retry(max_attempts=3)
    async def fan_out() -> list[str]:
        return await spread(ask, texts)

    assert run(fan_out) == [f"right {text}" for text in texts]
    assert asked == {text: 1 + lasting * (text in unlucky) for text in texts}


@pytest.mark.parametrize("spread", [by_task_group, by_gather, by_parallel])
def test_a_fan_out_with_one_call_that_always_fails_is_not_run_again(
    server: Server, connect: Connect, run: Run, spread: Any
) -> None:
    server.play(lambda seen: BUSY if prompt_of(seen) == "50" else OPENAI.good())
    ask = connect(OPENAI)

    @retry(on=lambda error: True)
    async def fan_out() -> list[str]:
        return await spread(ask, [str(number) for number in range(100)])

    error = failing(run, fan_out)
    assert isinstance(error, CallError | ExceptionGroup)
    asked = Counter(map(prompt_of, server.requests))
    assert asked.pop("50") == 3
    assert set(asked.values()) <= {1}


# ── What is tried again: failures that nothing below has retried ───


def counted(error: Callable[[], BaseException], times: int = 99) -> tuple[Ask, list[int]]:
    """A function that fails so often before it answers, and a list with an item for each run."""
    runs = list[int]()

    async def classify(text: str = "") -> str:
        runs.append(1)
        if len(runs) <= times:
            raise error()
        return "right"

    return classify, runs


def test_an_error_that_is_raised_again_later_is_tried_anew(run: Run) -> None:
    error = ConnectionError("always the same object")
    classify, runs = counted(lambda: error)
    for count in (3, 6):
        assert failing(run, retry(classify)) is error
        assert len(runs) == count


class OddError(Exception):
    """An error as other clients raise it."""

    def __init__(self, status: int, *, nested: bool) -> None:
        super().__init__(f"status {status}")
        if nested:
            self.response = httpx.Response(status)
        else:
            self.status_code = status


@pytest.mark.parametrize(
    "error",
    [ConnectionError, ConnectionResetError, TimeoutError, functools.partial(httpx.ReadError, "cut"),
     functools.partial(httpx.ConnectTimeout, "late"),
     functools.partial(CallError, "a caller's own", transient=True)],
)  # fmt: skip
def test_a_transient_error_of_the_function_s_own_runs_it_again(run: Run, error: Any) -> None:
    classify, runs = counted(error, times=2)
    assert ember.transient(error())
    assert run(retry(classify)) == "right"
    assert len(runs) == 3


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("status", "again"),
    [(408, True), (409, True), (429, True), (500, True), (503, True), (529, True), (599, True),
     (400, False), (401, False), (403, False), (404, False), (422, False), (302, False)],
)  # fmt: skip
def test_a_status_in_a_foreign_error_says_if_it_is_transient(
    run: Run, status: int, again: bool, nested: bool
) -> None:
    classify, runs = counted(functools.partial(OddError, status, nested=nested))
    assert ember.transient(OddError(status, nested=nested)) is again
    assert isinstance(failing(run, retry(classify)), OddError)
    assert len(runs) == (3 if again else 1)


@pytest.mark.parametrize("error", [ValueError, KeyError, ZeroDivisionError, OSError, TypeError])
def test_any_other_error_is_raised_at_once(run: Run, error: Any) -> None:
    classify, runs = counted(error)
    assert not ember.transient(error())
    assert isinstance(failing(run, retry(classify)), error)
    assert len(runs) == 1


def test_the_last_error_is_raised_itself(run: Run) -> None:
    errors = [ConnectionError(str(number)) for number in range(3)]
    left = iter(errors)
    classify, _ = counted(lambda: next(left))
    assert failing(run, retry(classify)) is errors[-1]


@pytest.mark.parametrize(
    ("on", "runs_of"),
    [
        (ValueError, {ValueError: 3, UnicodeError: 3, ConnectionError: 1, KeyError: 1}),
        ((ValueError, LookupError), {ValueError: 3, KeyError: 3, ConnectionError: 1}),
        (lambda error: "again" in str(error), {ValueError: 3, KeyError: 3, ConnectionError: 3}),
        (lambda error: False, {ValueError: 1, ConnectionError: 1}),
        (Exception, {ValueError: 3, ConnectionError: 3}),
    ],
    ids=["class", "tuple", "predicate", "never", "Exception"],
)
def test_on_is_a_class_a_tuple_or_a_predicate(run: Run, on: Any, runs_of: dict[Any, int]) -> None:
    for kind, count in runs_of.items():
        classify, runs = counted(functools.partial(kind, "again"))
        assert isinstance(failing(run, retry(on=on)(classify)), kind)
        assert len(runs) == count, kind


async def as_cause(call: Ask) -> None:
    """Raises from the failure."""
    try:
        await call("hi")
    except Exception as error:
        raise RuntimeError("no luck") from error


async def as_context(call: Ask) -> None:
    """Raises a transient error while it handles the failure."""
    try:
        await call("hi")
    except Exception:
        raise ConnectionError("no luck")  # noqa: B904


async def from_none(call: Ask) -> None:
    """Hides the failure."""
    try:
        await call("hi")
    except Exception:
        raise ConnectionError("no luck") from None


async def deep_cause(call: Ask) -> None:
    """Raises from what was raised from the failure."""
    try:
        await as_cause(call)
    except RuntimeError as error:
        raise TimeoutError("no luck") from error


async def in_a_group(call: Ask) -> None:
    """Raises a group that holds the failure."""
    async with anyio.create_task_group() as group:
        group.start_soon(call, "hi")


async def plainly(call: Ask) -> None:
    """Lets the failure through."""
    await call("hi")


async def cause_of_one(_: str, call: Ask) -> None:
    """Like as_cause, with the text first."""
    await as_cause(call)


async def in_nested_groups(call: Ask) -> None:
    """Raises a group within a group, which holds an error raised from the failure."""

    async def inner() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(cause_of_one, "hi", call)

    async with anyio.create_task_group() as group:
        group.start_soon(inner)


WRAPPED = [plainly, as_cause, as_context, from_none, deep_cause, in_a_group, in_nested_groups]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_failure_that_a_model_has_retried_is_not_retried_by_a_function_above(
    server: Server, connect: Connect, run: Run, wrapped: Any
) -> None:
    server.play(BUSY)
    ask = connect(OPENAI)

    @retry(on=lambda error: True)
    async def outer() -> None:
        await wrapped(ask)

    failing(run, outer)
    assert len(server.requests) == 3


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_failure_that_a_retry_has_given_up_is_not_retried_by_one_above(
    run: Run, wrapped: Any
) -> None:
    classify, runs = counted(ConnectionError)
    inner = retry(classify)

    @retry(on=lambda error: True)
    async def outer() -> None:
        await wrapped(inner)

    failing(run, outer)
    assert len(runs) == 3


def test_a_failure_that_the_retry_below_let_through_is_retried(run: Run) -> None:
    classify, runs = counted(ConnectionError)
    failing(run, retry(retry(classify, on=ValueError)))
    assert len(runs) == 3


def test_a_failure_that_was_handled_does_not_keep_another_from_being_retried(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(BUSY)
    ask, runs = connect(OPENAI), list[int]()

    @retry(max_attempts=2)
    async def classify() -> str:
        runs.append(1)
        try:
            return (await ask("hi")).text
        except CallError:
            text = "unknown"
        if len(runs) < 2:
            raise ConnectionError("something else")
        return text

    assert run(classify) == "unknown"
    assert len(runs) == 2


# ── Waits ───


STRATEGIES = [
    waits.wait_none(),
    waits.wait_fixed(0.001),
    waits.wait_random(0, 0.001),
    waits.wait_incrementing(0, 0.001),
    waits.wait_exponential(multiplier=0.001, max=0.002),
    waits.wait_random_exponential(multiplier=0.001, max=0.002),
    waits.wait_exponential_jitter(max=0.002, jitter=0.001),
    waits.wait_exception(lambda error: 0.001 * bool(str(error))),
    waits.wait_chain(waits.wait_fixed(0.001), waits.wait_none()),
    waits.wait_fixed(0.001) + waits.wait_random(0, 0.001),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda wait: type(wait).__name__)
def test_tenacity_s_strategies_wait_between_requests_and_between_runs(
    server: Server, connect: Connect, run: Run, strategy: Any
) -> None:
    server.play(BUSY, BUSY, OPENAI.good("right"))
    assert run(functools.partial(retry(connect(OPENAI), wait=strategy), "hi")).text == "right"
    assert len(server.requests) == 3
    classify, runs = counted(ConnectionError, times=2)
    assert run(retry(classify, wait=strategy)) == "right"
    assert len(runs) == 3


class Noted(waits.wait_base):
    """A strategy that keeps what it was given."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = itertools.cycle(seconds or [0])
        self.seen = list[tuple[int, BaseException | None]]()

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        assert isinstance(retry_state, tenacity.RetryCallState)
        assert retry_state.outcome is not None
        assert retry_state.seconds_since_start is not None
        self.seen.append((retry_state.attempt_number, retry_state.outcome.exception()))
        return next(self.seconds)


def test_a_strategy_sees_the_number_and_the_error_of_each_failed_run(run: Run) -> None:
    errors = [ConnectionError(str(number)) for number in range(4)]
    left, noted = iter(errors), Noted()
    classify, _ = counted(lambda: next(left))
    failing(run, retry(classify, max_attempts=4, wait=noted))
    assert noted.seen[:3] == [(n, errors[n - 1]) for n in (1, 2, 3)]


def test_a_strategy_sees_the_number_and_the_error_of_each_failed_request(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(BUSY)
    noted = Noted()
    failing(run, functools.partial(retry(connect(OPENAI), max_attempts=4, wait=noted), "hi"))
    assert [number for number, _ in noted.seen] == [1, 2, 3]
    assert {type(error) for _, error in noted.seen} == {CallError}


@pytest.mark.parametrize(("asked", "own", "waited"), [(7, 2, 7), (2, 7, 7), (3, 3, 3)])
def test_the_longer_of_retry_after_and_the_strategy_wins(
    server: Server, connect: Connect, run: Run, sleeps: list[float],
    asked: int, own: int, waited: int,
) -> None:  # fmt: skip
    busy = Answer(OPENAI.problem("x"), 429, headers={"retry-after": str(asked)})
    server.play(busy, OPENAI.good("right"))
    ask = retry(connect(OPENAI), wait=waits.wait_fixed(own))
    assert run(functools.partial(ask, "hi")).text == "right"
    assert sum(sleeps) == pytest.approx(waited)
    sleeps.clear()
    error = functools.partial(CallError, "own", transient=True, retry_after=float(asked))
    classify, _ = counted(error, times=1)
    assert run(retry(classify, wait=waits.wait_fixed(own))) == "right"
    assert sum(sleeps) == pytest.approx(waited)


def test_without_a_strategy_the_server_s_wait_is_kept(
    server: Server, connect: Connect, run: Run, sleeps: list[float]
) -> None:
    server.play(Answer(OPENAI.problem("x"), 429, headers={"retry-after": "7"}), OPENAI.good())
    run(functools.partial(retry(connect(OPENAI)), "hi"))
    assert sum(sleeps) == pytest.approx(7)


def test_without_a_strategy_waits_grow_with_full_jitter(
    run: Run, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    classify, _ = counted(ConnectionError)
    failing(run, retry(classify, max_attempts=9))
    assert len(sleeps) == 8
    assert sleeps == sorted(sleeps)
    assert 0 < sleeps[0] < sleeps[3] <= sleeps[-1] < 60


# ── The deadline ───


def test_the_deadline_cuts_a_hanging_run(run: Run) -> None:
    @retry(timeout=0.03)
    async def classify(text: str) -> str:
        await anyio.sleep_forever()
        return text

    error = failing(run, functools.partial(classify, "hi"))
    assert isinstance(error, CallError)
    assert not error.transient
    assert str(error).startswith("classify: no result within timeout=0.03 s")


def test_the_deadline_cuts_a_hanging_request_and_closes_its_connection(
    server: Server, connect: Connect, run: Run, shape: Any
) -> None:
    server.play(OPENAI.good(fault="hang"))
    classify = shape(connect(OPENAI), retry(timeout=0.05))

    async def main() -> None:
        with anyio.fail_after(15), pytest.raises(CallError, match=r"timeout=0\.05 s") as caught:
            await classify("hi")
        assert not caught.value.transient
        await until(lambda: server.open == 0)

    run(main)
    assert len(server.requests) <= 1


def test_the_deadline_covers_a_second_run_that_hangs(run: Run) -> None:
    runs = list[int]()

    @retry(timeout=0.05)
    async def classify() -> str:
        runs.append(1)
        if len(runs) > 1:
            await anyio.sleep_forever()
        raise ConnectionError

    error = failing(run, classify)
    assert isinstance(error, CallError)
    assert "no result within timeout=0.05 s" in str(error)
    assert len(runs) == 2


def test_a_wait_that_would_pass_the_deadline_raises_the_last_error_at_once(
    run: Run, sleeps: list[float]
) -> None:
    classify, runs = counted(functools.partial(ConnectionError, "the last"))
    error = failing(run, retry(classify, timeout=5, wait=waits.wait_fixed(10)))
    assert isinstance(error, ConnectionError)
    assert (len(runs), sleeps) == (1, [])


@pytest.mark.parametrize("wait", [None, waits.wait_fixed(0)])
def test_a_server_s_wait_that_would_pass_the_deadline_raises_at_once_with_its_figure(
    server: Server, connect: Connect, run: Run, sleeps: list[float], wait: Any
) -> None:
    server.play(Answer(OPENAI.problem("x"), 429, headers={"retry-after": "100"}))
    error = failing(run, functools.partial(retry(connect(OPENAI), timeout=5, wait=wait), "hi"))
    assert isinstance(error, CallError)
    assert error.status == 429
    assert "100 s" in str(error)
    assert (len(server.requests), sleeps) == (1, [])


def test_the_deadline_covers_the_waits_between_requests(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(BUSY)
    patient = retry(max_attempts=1000, timeout=0.1, wait=waits.wait_fixed(0.03))
    error = failing(run, functools.partial(patient(connect(OPENAI)), "hi"))
    assert isinstance(error, CallError)
    assert len(server.requests) <= 4


def test_the_deadline_covers_the_waits_between_runs(run: Run) -> None:
    classify, runs = counted(ConnectionError)
    patient = retry(max_attempts=1000, timeout=0.1, wait=waits.wait_fixed(0.03))
    assert isinstance(failing(run, patient(classify)), ConnectionError | CallError)
    assert 1 <= len(runs) <= 4


def test_an_outer_retry_does_not_run_a_function_again_that_was_out_of_time(run: Run) -> None:
    runs = list[int]()

    @retry
    @retry(timeout=0.02)
    async def classify() -> None:
        runs.append(1)
        await anyio.sleep_forever()

    assert isinstance(failing(run, classify), CallError)
    assert len(runs) == 1


def test_a_timeout_of_the_function_s_own_is_an_error_like_others(run: Run) -> None:
    runs = list[int]()

    @retry
    async def classify() -> None:
        runs.append(1)
        with anyio.fail_after(0.002):
            await anyio.sleep_forever()

    assert type(failing(run, classify)) is TimeoutError
    assert len(runs) == 3


# ── Cancellation ───


@pytest.mark.parametrize("on", [ember.transient, BaseException, lambda error: True])
def test_a_cancelled_call_is_not_run_again(run: Run, on: Any) -> None:
    runs = list[int]()

    @retry(on=on)
    async def classify() -> None:
        runs.append(1)
        await anyio.sleep_forever()

    async def main() -> None:
        with anyio.move_on_after(0.01) as scope:
            await classify()
        assert scope.cancelled_caught
        for _ in range(5):
            await anyio.lowlevel.checkpoint()

    run(main)
    assert len(runs) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_tried_again(error: Any) -> None:
    classify, runs = counted(error)
    with pytest.raises(error):
        retry(classify, on=Exception)("hi").send(None)
    assert len(runs) == 1


def test_a_call_that_is_cancelled_while_it_waits_sends_nothing_more(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(BUSY)
    ask = retry(connect(OPENAI), wait=waits.wait_fixed(10))

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(ask, "hi")
            await until(lambda: len(server.requests) == 1)
            await anyio.sleep(0.01)
            group.cancel_scope.cancel()

    run(main)
    assert len(server.requests) == 1


# ── Wrong calls, and what is kept of a function ───

WRONG_CALLS = [
    ((), {}, "missing 1 required positional argument: 'text'"),
    (("a", "b"), {}, "takes 1 positional argument but 2 were given"),
    (("a",), {"nope": 1}, "got an unexpected keyword argument 'nope'"),
]
DECORATORS: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "retry": lambda: retry,
    "retry()": lambda: retry(max_attempts=3, on=Exception),
    "cache": lambda: cache,
    "cache()": lambda: cache(ttl=60),
    "batch()": lambda: batch(size=10),
    "limit()": lambda: limit(concurrency=10),
}


@pytest.fixture(params=DECORATORS)
def decorate(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Each of the decorators, bare and with arguments."""
    return DECORATORS[request.param]()


@pytest.mark.parametrize(("args", "kwargs", "said"), WRONG_CALLS)
def test_a_wrong_call_is_the_native_type_error_when_awaited_and_runs_nothing(
    run: Run, decorate: Any, args: Any, kwargs: Any, said: str
) -> None:
    runs = list[int]()

    @decorate
    async def classify(text: str) -> str:
        runs.append(1)
        return text

    async def main() -> None:
        call = classify(*args, **kwargs)
        with pytest.raises(TypeError) as caught:
            await call
        assert str(caught.value).endswith(f"classify() {said}")

    run(main)
    assert runs == []


def test_a_wrong_call_of_a_decorated_model_sends_nothing(
    server: Server, connect: Connect, run: Run, decorate: Any
) -> None:
    ask = decorate(connect(OPENAI))
    error = failing(run, ask)
    assert type(error) is TypeError
    assert "missing 1 required positional argument: 'prompt'" in str(error)
    assert server.requests == []


def test_a_wrong_call_of_a_decorated_method_names_it(run: Run, decorate: Any) -> None:
    class Classifier:
        @decorate
        async def classify(self, text: str) -> str:
            return text

    error = failing(run, functools.partial(Classifier().classify, "a", "b"))
    assert type(error) is TypeError
    assert "Classifier.classify() takes 2 positional arguments but 3 were given" in str(error)


def test_a_decorated_function_is_a_coroutine_function_with_its_own_signature(
    decorate: Any, connect: Connect, server: Server
) -> None:
    async def classify(text: str, *, n: int = 3) -> list[str]:
        """The classes of a text."""
        return [text] * n

    class Classifier:
        method = decorate(classify)

    wrapped = decorate(classify)
    assert inspect.iscoroutinefunction(wrapped)
    assert inspect.iscoroutinefunction(Classifier().method)
    assert inspect.iscoroutinefunction(decorate(connect(OPENAI)))
    assert inspect.signature(wrapped) == inspect.signature(classify)
    assert (wrapped.__name__, wrapped.__doc__) == (classify.__name__, classify.__doc__)
    assert wrapped.__qualname__ == classify.__qualname__
    assert wrapped.__module__ == __name__
    assert vars(wrapped).keys() <= {"__wrapped__"}


def test_a_decorated_function_works_as_a_class_method_and_a_static_method(
    run: Run, decorate: Any
) -> None:
    class Classifier:
        @classmethod
        @decorate
        async def on_the_class(cls, text: str) -> str:
            return cls.__name__ + text

        @staticmethod
        @decorate
        async def on_nothing(text: str) -> str:
            return text

    async def main() -> tuple[str, ...]:
        return await Classifier.on_the_class("a"), await Classifier().on_nothing("b")

    assert run(main) == ("Classifiera", "b")


@pytest.mark.parametrize("what", [len, 3, "classify", None.__class__])
def test_what_is_no_async_function_is_refused_when_decorated(decorate: Any, what: Any) -> None:
    with pytest.raises((TypeError, SetupError), match="async"):
        decorate(what)


@pytest.mark.parametrize(
    "options",
    [{"max_attempts": 0}, {"max_attempts": -1}, {"max_attempts": "3"}, {"max_attempts": 2.5},
     {"timeout": -1}, {"timeout": "1"}, {"on": 3}, {"on": "ValueError"}, {"on": (ValueError, 3)},
     {"wait": 3}, {"wait": "long"}],
    ids=str,
)  # fmt: skip
def test_a_wrong_option_is_a_setup_error_that_names_it(options: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match=next(iter(options))):
        retry(counted(ValueError)[0], **options)


# ── Tracebacks ───


def shown(error: BaseException) -> str:
    """The traceback as it is printed."""
    return "".join(traceback.format_exception(error))


def test_a_traceback_has_at_most_two_frames_of_ember(run: Run, decorate: Any) -> None:
    @decorate
    async def classify(text: str) -> str:
        return text + str(1 / 0)

    error = failing(run, functools.partial(classify, "hi"))
    assert isinstance(error, ZeroDivisionError)
    assert shown(error).count(ember.__file__) <= 2
    assert "str(1 / 0)" in shown(error)


def test_a_traceback_of_a_model_has_at_most_two_frames_of_ember(
    server: Server, connect: Connect, run: Run, decorate: Any, shape: Any
) -> None:
    server.play(Answer(OPENAI.problem("invalid_request_error"), status=400))
    if shape is decorated_method:
        pytest.skip("its object has no canonical form for a key")
    error = failing(run, functools.partial(shape(connect(OPENAI), decorate), "hi"))
    assert isinstance(error, CallError)
    assert shown(error).count(ember.__file__) <= 2


# ── Stacks ───

ORDERS = list(itertools.permutations(["retry", "cache", "batch", "limit"]))


@pytest.fixture(params=ORDERS, ids=" ".join)
def stack(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """All four, in each order."""

    def stack(fn: Any) -> Any:
        made = {
            "retry": retry(max_attempts=3),
            "cache": cache(store={}),
            "batch": batch(size=10),
            "limit": limit(concurrency=10),
        }
        return functools.reduce(lambda inner, name: made[name](inner), request.param, fn)

    return stack


def test_four_decorators_in_any_order_answer_once_for_equal_calls(
    server: Server, connect: Connect, run: Run, stack: Any
) -> None:
    server.play(lambda seen: OPENAI.good(f"right {prompt_of(seen)}"))
    classify = decorated_function(connect(OPENAI), stack)
    assert inspect.iscoroutinefunction(classify)

    async def main() -> None:
        answers = await ember.gather(*(classify(str(n % 4)) for n in range(40)))
        assert answers == [f"right {n % 4}" for n in range(40)]
        assert await classify("0") == "right 0"

    run(main)
    assert Counter(map(prompt_of, server.requests)) == dict.fromkeys("0123", 1)


def test_four_decorators_in_any_order_send_three_to_a_server_that_always_fails(
    server: Server, connect: Connect, run: Run, stack: Any
) -> None:
    server.play(BUSY)
    error = failing(run, functools.partial(decorated_function(connect(OPENAI), stack), "hi"))
    assert isinstance(error, CallError)
    assert error.attempts == len(server.requests) == 3
    assert shown(error).count(ember.__file__) <= 2


def test_four_decorators_in_any_order_refuse_a_wrong_call_before_anything_is_sent(
    server: Server, connect: Connect, run: Run, stack: Any
) -> None:
    classify = decorated_function(connect(OPENAI), stack)
    error = failing(run, functools.partial(classify, "a", "b"))
    assert type(error) is TypeError
    assert str(error).endswith("classify() takes 1 positional argument but 2 were given")
    assert server.requests == []


def test_four_decorators_in_any_order_on_a_model(
    server: Server, connect: Connect, run: Run, stack: Any
) -> None:
    server.play(BUSY, OPENAI.good("right"))
    ask = stack(connect(OPENAI))

    async def main() -> list[str]:
        return [(await ask("hi", temperature=0)).text for _ in range(2)]

    assert run(main) == ["right", "right"]
    assert len(server.requests) == 2


# ── Ledger ───


def test_the_ledger_counts_each_attempt_under_the_function_s_name(
    server: Server, connect: Connect, run: Run
) -> None:
    server.play(BUSY, BUSY, OPENAI.good("right"))
    classify = decorated_function(connect(OPENAI), retry)

    async def main() -> Any:
        with ember.track() as ledger:
            assert await classify("hi") == "right"
        return ledger

    ledger = run(main)
    assert (ledger.requests, ledger.failures) == (3, 2)
    assert ledger.by_function["classify"].requests == 3
    assert [attempt.function for attempt in ledger.calls] == ["classify"] * 3
    assert ledger.calls[-1].outcome == "ok"
