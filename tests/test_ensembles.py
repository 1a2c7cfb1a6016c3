"""Votes and ensembles: several answers, one of them, and the first page of the design."""

import asyncio
import decimal
import enum
import functools
import inspect
import itertools
import math
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import pydantic
import pytest
from conftest import Connect
from hypothesis import given, settings
from hypothesis import strategies as st
from server import WIRES, Answer, Server, until
from test_concurrency import Watch, on_both
from test_judges import Judge, all_alike

import ember
from ember import (
    Reply,
    batch,
    best_of,
    budget,
    cache,
    cascade,
    consensus,
    ensemble,
    fallback,
    graph,
    judge,
    limit,
    majority_vote,
    refine,
    retry,
    sync,
    synthesize,
    track,
    verify,
)

OPENAI = WIRES["openai"]
often = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A directory for each test."""
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))


# ── Votes ───


class Colour(enum.Enum):
    """An answer that is one of few."""

    RED = 1
    BLUE = 2


@dataclass
class City:
    """An answer that cannot be hashed."""

    name: str


@dataclass(frozen=True)
class Route:
    """An answer that is frozen, and yet cannot be hashed."""

    stops: list[str]


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["Paris.", " paris", "Rome"], 0),
        (["Rome", "Paris.", " paris", "PARIS"], 1),
        (["Rome", "Paris"], 0),  # of equally many the first
        (["one", "42", "42.0", 42], 1),
        ([1, 2, 2.0, 3], 1),
        ([True, 1, 1], 1),
        ([Colour.RED, Colour.BLUE, Colour.BLUE], 1),
        ([City("Oslo"), City("Rome"), City("Rome")], 1),
        ([["a"], ["b"], ["b"]], 1),
        ([("a", ["x"]), ("b", []), ("b", [])], 1),
        ([Reply("x", "x"), Reply("Y.", "Y."), Reply("y", "y")], 1),
        ([Reply("", 3), Reply("", 4), Reply("", 4)], 1),
        (["nan", "nan", "inf"], 0),
        ([float("nan"), "nan", "inf"], 0),
        (["9" * 400, "x", "9" * 400], 0),
        ([None, None, "x"], 0),
        (["", "  ", "x"], 0),
        ([Route(["a"]), Route(["b"]), Route(["b"])], 1),
        ([{"a": 1}, {"b": 1}, {"b": 1}], 1),
        ([{"a"}, {"b"}, {"b"}], 1),
        ([Reply("", Route(["a"])), Reply("", Route(["b"])), Reply("", Route(["b"]))], 1),
        ([True, 1, True, 1, 1], 1),
        (["x", "42", "42.0"], 1),
        (["x", " 42. ", 42], 1),
        (["x", 42, decimal.Decimal("42.00")], 1),
        (["x", "1e3", "1000", 1000.0], 1),
        (["x", "-3", -3], 1),
        (["x", "0.1", 0.1, decimal.Decimal("0.1")], 1),
        ([2**53, 2**53 + 1, 2**53 + 1], 1),
        (["12345678901234567890", "12345678901234567891", "12345678901234567891"], 1),
        (["0.10000000000000000001", "0.1", "0.1"], 1),
        ([10**5000, 10**5000 + 1, 10**5000 + 1], 1),
        (["1e999999999", "x", "1e999999999"], 0),
        (["STRASSE", "straße", "x"], 0),
        (["new\n york", "New York!", "x"], 0),
        (["x", ["a", "b"], ["b", "a"], ["b", "a"]], 2),
    ],
)
def test_the_answer_that_most_agree_on_wins(answers: list[Any], winner: int) -> None:
    for _ in range(3):
        assert majority_vote(iter(answers)) is answers[winner]


def test_a_key_says_which_answers_agree() -> None:
    assert majority_vote(["aa", "b", "c"], key=len) == "b"
    assert majority_vote(["x", {"a": 1}, {"a": 1}], key=lambda answer: answer) == {"a": 1}


def test_a_vote_without_answers_is_refused() -> None:
    with pytest.raises(ember.SetupError, match=r"majority_vote\(\) got no answers"):
        majority_vote([])


def groups(answers: list[Any]) -> list[list[Any]]:
    """The answers that agree, in the order in which they first came."""
    found: list[list[Any]] = []
    for answer in answers:
        value = str(answer).strip().lower().removesuffix(".0")
        same = next((one for one in found if one[0] == value), None)
        if same is None:
            found.append(same := [value])
        same.append(answer)
    return [one[1:] for one in found]


@pytest.mark.parametrize(
    "answers", [["a", "A", "b"], ["a", "A", "b", "B", "c"], [1, "1", "1.0", 2, "2", "x"]]
)
def test_only_ties_depend_on_the_order(answers: list[Any]) -> None:
    for order in itertools.permutations(answers):
        alike = groups([*order])
        most = max(map(len, alike))
        winner = next(one[0] for one in alike if len(one) == most)
        assert majority_vote(order) is winner


SCALARS = st.one_of(
    st.sampled_from(["a", "A ", "b", "42", "42.0", 42, 42.0, True, None, "nan", ""]),
    st.text(max_size=3),
    st.integers(),
    st.floats(),
    st.decimals(allow_nan=False),
)
ANSWERS = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2), max_leaves=3)


@often
@given(st.lists(ANSWERS, max_size=6), ANSWERS, st.randoms(use_true_random=False))
def test_a_strict_majority_wins_in_any_order(others: list[Any], winner: Any, dice: Any) -> None:
    answers = [*others, *[winner] * (len(others) + 1)]
    dice.shuffle(answers)
    assert majority_vote([majority_vote(answers), winner, winner]) is majority_vote(answers)
    assert majority_vote(answers) in (winner, *others)


@often
@given(st.lists(ANSWERS, min_size=1, max_size=8))
def test_the_winner_is_one_of_the_answers_and_stays_it(answers: list[Any]) -> None:
    winner = majority_vote(answers)
    assert any(winner is answer for answer in answers)
    assert majority_vote([winner]) is winner
    assert majority_vote([winner, *answers]) is winner
    assert majority_vote([*answers, winner]) is winner
    assert majority_vote([*answers, *answers]) is winner


# ── All of them, by themselves and within each other ───


async def pleased(question: str, answer: Any) -> bool:
    """A critic that asks for no change."""
    return True


def one(answer: Any) -> float:
    return 1.0


@dataclass(frozen=True)
class Case:
    """How a function is made of another, how it is called, and what is to be seen."""

    make: Callable[[Any], Any]
    args: tuple[Any, ...] = ("hi",)
    asks: int = 1  # so many calls of the other function
    text: Callable[[Any], str] = str  # of the result: "right"
    first: int = 1  # so many calls are under way at first


def alike(answers: list[Any]) -> str:
    """The text that all answers have."""
    assert len(answers) == 4
    assert len({*map(str, answers)}) == 1
    return str(answers[0])


CASES = {
    "ensemble": Case(lambda f: ensemble(f, f, n=2), asks=4, text=alike, first=4),
    "consensus": Case(
        lambda f: consensus(f, n=3, key=str), asks=2, text=lambda one: str(one.answer), first=2
    ),
    "best_of": Case(lambda f: best_of(f, 2, one), asks=2, first=2),
    "cascade": Case(lambda f: cascade(f, f, accept=one)),
    "refine": Case(lambda f: refine(f, pleased)),
    "synthesize": Case(synthesize, ("hi", ["a", "b"])),
    "judge": Case(judge, ("hi", ["right", "b"]), text=lambda verdict: verdict.answer),
    "verify": Case(verify, ("hi", "right"), text=lambda result: result.answer),
}
LIKE_THE_FIRST = ["ensemble", "consensus", "best_of", "cascade"]  # their signature
each = pytest.mark.parametrize("name", CASES)

Asked = tuple[Any, Callable[[], int]]  # a function, and how often it was called


class Caller:
    """An object that is called as an async function."""

    def __init__(self, ask: Any) -> None:
        self.ask = ask

    async def __call__(self, prompt: str) -> str:
        return await self.ask(prompt)


@pytest.fixture(params=["function", "method", "partial", "object", "model", "decorated model"])
def asked(request: pytest.FixtureRequest) -> Asked:
    """What may stand where a model stands."""
    maker = Judge(all_alike)

    async def ask(prompt: str) -> str:
        return await maker.ask(prompt)

    def model() -> ember.Model:
        request.getfixturevalue("server").play(maker.answer)
        made: ember.Model = request.getfixturevalue("connect")(OPENAI, price=(1, 1))
        return made

    kinds: dict[str, Callable[[], Any]] = {
        "function": lambda: ask,
        "method": lambda: maker.ask,
        "partial": lambda: functools.partial(ask),
        "object": lambda: Caller(ask),
        "model": model,
        "decorated model": lambda: retry(cache(model())),
    }
    return kinds[request.param](), lambda: len(maker.prompts)


@each
async def test_it_is_made_of_any_async_function(asked: Asked, name: str) -> None:
    (fn, count), case = asked, CASES[name]
    ask = case.make(fn)
    assert inspect.iscoroutinefunction(ask)
    assert case.text(await ask(*case.args)) == "right"
    assert count() == case.asks


def in_graph(fn: Any) -> Any:
    """The function as the node of a graph."""

    async def ask(*args: Any) -> Any:
        inputs = [f"input_{place}" for place in range(len(args))]
        return (await graph(node=(fn, *inputs))(*args))["node"]

    return ask


def within(block: Callable[[], Any]) -> Callable[[Any], Any]:
    """A wrapper that calls the function in a `with` block."""

    def wrap(fn: Any) -> Any:
        async def ask(*args: Any) -> Any:
            with block() as ledger:
                result = await fn(*args)
            assert ledger.uncertain == 0
            return result

        return ask

    return wrap


def one_place(fn: Any) -> Any:
    """The function under a limit of its own: one serves one event loop."""
    return limit(concurrency=1)(fn)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "retry": retry,
    "cache": cache,
    "batch": batch(size=10),
    "limit": one_place,
    "fallback": fallback,
    "graph": in_graph,
    "track": within(track),
    "budget": within(lambda: budget(usd=1)),
}


@pytest.mark.parametrize("asked", ["function", "model"], indirect=True)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@each
async def test_it_goes_inside_and_around_all_decorators(
    asked: Asked, name: str, wrapper: str, inside: bool
) -> None:
    (fn, count), case, wrap = asked, CASES[name], WRAPPERS[wrapper]
    if wrapper == "cache" and not hasattr(fn, "provider"):
        wrap = cache(key=lambda *args: repr(args))
    ask = case.make(wrap(fn)) if inside else wrap(case.make(fn))
    with anyio.fail_after(5):
        for times in (1, 1 if wrapper == "cache" else 2):
            assert case.text(await ask(*case.args)) == "right"
            assert count() == case.asks * times


def inmost(result: Any) -> str:
    """The text that all answers in a result have."""
    texts = {inmost(one) for one in result} if isinstance(result, list) else set[str]()
    if hasattr(result, "counts"):
        return inmost(result.answer)
    return texts.pop() if len(texts) == 1 else str(result)


@pytest.mark.parametrize("inner", [*LIKE_THE_FIRST, "refine"])
@pytest.mark.parametrize("outer", [*LIKE_THE_FIRST, "refine", "synthesize"])
async def test_they_go_within_each_other(outer: str, inner: str) -> None:
    maker, (outside, inside) = Judge(), (CASES[outer], CASES[inner])
    result = await outside.make(inside.make(maker.ask))(*outside.args)
    assert inmost(result) == "right"
    assert len(maker.prompts) == outside.asks * inside.asks


@pytest.mark.parametrize("inner", ["best_of", "cascade", "refine"])
@pytest.mark.parametrize("outer", ["judge", "verify"])
async def test_judges_are_made_of_them(asked: Asked, outer: str, inner: str) -> None:
    (fn, count), outside, inside = asked, CASES[outer], CASES[inner]
    assert outside.text(await outside.make(inside.make(fn))(*outside.args)) == "right"
    assert count() == outside.asks * inside.asks


@pytest.mark.parametrize("inner", ["ensemble", "consensus"])
async def test_many_answers_are_no_verdict(inner: str) -> None:
    with pytest.raises(ember.ReplyError):
        await judge(CASES[inner].make(Judge().ask))("hi", ["a", "b"])


@on_both
@each
async def test_it_works_on_both_event_loops(server: Server, connect: Connect, name: str) -> None:
    server.play(Judge(all_alike).answer)
    case = CASES[name]
    assert case.text(await case.make(connect(OPENAI))(*case.args)) == "right"
    assert len(server.requests) == case.asks


@pytest.mark.parametrize("name", LIKE_THE_FIRST)
async def test_it_is_a_method_where_its_function_is_one(name: str) -> None:
    class Bot:
        async def ask(self, prompt: str) -> str:
            return self.word

        word = "right"
        many = CASES[name].make(ask)

    assert CASES[name].text(await Bot().many("hi")) == "right"


@each
def test_it_runs_in_a_script(name: str) -> None:
    case = CASES[name]
    assert case.text(sync(case.make(Judge(all_alike).ask))(*case.args)) == "right"


@each
async def test_a_cached_one_gives_equal_results(
    server: Server, connect: Connect, name: str
) -> None:
    server.play(Judge(all_alike).answer)
    case, model = CASES[name], connect(OPENAI)
    ask = cache(case.make(model))
    first, second = [await ask(*case.args) for _ in range(2)]
    assert type(first) is type(second)
    assert case.text(first) == case.text(second) == "right"
    assert len(server.requests) == case.asks


def hanging(watch: Watch) -> Any:
    """An async function that never ends."""

    async def hang(prompt: str) -> str:
        with watch(prompt):
            await anyio.sleep_forever()
        return ""

    return hang


@on_both
@each
async def test_the_caller_cancels_all_calls(name: str) -> None:
    watch, case = Watch(), CASES[name]
    async with anyio.create_task_group() as group:
        group.start_soon(case.make(hanging(watch)), *case.args)
        await until(lambda: watch.now == case.first)
        group.cancel_scope.cancel()
    assert len(watch.begun) == len(watch.ended) == case.first


@each
async def test_a_task_of_asyncio_that_is_cancelled_leaves_no_call(name: str) -> None:
    watch, case = Watch(), CASES[name]
    before = asyncio.all_tasks()
    task = asyncio.create_task(case.make(hanging(watch))(*case.args))
    await until(lambda: watch.now == case.first)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(watch.ended) == case.first
    assert asyncio.all_tasks() == before


@on_both
@each
async def test_what_is_cancelled_after_it_was_sent_is_uncertain(
    server: Server, connect: Connect, name: str
) -> None:
    case, hold = CASES[name], threading.Event()
    server.play(OPENAI.good(hold=hold))
    model = connect(OPENAI, price=(0, 1000)).using(max_tokens=1000)
    with track() as ledger:
        async with anyio.create_task_group() as group:
            group.start_soon(case.make(model), *case.args)
            await until(lambda: len(server.requests) == case.first)
            group.cancel_scope.cancel()
    hold.set()
    assert [call.outcome for call in ledger.calls] == ["cancelled"] * case.first
    assert ledger.uncertain == pytest.approx(case.first)


@each
async def test_a_wrong_call_is_pythons_own_error_before_anything_is_asked(name: str) -> None:
    case, maker = CASES[name], Judge()

    async def ask(prompt: str) -> str:
        return await maker.ask(prompt)

    who = "ask" if name in LIKE_THE_FIRST else name
    with pytest.raises(TypeError, match=rf"{who}\(\) missing \d required positional argument"):
        await case.make(ask)()
    with pytest.raises(TypeError, match=rf"{who}\(\) takes \d positional arguments? but 4 were"):
        await case.make(ask)(1, 2, 3, 4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'promt'"):
        await case.make(ask)(promt="hi")
    assert maker.prompts == []


@pytest.mark.parametrize("name", LIKE_THE_FIRST)
async def test_it_takes_what_the_first_function_takes(name: str) -> None:
    calls = list[Any]()

    async def ask(question: str, *more: int, style: str = "plain", **rest: Any) -> str:
        calls.append((question, more, style, rest))
        return "right"

    made = CASES[name].make(ask)
    assert inspect.signature(made).parameters == inspect.signature(ask).parameters
    await made("hi", 1, 2, style="short", seed=7)
    assert calls == [("hi", (1, 2), "short", {"seed": 7})] * CASES[name].asks


@each
def test_what_is_no_async_function_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}\(\) takes an async function, not "):
        CASES[name].make(len)


@pytest.mark.parametrize(
    "make", [ensemble, consensus, lambda: best_of(n=2, score=one), lambda: cascade(accept=one)]
)
def test_no_function_at_all_is_a_type_error(make: Any) -> None:
    with pytest.raises(TypeError):
        make()


@each
async def test_a_failure_is_raised_itself_with_two_frames_of_ember(name: str) -> None:
    async def ask(prompt: str) -> str:
        raise LookupError(prompt)

    case = CASES[name]
    with pytest.raises(LookupError) as caught:
        await case.make(ask)(*case.args)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert sum(frame.filename == ember.__file__ for frame in frames) <= 2
    assert frames[-1].name == "ask"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


async def ask(prompt: str) -> str:
    return "right"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ensemble(ask, n=0), r"ensemble: .*n=0 "),
        (lambda: ensemble(ask, n=1.5), r"ensemble: .*n=1\.5 "),
        (lambda: ensemble(ask, n="2"), r"ensemble: .*n='2' "),
        (lambda: ensemble(ask, quorum=0), r"ensemble: .*quorum=0 "),
        (lambda: ensemble(ask, quorum=2), r"ensemble: .*quorum=2 "),
        (lambda: ensemble(ask, ask, n=2, quorum=5), r"ensemble: .*quorum=5 "),
        (lambda: best_of(ask, 0, one), r"best_of: .*n=0 "),
        (lambda: best_of(ask, "2", one), r"best_of: .*n='2' "),
        (lambda: best_of(ask, 2, "one"), r"best_of: .*score='one' "),
        (lambda: cascade(ask, accept="one"), r"cascade: .*accept='one' "),
        (lambda: refine(ask, pleased, max_rounds=-1), r"refine: .*max_rounds=-1 "),
        (lambda: refine(ask, pleased, max_rounds="3"), r"refine: .*max_rounds='3' "),
        (lambda: refine(ask, pleased, until="ok"), r"refine: .*until='ok' "),
    ],
)
def test_a_wrong_option_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ember.SetupError, match=message):
        make()


@pytest.mark.parametrize("name", ["ensemble", "consensus", "best_of", "refine"])
async def test_a_whole_number_may_be_a_float(name: str) -> None:
    makes: dict[str, Any] = {
        "ensemble": lambda: ensemble(ask, n=2.0, quorum=2.0),
        "consensus": lambda: consensus(ask, n=2.0),
        "best_of": lambda: best_of(ask, 2.0, one),
        "refine": lambda: refine(ask, pleased, max_rounds=2.0),
    }
    result = await makes[name]()("hi")
    assert "right" in str(result)


# ── ensemble ───


def saying(*answers: Any, name: str = "say", calls: list[Any] | None = None) -> Any:
    """An async function that gives these answers in turn, or raises those that are errors."""
    left = iter(answers)

    async def say(prompt: str) -> Any:
        if calls is not None:
            calls.append((name, prompt))
        answer = next(left)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    say.__name__ = say.__qualname__ = name
    return say


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


@on_both
async def test_the_answers_come_in_the_order_of_the_functions_however_late() -> None:
    doors = [anyio.Event() for _ in range(4)]
    watch = Watch()

    def slow(name: str, first: int) -> Any:
        async def slow(prompt: str) -> str:
            number = watch.begun.count(name)
            with watch(name):
                await doors[first + number].wait()
            return f"{name}{number}"

        return slow

    async with anyio.create_task_group() as group:
        results = list[Any]()

        async def run() -> None:
            results.append(await ensemble(slow("f", 0), slow("g", 2), n=2)("hi"))

        group.start_soon(run)
        await until(lambda: watch.now == 4)  # all start at once
        for door in reversed(doors):
            door.set()
            await anyio.sleep(0.001)
    assert [answer[0] for answer in results[0]] == ["f", "f", "g", "g"]
    assert sorted(results[0]) == ["f0", "f1", "g0", "g1"]


@pytest.mark.parametrize("quorum", [1, 2, 3])
async def test_failures_are_left_out_while_the_quorum_can_be_reached(quorum: int) -> None:
    fns = [saying(one) for one in ("a", LookupError("b"), "c", ValueError("d"), "e")]
    assert await ensemble(*fns, quorum=quorum)("hi") == ["a", "c", "e"]


async def test_the_failure_that_broke_the_quorum_is_raised_with_notes_of_the_others() -> None:
    errors = [LookupError("b"), ValueError("c"), KeyError("d")]
    fns = [saying("a"), *(saying(e, name=f"f_{e.args[0]}") for e in errors)]
    with pytest.raises(KeyError) as caught:
        await ensemble(*fns, quorum=2)("hi")
    assert caught.value is errors[-1]
    assert len(caught.value.__notes__) == 2
    assert "f_b" in notes(caught.value)
    assert "LookupError: b" in notes(caught.value)
    assert "f_c" in notes(caught.value)
    assert "ValueError: c" in notes(caught.value)


async def test_a_single_failure_has_no_notes() -> None:
    with pytest.raises(LookupError) as caught:
        await ensemble(saying(LookupError("a")))("hi")
    assert notes(caught.value) == ""


def after(watch: Watch, hung: int, error: Exception) -> Any:
    """An async function that fails when so many others hang."""

    async def fail(prompt: str) -> str:
        await until(lambda: watch.now == hung)
        raise error

    return fail


@on_both
async def test_the_rest_is_cancelled_as_soon_as_the_quorum_is_out_of_reach() -> None:
    watch, error = Watch(), LookupError("away")
    hang = hanging(watch)
    with anyio.fail_after(5), pytest.raises(LookupError) as caught:
        await ensemble(hang, hang, after(watch, 2, error), quorum=3)("hi")
    assert caught.value is error
    assert len(watch.begun) == len(watch.ended) == 2


@on_both
async def test_a_setup_error_is_raised_at_once_and_the_rest_is_cancelled() -> None:
    watch, error = Watch(), ember.SetupError("no key")
    with anyio.fail_after(5), pytest.raises(ember.SetupError) as caught:
        await ensemble(saying("a"), hanging(watch), after(watch, 1, error))("hi")
    assert caught.value is error
    assert len(watch.begun) == len(watch.ended) == 1


@pytest.mark.parametrize("order", [*itertools.permutations(["a", "setup", "fault"])])
@pytest.mark.parametrize("many", [ensemble, lambda *fns: best_of(turns(*fns), 3, one)])
async def test_a_setup_error_is_raised_whatever_fails_beside_it(many: Any, order: Any) -> None:
    ends = {"a": "a", "setup": ember.SetupError("no key"), "fault": LookupError("away")}
    with pytest.raises(ember.SetupError, match="no key"):
        await many(*(saying(ends[one]) for one in order))("hi")


def turns(*fns: Any) -> Any:
    """An async function that calls these in turn."""
    left = iter(fns)

    async def turn(prompt: str) -> Any:
        return await next(left)(prompt)

    return turn


async def test_a_group_of_errors_is_raised_as_it_is() -> None:
    errors = ExceptionGroup("many", [LookupError("a"), ValueError("b")])
    with pytest.raises(ExceptionGroup) as caught:
        await ensemble(saying(errors))("hi")
    assert caught.value is errors


async def test_what_is_no_exception_of_the_program_ends_all() -> None:
    class Stop(BaseException):
        pass

    with pytest.raises(Stop):
        await ensemble(saying(Stop()), saying("a"))("hi")


@pytest.mark.parametrize(
    ("make", "samples"),
    [
        (lambda f: ensemble(f, n=3), 3),
        (lambda f: ensemble(f, f, n=2), 4),
        (lambda f: ensemble(ensemble(f, n=2), n=3), 6),
        (lambda f: ensemble(retry(f), batch(size=1)(f)), 2),
        (lambda f: best_of(f, 3, one), 3),
        (lambda f: ensemble(best_of(f, 2, one), n=2), 4),
        (lambda f: consensus(f, n=5), 3),
        (lambda f: retry(ensemble(f, n=2)), 2),
    ],
)
async def test_samples_of_a_cached_model_are_distinct_and_kept(
    server: Server, connect: Connect, make: Any, samples: int
) -> None:
    server.play(OPENAI.good("right"))
    many = make(cache(connect(OPENAI, price=(1, 1))))
    with track() as ledger:
        await many("hi")
        assert (len(server.requests), ledger.hits) == (samples, 0)
        await many("hi")
    assert (len(server.requests), ledger.hits) == (samples, samples)


async def test_a_cache_around_keeps_ensembles_of_different_functions_apart(
    server: Server, connect: Connect
) -> None:
    server.play(lambda seen: OPENAI.good(str(seen.json.get("temperature"))))
    cold, warm = connect(OPENAI, temperature=0), connect(OPENAI, temperature=1)
    many = [ensemble(cold), ensemble(warm), ensemble(cold, n=2), best_of(cold, 1, one), cold]
    for times in range(2):
        results = [await cache(fn)("hi") for fn in many]
        texts = [[*map(str, one)] if isinstance(one, list) else str(one) for one in results]
        assert texts == [["0"], ["1"], ["0", "0"], "0", "0"], times
    assert len(server.requests) == 6


async def test_an_ensemble_and_a_judge_are_nodes_of_a_graph(
    server: Server, connect: Connect
) -> None:
    maker = Judge()
    server.play(maker.answer)
    model = connect(OPENAI)
    ask = ensemble(saying("a"), saying("aaa"), saying("aa"))
    both = graph(ensemble=(ask, "query"), judge=(judge(model), "query", "ensemble"))
    results = await both("which?")
    assert results["ensemble"] == ["a", "aaa", "aa"]
    assert results["judge"].answer == "aaa"


async def test_one_limit_around_and_inside_does_not_stand_in_its_own_way(
    server: Server, connect: Connect
) -> None:
    server.play(OPENAI.good())
    share = limit(concurrency=1)
    many = share(ensemble(share(connect(OPENAI)), n=3))
    with anyio.fail_after(1):
        answers = await many("hi")
    assert [*map(str, answers)] == ["right"] * 3
    assert share.running == 0


async def test_failing_requests_of_an_ensemble_are_not_multiplied(
    server: Server, connect: Connect, no_backoff: None
) -> None:
    server.play(Answer(status=503))
    with pytest.raises(ember.CallError):
        await retry(max_attempts=2)(ensemble(connect(OPENAI, retries=5), n=2))("hi")
    assert len(server.requests) == 4


# ── best_of ───


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([1, 3, 2], 1),
        ([1, 3, 3], 1),
        ([math.nan, 1, 2], 2),
        ([math.nan, -math.inf, math.nan], 1),
        ([math.nan, math.nan], 0),
        ([2, math.nan, 1], 0),
        ([False, True], 1),
        ([-5, -1], 1),
        ([decimal.Decimal("0.1"), 0.2], 1),
    ],
)
@pytest.mark.parametrize("is_async", [True, False])
async def test_the_best_score_wins(scores: list[Any], best: int, is_async: bool) -> None:
    answers = [f"a{number}" for number in range(len(scores))]

    def score(answer: str) -> Any:
        return scores[answers.index(answer)]

    async def score_async(answer: str) -> Any:
        await anyio.lowlevel.checkpoint()
        return score(answer)

    fn = best_of(saying(*answers), len(scores), score_async if is_async else score)
    assert await fn("hi") is answers[best]


async def test_failing_samples_and_scores_are_left_out() -> None:
    def score(answer: str) -> float:
        return {"low": 1.0, "high": 2.0}[answer]

    samples = ["low", LookupError("away"), "unknown", "high"]
    assert await best_of(saying(*samples), 4, score)("hi") == "high"


@pytest.mark.parametrize("score", [lambda text: 1 / 0, lambda text: "much", lambda text: None])
async def test_without_any_score_the_failure_is_raised(score: Any) -> None:
    with pytest.raises((ZeroDivisionError, ValueError, TypeError)):
        await best_of(saying("a", "b"), 2, score)("hi")


async def test_the_last_failure_of_all_samples_is_raised_with_notes() -> None:
    errors = [LookupError("a"), ValueError("b")]
    with pytest.raises(ValueError, match="b") as caught:
        await best_of(saying(*errors, name="flaky"), 2, one)("hi")
    assert caught.value is errors[-1]
    assert notes(caught.value).count("flaky") == 1
    assert "LookupError: a" in notes(caught.value)


@on_both
async def test_each_answer_is_scored_as_it_comes() -> None:
    scored, doors = list[str](), {"a": anyio.Event(), "b": anyio.Event()}
    left = iter("ab")

    async def slow(prompt: str) -> str:
        answer = next(left)
        await doors[answer].wait()
        return answer

    async with anyio.create_task_group() as group:
        group.start_soon(best_of(slow, 2, lambda answer: scored.append(answer) or 1), "hi")
        await anyio.sleep(0.001)
        doors["b"].set()
        await until(lambda: scored == ["b"])
        doors["a"].set()
    assert scored == ["b", "a"]


async def test_a_judge_can_be_the_score(server: Server, connect: Connect) -> None:
    server.play(Judge().answer)
    opinion = judge(connect(OPENAI))

    async def score(answer: str) -> float:
        return (await opinion("which?", [answer])).scores[0]

    assert await best_of(saying("a", "aaa", "aa"), 3, score)("which?") == "aaa"


# ── cascade ───


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize(
    ("answers", "good", "asked", "judged"),
    [
        (["a", "b", "c"], "a", 1, 1),
        (["a", "b", "c"], "b", 2, 2),
        (["a", "b", "c"], "c", 3, 2),  # the last answer is not asked about
        (["a", "b", "c"], "?", 3, 2),
        ([LookupError("a"), "b", "c"], "b", 2, 1),
        ([LookupError("a"), LookupError("b"), "c"], "?", 3, 0),
        (["a"], "?", 1, 0),
    ],
)
async def test_the_first_accepted_answer_is_returned(
    answers: list[Any], good: str, asked: int, judged: int, is_async: bool
) -> None:
    seen, calls = list[str](), list[Any]()

    def accept(answer: str) -> bool:
        seen.append(answer)
        return answer == good

    async def accept_async(answer: str) -> bool:
        await anyio.lowlevel.checkpoint()
        return accept(answer)

    fns = [saying(answer, calls=calls) for answer in answers]
    result = await cascade(*fns, accept=accept_async if is_async else accept)("hi")
    assert result == answers[asked - 1]
    assert (len(calls), len(seen)) == (asked, judged)


async def test_the_last_failure_of_a_cascade_is_raised_with_notes() -> None:
    errors = [LookupError("a"), ValueError("b"), KeyError("c")]
    fns = [saying(error, name=f"f_{error.args[0]}") for error in errors]
    with pytest.raises(KeyError) as caught:
        await cascade(*fns, accept=one)("hi")
    assert caught.value is errors[-1]
    assert len(caught.value.__notes__) == 2
    for name, text in (("f_a", "LookupError: a"), ("f_b", "ValueError: b")):
        assert name in notes(caught.value)
        assert text in notes(caught.value)


async def test_the_last_failure_is_raised_though_an_answer_was_refused() -> None:
    with pytest.raises(LookupError, match="c"):
        await cascade(saying("a"), saying(LookupError("c")), accept=lambda answer: False)("hi")


@pytest.mark.parametrize("error", [ember.SetupError("no key"), ember.BudgetExceeded("no money")])
async def test_a_cascade_ends_with_what_must_change_first(error: Exception) -> None:
    calls = list[Any]()
    fns = saying(error, calls=calls), saying("b", calls=calls)
    with pytest.raises(type(error)) as caught:
        await cascade(*fns, accept=one)("hi")
    assert caught.value is error
    assert len(calls) == 1


async def test_a_cascade_of_models_asks_the_cheap_one_first(
    server: Server, connect: Connect
) -> None:
    server.play(lambda seen: OPENAI.good("?" if seen.json["temperature"] else "sure"))
    fns = [connect(OPENAI, temperature=warmth) for warmth in (1, 0)]
    reply = await cascade(*fns, accept=lambda reply: "?" not in reply.text)("hi")
    assert reply.text == "sure"
    assert [seen.json["temperature"] for seen in server.requests] == [1, 0]


# ── refine ───


@dataclass(frozen=True)
class Critique:
    """What a critic says."""

    ok: bool
    text: str = ""


@pytest.mark.parametrize(
    ("critiques", "rounds", "answers"),
    [
        ([True], 3, 1),
        ([Critique(True)], 3, 1),
        (["no", True], 3, 2),
        ([Critique(False), Critique(True)], 3, 2),
        ([False, 1, "True", None], 3, 4),  # none of them is True itself
        ([False] * 9, 3, 4),
        ([False] * 9, 1, 2),
        ([False] * 9, 5, 6),
    ],
)
async def test_it_is_refined_until_the_critic_is_pleased(
    critiques: list[Any], rounds: int, answers: int
) -> None:
    calls, seen = list[Any](), list[Any]()
    texts = [f"answer {number}" for number in range(9)]
    left = iter(critiques)

    async def critic(question: str, answer: str) -> Any:
        seen.append((question, answer))
        return next(left)

    fn = refine(saying(*texts, calls=calls), critic, max_rounds=rounds)
    assert await fn("which?") == texts[answers - 1]
    assert len(calls) == answers
    assert calls[0] == ("say", "which?")
    assert seen == [("which?", text) for text in texts[: min(answers, rounds)]]


async def test_question_answer_and_critique_are_in_one_prompt() -> None:
    calls = list[Any]()

    async def critic(question: str, answer: str) -> str:
        return f"too short: {len(answer)}"

    ask = refine(saying("first", "second", calls=calls), critic, max_rounds=1)
    assert await ask("which {river}?") == "second"
    prompt = calls[1][1]
    assert isinstance(prompt, str)
    for text in ("which {river}?", "first", "too short: 5"):
        assert text in prompt


@pytest.mark.parametrize("is_async", [True, False])
async def test_until_says_when_to_stop(is_async: bool) -> None:
    critiques = list[str]()

    async def critic(question: str, answer: str) -> str:
        return f"critique of {answer}"

    def until(critique: str) -> bool:
        critiques.append(critique)
        return critique == "critique of b"

    async def until_async(critique: str) -> bool:
        await anyio.lowlevel.checkpoint()
        return until(critique)

    ask = refine(saying("a", "b", "c"), critic, until=until_async if is_async else until)
    assert await ask("which?") == "b"
    assert critiques == ["critique of a", "critique of b"]


async def test_a_verifier_is_a_critic(server: Server, connect: Connect) -> None:
    said = '{"ok": %s, "reason": "%s", "correction": ""}'
    texts = ["5", said % ("false", "odd"), "4", said % ("true", "even")]
    server.play(*map(OPENAI.good, texts))
    model = connect(OPENAI)
    reply = await refine(model, verify(model))("2 + 2?")
    assert (reply.text, len(server.requests)) == ("4", 4)
    prompt = server.requests[2].json["messages"][-1]["content"]
    assert "odd" in prompt
    assert "tokens_in" not in prompt  # a reply is its text
    assert "chatcmpl-1" not in prompt


@pytest.mark.parametrize("part", ["fn", "critic", "until"])
async def test_an_error_in_a_round_is_raised_itself(part: str) -> None:
    error = LookupError(part)

    async def critic(question: str, answer: str) -> bool:
        if part == "critic":
            raise error
        return False

    def until(critique: Any) -> bool:
        if part == "until":
            raise error
        return False

    ask = saying("a", error if part == "fn" else "b", "c", "d")
    with pytest.raises(LookupError) as caught:
        await refine(ask, critic, until=until)("which?")
    assert caught.value is error


# ── Samples of a cached function ───


async def test_the_first_sample_is_the_answer_of_a_plain_call_and_no_two_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))
    asked = itertools.count(1)

    @cache
    async def ask(prompt: str) -> int:
        return next(asked)

    @cache
    async def other(prompt: str) -> str:
        return "other"

    assert await ask("q") == 1
    assert await ensemble(other, ask)("q") == ["other", 1]
    assert await ensemble(ask, n=12)("q") == [*range(1, 13)]
    assert await ensemble(ask, retry(ask), ask)("q") == [1, 2, 3]
    nested = await ensemble(ensemble(ask, n=3), n=3)("q")
    assert len({number for inner in nested for number in inner}) == 9
    assert nested[0] == [1, *nested[0][1:]]
    assert await ensemble(ensemble(ask, n=3), n=3)("q") == nested


def test_texts_agree_within_dataclasses_mappings_and_lists_and_in_any_normal_form() -> None:
    @dataclass
    class Place:
        name: str
        size: float

    assert majority_vote([Place("Rome", 1), Place("Paris.", 2), Place(" paris", 2.0)]).size == 2
    assert majority_vote([{"a": "x"}, {"a": "Paris"}, {"a": "paris."}]) == {"a": "Paris"}
    assert majority_vote([["x"], [42], ["42.0"]]) == [42]
    assert majority_vote(["x", "Caf\u00e9", "Cafe\u0301"]) == "Caf\u00e9"
    numpy = pytest.importorskip("numpy")
    assert majority_vote(["x", 0.25, numpy.float64(0.25)]) == 0.25


def test_the_letters_of_a_text_are_no_answers() -> None:
    with pytest.raises(ember.SetupError, match=r"majority_vote\(\) got no answers"):
        majority_vote("abb")


class Town(pydantic.BaseModel):
    name: str


class Spot(NamedTuple):
    name: str


@pytest.mark.parametrize("kind", [Town, Spot])
def test_models_of_pydantic_and_named_tuples_vote_by_their_parts(kind: Any) -> None:
    rome, paris, again = (kind(name=name) for name in ("Rome", "Paris.", "paris"))
    assert majority_vote([rome, paris, again]) is paris
    assert majority_vote([{"Rome"}, {"Paris."}, {"paris"}]) == {"Paris."}


@pytest.mark.parametrize("answers", ["abb", {"a": "x", "b": "x"}])
def test_names_and_letters_are_no_answers(answers: Any) -> None:
    with pytest.raises(ember.SetupError, match=r"majority_vote\(\) got no answers but .*a list"):
        majority_vote(answers)
