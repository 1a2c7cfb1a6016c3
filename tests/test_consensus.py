"""consensus: how many samples it asks for, over all small cases, and what it then says.

What is expected is found by trying all that may still come, from the definition: a vote is settled
when no outcome of the samples that are left changes the winner, ties go to the earliest.
"""

import functools
import itertools
import json
import pickle
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from conftest import Connect
from server import WIRES, Answer, Server, until
from test_concurrency import Watch, on_both

import ember
from ember import Consensus, budget, cache, consensus, track

OPENAI = WIRES["openai"]
FAILS = "!"  # in place of an answer


# ── The definition ───

Votes = tuple[int, ...]  # of each answer, in the order in which they first came


def outcomes(votes: Votes) -> list[Votes]:
    """The votes after one more sample: for an answer that is there, for a new one, or none."""
    more = [(*votes[:at], votes[at] + 1, *votes[at + 1 :]) for at in range(len(votes))]
    return [*more, (*votes, 1), votes]


def winner(votes: Votes) -> int | None:
    """Who has most votes, the earliest among equals."""
    return votes.index(max(votes)) if votes else None


@functools.cache
def winners(votes: Votes, left: int) -> frozenset[int | None]:
    """All who win in one of the ways in which the samples that are left may come."""
    if not left:
        return frozenset({winner(votes)})
    return frozenset().union(*(winners(after, left - 1) for after in outcomes(votes)))


@functools.cache
def fewest(votes: Votes, left: int) -> int:
    """The fewest further samples that could settle the vote."""
    if len(winners(votes, left)) == 1:
        return 0
    return 1 + min(fewest(after, left - 1) for after in outcomes(votes))


def counted(brings: Iterable[str]) -> dict[str, int]:
    """The votes by answer, in the order in which they first came."""
    return dict(Counter(one for one in brings if one != FAILS))


def votes_of(brings: Iterable[str]) -> Votes:
    return tuple(counted(brings).values())


def settled_after(n: int, brings: str) -> int:
    """The smallest number of outcomes, in the order in which they come, that settle the vote."""
    return next(at for at in range(n + 1) if not fewest(votes_of(brings[:at]), n - at))


def cases(n: int, alphabet: str, sample: int = 0) -> list[str]:
    """All that n samples may bring, or some of it."""
    if sample:
        dice = random.Random(n)
        return ["".join(dice.choices(alphabet, k=n)) for _ in range(sample)]
    return ["".join(letters) for letters in itertools.product(alphabet, repeat=n)]


def test_the_reference_says_what_the_design_says() -> None:
    assert [fewest((), n) for n in range(1, 10)] == [1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert settled_after(9, "aaaaaaaaa") == 5
    assert settled_after(4, "aabb") == 2  # 2:2 goes to the earliest
    assert settled_after(2, "ab") == 1
    assert settled_after(3, "abc") == 3  # until the last has come, b may win
    assert settled_after(3, "!!!") == 3


# ── Exact counts ───


class Samples:
    """An async function whose calls wait until they are told what to bring."""

    def __init__(self) -> None:
        self.waiting, self.asked = list[tuple[anyio.Event, list[str]]](), 0
        self.errors = list[LookupError]()

    async def ask(self, question: str) -> str:
        call = anyio.Event(), list[str]()
        self.waiting.append(call)
        self.asked += 1
        await call[0].wait()
        if call[1][0] == FAILS:
            raise self.errors[-1]
        return call[1][0]

    def bring(self, outcome: str, place: int) -> None:
        """One of the calls that wait ends like this."""
        event, box = self.waiting.pop(place)
        box.append(outcome)
        if outcome == FAILS:
            self.errors.append(LookupError(f"no answer {len(self.errors)}"))
        event.set()


async def quiet() -> None:
    """Let all tasks do what they can."""
    for _ in range(12):
        await anyio.lowlevel.checkpoint()


Place = Callable[[int], int]
PLACES: dict[str, Place] = {
    "first asked first": lambda waiting: 0,
    "last asked first": lambda waiting: waiting - 1,
    "any": random.Random(7).randrange,
}


async def played(n: int, brings: str, place: Place) -> int:
    """How many samples one vote took, which is held to the definition sample by sample."""
    samples, results = Samples(), list[Any]()
    ask = consensus(samples.ask, n=n, key=str.upper)

    async def run() -> None:
        try:
            results.append(await ask("which?"))
        except LookupError as error:
            results.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        for at in range(n + 1):
            await quiet()
            need = fewest(votes_of(brings[:at]), n - at)
            assert (len(samples.waiting), bool(results)) == (need, not need), brings[:at]
            if not need:
                break
            samples.bring(brings[at], place(need))
    assert samples.asked == at
    counts = counted(brings[:at])
    if not counts:
        assert results[0] is samples.errors[-1]
        assert len(getattr(results[0], "__notes__", ())) == n - 1
        return at
    best = [*counts][winner(votes_of(brings[:at])) or 0]
    share = counts[best] / sum(counts.values())
    upper = {one.upper(): votes for one, votes in counts.items()}
    assert results == [Consensus(best, pytest.approx(share), upper)]
    assert [*results[0].counts] == [*upper]
    return at


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
async def test_in_flight_are_the_fewest_samples_that_could_settle_it(n: int, place: str) -> None:
    with anyio.fail_after(30):
        for brings in dict.fromkeys(c[: settled_after(n, c)] for c in cases(n, "abc" + FAILS)):
            whole = brings + FAILS * (n - len(brings))
            assert await played(n, whole, PLACES[place]) == settled_after(n, whole)


@pytest.mark.parametrize("n", [6, 7, 8, 9])
async def test_in_flight_are_the_fewest_also_in_longer_votes(n: int) -> None:
    with anyio.fail_after(30):
        for brings in [*cases(n, "abc", 30), *cases(n, "aab" + FAILS, 30)]:
            assert await played(n, brings, PLACES["any"]) == settled_after(n, brings)


@on_both
async def test_in_flight_are_the_fewest_on_both_event_loops() -> None:
    with anyio.fail_after(30):
        for brings in [case for n in (2, 3, 4) for case in cases(n, "ab" + FAILS)]:
            asked = await played(len(brings), brings, PLACES["any"])
            assert asked == settled_after(len(brings), brings)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
async def test_samples_that_come_at_once_are_as_few(n: int) -> None:
    for brings in cases(n, "abc", 0 if n < 6 else 200):
        asked = list[str]()

        async def ask(question: str, brings: str = brings, asked: list[str] = asked) -> str:
            asked.append(brings[len(asked)])
            return asked[-1]

        result = await consensus(ask, n=n)("which?")
        settled = settled_after(n, brings)
        assert "".join(asked) == brings[:settled]
        assert result.counts == counted(brings[:settled])
        assert result.answer == [*result.counts][winner(votes_of(asked)) or 0]


def voter(server: Server, brings: str) -> None:
    """Let the server bring these answers, one a request; "!" is an error that is not retried."""
    answers = [Answer(status=400) if one == FAILS else OPENAI.good(one) for one in brings]
    server.play(*answers)


@pytest.mark.parametrize(
    ("n", "brings", "requests"),
    [
        (9, "aaaaaaaaa", 5),
        (9, "abababab" + "a", 9),
        (9, "!aaaaaaaa", 5),
        (9, "aaaa!", 5),
        (5, "abbb!", 4),
        (5, "!!!!a", 5),
        (4, "aa", 2),
        (2, "b", 1),
        (1, "b", 1),
    ],
)
@on_both
async def test_a_model_is_sent_as_many_requests_as_settle_the_vote(
    server: Server, connect: Connect, n: int, brings: str, requests: int
) -> None:
    voter(server, brings)
    model = connect(OPENAI, price=(1, 1))
    with track() as ledger:
        result = await consensus(model, n=n)("which?")
    came = brings[:requests]
    assert (len(server.requests), ledger.requests, ledger.uncertain) == (requests, requests, 0)
    assert ledger.failures == came.count(FAILS)
    assert sorted(result.counts.values()) == sorted(counted(came).values())
    assert result.answer.text == max(sorted(counted(came)), key=counted(came).__getitem__)


# ── Results ───


def bringing(*answers: Any) -> Any:
    """An async function that brings these answers in turn, or raises those that are errors."""
    left = iter(answers)

    async def ask(question: str) -> Any:
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


async def test_answers_agree_as_in_majority_vote_and_the_earliest_stands_for_them() -> None:
    result = await consensus(bringing("Paris.", "Rome", " paris"), n=3)("which?")
    assert result == Consensus("Paris.", 2 / 3, {"paris": 2, "rome": 1})


async def test_numbers_agree_by_value() -> None:
    result = await consensus(bringing("one", "42", "42.0", 42), n=4)("which?")
    assert (result.answer, result.share) == ("42", 3 / 4)
    assert [*result.counts.values()] == [1, 3]


async def test_true_is_not_the_number_one() -> None:
    result = await consensus(bringing(True, 1, True, 1, True), n=5)("which?")
    assert (result.answer, result.share) == (True, 3 / 5)


async def test_a_key_says_which_answers_agree() -> None:
    result = await consensus(bringing("aa", "b", "c"), n=3, key=len)("which?")
    assert result == Consensus("b", 2 / 3, {"2": 1, "1": 2})


async def test_keys_with_the_same_text_lose_no_vote() -> None:
    vote = consensus(bringing(1, "1", 1, "1", 1), n=5, key=lambda answer: answer)
    result = await vote("which?")
    assert (result.answer, result.share) == (1, 3 / 5)
    assert sum(result.counts.values()) == 5


@pytest.mark.parametrize(
    "answers",
    [
        [["a"], ["b"], ["b"]],
        [{"a": 1}, {"b": 1}, {"b": 1}],
        [("a", ["x"]), ("b", []), ("b", [])],
        [ember.Reply("x", "x"), ember.Reply("Y.", "Y."), ember.Reply("y", "y")],
        [Consensus(one, 1.0, {one: 1}) for one in "abb"],
    ],
)
async def test_answers_that_cannot_be_hashed_are_counted(answers: list[Any]) -> None:
    result = await consensus(bringing(*answers), n=3)("which?")
    assert result.answer is answers[1]
    assert [*result.counts.values()] == [1, 2]


async def test_a_result_is_a_frozen_value() -> None:
    result = await consensus(bringing("a"), n=1)("which?")
    with pytest.raises(FrozenInstanceError):
        result.share = 0.5
    assert not hasattr(result, "__dict__")
    assert pickle.loads(pickle.dumps(result)) == result == Consensus("a", 1.0, {"a": 1})


async def test_samples_of_a_cached_function_are_distinct_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))
    asked = list[str]()

    @cache
    async def ask(question: str) -> str:
        asked.append("aba"[len(asked)])
        return asked[-1]

    vote = consensus(ask, n=3)
    with track() as ledger:
        for _ in range(2):
            assert await vote("which?") == Consensus("a", 2 / 3, {"a": 2, "b": 1})
    assert (len(asked), ledger.hits) == (3, 3)


@pytest.mark.parametrize(
    ("kind", "answers"),
    [(str, "aba"), (int, [1, 2, 1]), (float, [1.5, 2, 1.5]), (bool, [True, False, True])],
)
async def test_a_result_is_kept_by_a_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Any, answers: Any
) -> None:
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))
    ask = bringing(*answers)
    ask.__annotations__["return"] = kind
    vote = cache(key=str)(consensus(ask, n=3))
    first = await vote("which?")
    assert await vote("which?") == first
    assert (first.answer, first.share) == (answers[0], 2 / 3)


async def test_a_result_of_any_answers_is_kept_by_a_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))
    vote = cache(key=str)(consensus(bringing("a", "b", "a"), n=3))
    first = await vote("which?")
    assert await vote("which?") == first == Consensus("a", 2 / 3, {"a": 2, "b": 1})


async def test_a_consensus_of_a_model_is_kept_by_a_cache(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))
    server.play(OPENAI.good("42"))
    vote = cache(consensus(connect(OPENAI), n=3))
    results = [await vote("which?") for _ in range(2)]
    assert [result.answer.text for result in results] == ["42", "42"]
    assert [[*result.counts.values()] for result in results] == [[2], [2]]
    assert len(server.requests) == 2


async def test_typed_answers_of_a_model_agree_by_their_data(
    server: Server, connect: Connect
) -> None:
    server.play(*(OPENAI.good(f'{{"value": {number}}}') for number in (3, 4, 4.0)))
    result = await consensus(connect(OPENAI), n=3)("which?", output=float)
    assert (result.answer.data, [*result.counts.values()]) == (4.0, [1, 2])


# ── Failures ───


async def test_the_last_failure_is_raised_with_a_note_for_each_other() -> None:
    errors = [ValueError("first"), KeyError("second"), LookupError("third")]
    with pytest.raises(LookupError) as caught:
        await consensus(bringing(*errors), n=3)("which?")
    assert caught.value is errors[-1]
    notes = "\n".join(caught.value.__notes__)
    assert len(caught.value.__notes__) == 2
    assert "ValueError: first" in notes
    assert "KeyError: 'second'" in notes


@pytest.mark.parametrize("after", [0, 1, 4])
@on_both
async def test_a_setup_error_is_raised_at_once_and_the_rest_is_cancelled(after: int) -> None:
    watch, error = Watch(), ember.SetupError("no key")

    async def ask(question: str) -> str:
        with watch(len(watch.begun)):
            if len(watch.begun) <= after:
                return "a"
            await until(lambda: watch.now == 5 - after)
            if watch.begun[-1] == len(watch.begun) - 1 and not raised:
                raised.append(True)
                raise error
            await anyio.sleep_forever()
        return ""

    raised = list[bool]()
    with anyio.fail_after(5), pytest.raises(ember.SetupError) as caught:
        await consensus(ask, n=9)("which?")
    assert caught.value is error
    assert sorted(watch.ended) == sorted(watch.begun) == [0, 1, 2, 3, 4]


async def test_a_key_that_fails_is_an_error_of_the_caller() -> None:
    def key(answer: str) -> str:
        raise ZeroDivisionError(answer)

    with pytest.raises(ZeroDivisionError, match="a"):
        await consensus(bringing("a", "b", "c"), n=3, key=key)("which?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, r"consensus: .*n=0 "),
        ({"n": -1}, r"consensus: .*n=-1 "),
        ({"n": 2.5}, r"consensus: .*n=2\.5 "),
        ({"n": "3"}, r"consensus: .*n='3' "),
        ({"key": "upper"}, r"consensus: .*key='upper' "),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ember.SetupError, match=message):
        consensus(bringing("a"), **options)


def test_what_is_no_async_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"consensus\(\) takes an async function, not "):
        consensus(len)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        consensus()  # type: ignore[call-arg]


# ── Cancellation ───


@on_both
async def test_the_caller_cancels_all_samples() -> None:
    watch = Watch()

    async def ask(question: str) -> str:
        with watch(question):
            await anyio.sleep_forever()
        return ""

    async with anyio.create_task_group() as group:
        group.start_soon(consensus(ask, n=9), "which?")
        await until(lambda: watch.now == 5)
        group.cancel_scope.cancel()
    assert (len(watch.begun), len(watch.ended)) == (5, 5)


def held(server: Server, free: str = "") -> threading.Event:
    """The server answers these at once, and all others only when the event is set."""
    hold = threading.Event()
    server.play(*map(OPENAI.good, free), OPENAI.good("a", hold=hold))
    return hold


@pytest.mark.parametrize("free", ["", "a", "ab"])
@on_both
async def test_samples_that_were_sent_and_cancelled_are_uncertain(
    server: Server, connect: Connect, free: str
) -> None:
    hold, sent = held(server, free), 5 + (free == "ab")
    model = connect(OPENAI, price=(0, 1000)).using(max_tokens=1000)  # at most a dollar a sample
    with track() as ledger, budget(usd=100, on_warn=lambda text: None) as spent:
        async with anyio.create_task_group() as group:
            group.start_soon(consensus(model, n=9), "which?")
            await until(lambda: len(server.requests) == sent and ledger.requests == len(free))
            group.cancel_scope.cancel()
    hold.set()
    lost = sent - len(free)
    assert Counter(call.outcome for call in ledger.calls) == Counter(ok=len(free), cancelled=lost)
    assert ledger.uncertain == spent.uncertain == pytest.approx(lost)
    assert ledger.cost == pytest.approx(0.007 * len(free))
    assert spent.left == pytest.approx(100 - ledger.cost - lost)


@on_both
async def test_samples_that_a_setup_error_cancels_are_uncertain(
    server: Server, connect: Connect
) -> None:
    hold = held(server)
    model, asked = connect(OPENAI, price=(0, 1000)).using(max_tokens=1000), list[str]()

    async def ask(question: str) -> str:
        asked.append(question)
        if len(asked) == 1:
            await until(lambda: len(server.requests) == 4)
            raise ember.SetupError("no key")
        return (await model(question)).text

    with track() as ledger, pytest.raises(ember.SetupError, match="no key"):
        await consensus(ask, n=9)("which?")
    hold.set()
    assert [call.outcome for call in ledger.calls] == ["cancelled"] * 4
    assert ledger.uncertain == pytest.approx(4)


# ── Shape ───


async def test_a_wrong_call_is_pythons_own_error_before_anything_is_asked() -> None:
    watch = Watch()

    async def ask(question: str) -> str:
        with watch(question):
            return "a"

    with pytest.raises(TypeError, match=r"ask\(\) missing 1 required positional argument"):
        await consensus(ask)()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"ask\(\) takes 1 positional argument but 2 were given"):
        await consensus(ask)("a", "b")  # type: ignore[call-arg]
    assert watch.begun == []


async def test_the_samples_are_asked_with_all_arguments() -> None:
    asked = list[Any]()

    async def ask(question: str, *more: int, style: str = "", **rest: Any) -> str:
        asked.append((question, more, style, rest))
        return "a"

    await consensus(ask, n=3)("which?", 1, 2, style="short", seed=7)
    assert asked == [("which?", (1, 2), "short", {"seed": 7})] * 2


async def test_chains_of_thought_agree_by_their_answers(tmp_path: Path) -> None:
    numbers = itertools.count()

    async def model(prompt: str) -> str:
        number = next(numbers)
        answer = "Rome" if number == 0 else ["Paris.", "paris"][number % 2]
        return json.dumps({"reasoning": f"thought {number}", "answer": answer})

    ask = ember.predict("question -> answer", model=model, reasoning=True)
    found = await consensus(ask, n=9)("What is the capital of France?")
    assert (found.answer.answer, found.share, next(numbers)) == ("paris", 5 / 6, 6)
    assert found.counts == {"Rome": 1, "paris": 5}


async def test_the_key_of_each_answer_is_asked_for_once() -> None:
    keyed, numbers = list[int](), itertools.count()

    async def ask(question: str) -> int:
        return next(numbers)

    def key(answer: int) -> int:
        keyed.append(answer)
        return answer

    found = await consensus(ask, n=40, key=key)("which?")
    assert (found.answer, sorted(keyed)) == (0, [*range(len(keyed))])
    assert len(keyed) == sum(found.counts.values())
