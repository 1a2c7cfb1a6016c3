"""Evaluations: scores and their intervals, files that survive a kill, metrics, data sets."""

import asyncio
import dataclasses
import enum
import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import anyio
import evaluate_worker
import numpy as np
import pytest
from conftest import Connect, Run, failing
from server import WIRES, Answer, Seen, Server

import ember
import ember_accel
from ember import Reply, SetupError, cache, retry
from ember_accel import datasets, evidence, intervals, metrics
from ember_accel.evidence import Report, Row, evaluate, load
from ember_accel.metrics import choice, contains, exact, f1, graded, numeric

ROOT = Path(__file__).parents[1]
WORKER = Path(evaluate_worker.__file__)
OPENAI = WIRES["openai"]
PAIRS = [(f"question {n}", f"answer {n}") for n in range(8)]
asked = list[str]()  # by `right` and `often`


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Run:
    """`run(main)`, on each event loop."""
    return functools.partial(anyio.run, backend=request.param)


@pytest.fixture(autouse=True)
def nothing_asked() -> None:
    """No calls of other tests."""
    asked.clear()


async def right(text: str) -> str:
    """The answer to a question."""
    asked.append(text)
    return text.replace("question", "answer")


async def often(text: str) -> str:
    """The answer to most questions; to the third it has none, and a wrong one to the sixth."""
    asked.append(text)
    if text.endswith("2"):
        raise ValueError("no idea")
    return text.replace("question", "answer").replace("5", "five")


def report_on(scores: list[float], name: str = "") -> Report:
    """A report with these scores."""
    rows = [Row(number, None, None, float(score)) for number, score in enumerate(scores)]
    return evidence._report(name, rows, 0.0)


def evaluated(*args: Any, **how: Any) -> Report:
    """The report of an evaluation."""
    return asyncio.run(evaluate(*args, **how))


def refused(*args: Any, **how: Any) -> str:
    """The text of the SetupError that an evaluation raises."""
    with pytest.raises(SetupError) as caught:
        evaluated(*args, **how)
    return str(caught.value)


# ── The package ───


def test_the_package_has_all_names_and_imports_nothing_until_one_is_used() -> None:
    program = (
        "import sys, ember_accel; first = {'ember', 'numpy', 'jax'} & {*sys.modules};"
        "from ember_accel import evaluate, load, exact; print(first, 'jax' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout == "set() False\n"


def test_all_names_of_the_package_are_there_and_others_are_not() -> None:
    assert {*ember_accel.__all__} <= {*dir(ember_accel)}
    assert ember_accel.evaluate is evidence.evaluate
    for name in ember_accel.__all__:
        assert callable(getattr(ember_accel, name))
    with pytest.raises(AttributeError, match="'ember_accel' has no attribute 'evaluat'"):
        ember_accel.evaluat  # type: ignore


# ── evaluate ───


def test_evaluate_asks_each_row_once_and_keeps_their_order(run: Run) -> None:
    calls = list[str]()

    async def ask(text: str) -> str:
        calls.append(text)
        await anyio.sleep(0.001 * (len(calls) % 3))
        return await often(text)

    report = run(functools.partial(evaluate, ask, PAIRS, limit=3))
    assert sorted(calls) == [question for question, _ in PAIRS]
    assert [row.input for row in report.rows] == [question for question, _ in PAIRS]
    assert [row.score for row in report.rows] == [1, 1, 0, 1, 1, 0, 1, 1]
    assert (report.n, report.mean, report.name) == (8, 0.75, "exact of ask")
    assert report.interval == pytest.approx((0.4093, 0.9285), abs=1e-4)
    assert [(row.input, row.error) for row in report.failures] == [
        ("question 2", "ValueError: no idea")
    ]
    assert report.seconds > 0
    assert report.p50 <= report.p95
    assert report.cost == 0.0


def test_rows_are_mappings_or_pairs_and_other_keys_are_kept() -> None:
    rows = [{"input": "a", "expected": "a", "source": 7}, ["b", "b"], ("c", "c"), {"input": "d"}]

    async def same(text: str) -> str:
        return text

    report = evaluated(same, rows)
    assert [(row.input, row.expected, row.extra) for row in report.rows] == [
        ("a", "a", {"source": 7}), ("b", "b", {}), ("c", "c", {}), ("d", None, {}),
    ]  # fmt: skip
    assert [row.score for row in report.rows] == [1, 1, 1, 0]


async def test_rows_may_be_any_iterable_async_or_not() -> None:
    async def stream() -> AsyncIterator[Any]:
        for pair in PAIRS:
            yield pair

    for rows in (stream(), iter(PAIRS), (pair for pair in PAIRS)):
        assert (await evaluate(right, rows)).mean == 1


def test_an_input_that_is_a_mapping_becomes_the_parameters() -> None:
    async def add(one: int, other: int) -> int:
        return one + other

    report = evaluated(add, [({"one": 1, "other": 2}, 3), ({"one": 1}, 1)])
    assert [row.score for row in report.rows] == [1, 0]
    assert report.failures[0].error is not None
    assert report.failures[0].error.startswith("TypeError: ")
    assert "missing 1 required positional argument: 'other'" in report.failures[0].error


@pytest.mark.parametrize(
    "rows", [["a", "b"], [("a", "b"), "ab"], [("a", "b"), ("a",)], [("a", "b"), {"expected": 1}],
             [("a", "b"), None]],
)  # fmt: skip
def test_what_is_no_row_is_refused_with_its_number(rows: list[Any]) -> None:
    calls = list[str]()

    async def ask(text: str) -> str:
        calls.append(text)
        return text

    number = 1 if rows[0] == "a" else 2
    assert f"row {number} is {rows[number - 1]!r}" in refused(ask, rows)
    assert calls == []


def test_wrong_arguments_are_refused_before_any_call() -> None:
    assert "no rows" in refused(right, [])
    assert "limit=0" in refused(right, PAIRS, limit=0)
    for fn, metric in ((print, exact), (right, "exact")):
        with pytest.raises(TypeError, match=r"evaluate\(\) takes a"):
            evaluated(fn, PAIRS, metric)


def test_a_metric_may_be_async_and_gives_numbers_or_bools(run: Run) -> None:
    async def slow(output: str, expected: str) -> float:
        await anyio.lowlevel.checkpoint()
        return len(output) / 20

    report = run(functools.partial(evaluate, right, PAIRS, slow))
    assert report.mean == pytest.approx(0.4)
    for score in (True, 1, 1.0, np.float32(1), np.bool_(True)):
        assert evaluated(right, PAIRS, lambda output, expected, score=score: score).mean == 1


@pytest.mark.parametrize("score", [None, "1", math.nan, math.inf, [1.0], 1j, 10**400])
def test_a_score_that_is_no_finite_number_is_a_failure(score: Any) -> None:
    report = evaluated(right, PAIRS, lambda output, expected: score)
    assert report.mean == 0
    assert len(report.failures) == len(PAIRS)
    assert report.rows[0].output == "answer 0"


def test_a_metric_that_fails_is_a_failure_with_the_output() -> None:
    report = evaluated(right, [("question", None), ("question 1", "1")], numeric)
    assert report.failures == [report.rows[0]]
    assert report.rows[0].error == "ValueError: numeric: expected=None has no number"
    assert report.rows[0].output == "answer"
    assert report.rows[1].score == 1


def test_a_setup_error_ends_the_evaluation_at_once(run: Run) -> None:
    calls = list[str]()

    async def keyless(text: str) -> str:
        calls.append(text)
        await anyio.sleep(0.001)
        raise SetupError("no API key")

    error = failing(run, functools.partial(evaluate, keyless, PAIRS * 10, limit=2))
    assert isinstance(error, SetupError)
    assert str(error) == "no API key"
    assert len(calls) <= 4


def test_cancelling_an_evaluation_cancels_its_calls(run: Run) -> None:
    cancelled = list[str]()

    async def hang(text: str) -> str:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(text)
        return text

    async def main() -> None:
        with anyio.move_on_after(0.02):
            await evaluate(hang, PAIRS, limit=4)

    run(main)
    assert len(cancelled) == 4


def test_cost_is_that_of_the_function_without_the_metric(connect: Connect, server: Server) -> None:
    server.play(OPENAI.good("right"))
    ask = connect(OPENAI)

    async def judged(output: Any, expected: Any) -> bool:
        return str(await ask("Is it right?")) == expected

    with ember.track() as ledger:
        report = evaluated(ask, [("a", "right"), ("b", "right")], judged)
    assert report.mean == 1
    assert [row.cost for row in report.rows] == [ledger.calls[0].cost] * 2
    assert report.cost == pytest.approx(ledger.cost / 2)
    assert ledger.requests == 4


def test_cost_is_none_where_a_price_is_unknown(connect: Connect, server: Server) -> None:
    server.play(OPENAI.good("right"))
    report = evaluated(ember.model("openai:own", base_url=server.url, api_key="sk-no"), [("a", "")])
    assert report.cost is None
    assert report.rows[0].cost is None
    assert "cost      unknown" in str(report)


def test_decorated_functions_and_models_can_be_evaluated(connect: Connect, server: Server) -> None:
    server.play(Answer(status=503), OPENAI.good("right"))
    report = evaluated(retry(connect(OPENAI, retries=1)), [("a", "right")] * 3)
    assert (report.mean, report.failures) == (1, [])
    assert isinstance(report.rows[0].output, Reply)


def test_10_000_rows_are_evaluated_and_resumed(tmp_path: Path) -> None:
    rows = [(f"question {n % 5000}", f"answer {n % 5000}") for n in range(10_000)]
    calls = Counter[str]()

    async def ask(text: str) -> str:
        calls[text] += 1
        return await often(text)

    report = evaluated(ask, rows, limit=256, resume=tmp_path / "run.jsonl")
    assert {*calls.values()} == {2}
    assert len(report.failures) == 1000
    again = evaluated(ask, rows, limit=256, resume=tmp_path / "run.jsonl")
    assert calls.total() == 11_000
    assert [row.score for row in again.rows] == [row.score for row in report.rows]
    assert again.interval == report.interval


# ── The file of a run ───


def worker(*arguments: str) -> subprocess.Popen[str]:
    """A process that runs evaluate_worker.py."""
    paths = [str(WORKER.parents[1]), str(WORKER.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    pipe = subprocess.PIPE
    command = [sys.executable, str(WORKER), *arguments]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


def lines_of(path: Path) -> list[Any]:
    """The whole lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if "\n" in line]


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_an_evaluation_goes_on_from_its_file(
    seed: int, server: Server, tmp_path: Path
) -> None:
    path, random, reached = tmp_path / "run.jsonl", np.random.default_rng(seed), threading.Event()
    killed_at, count, kills = 0, 45, 0

    def answer(seen: Seen) -> Answer:
        if len(server.requests) >= killed_at:
            reached.set()
        return OPENAI.good("right", pause=0.001)

    server.play(answer)
    while True:
        reached.clear()
        killed_at = len(server.requests) + int(random.integers(1, 35))
        asked, kept = len(server.requests), lines_of(path) if path.exists() else []
        process = worker("run", server.url + OPENAI.base, str(count), str(path))
        while process.poll() is None and not reached.wait(0.005):
            pass
        if reached.is_set() and process.poll() is None:
            process.send_signal(signal.SIGKILL)
        printed, problems = process.communicate(timeout=30)
        done = Counter(prompt_of(seen) for seen in server.requests[asked:])
        rows = Counter(row["input"] for row in evaluate_worker.rows(count))
        assert done.total() <= count - max(0, len(kept) - 1), "a row in the file was asked again"
        assert all(done[text] <= rows[text] for text in done)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, problems
        kills += 1
    report = json.loads(printed)
    assert report["inputs"] == [row["input"] for row in evaluate_worker.rows(count)]
    assert (report["n"], report["mean"]) == (count, 1)
    assert report["cost"] == pytest.approx(count * 11 * 2.5e-6 + count * 7 * 10e-6)
    assert count <= len(server.requests) <= count + kills * evaluate_worker.LIMIT
    keys = [line["key"] for line in lines_of(path)[1:]]
    assert len(keys) == len({*keys}) == count


def prompt_of(seen: Seen) -> str:
    """The last message of a request."""
    return str(seen.json["messages"][-1]["content"])


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a run in which all rows are done."""
    path = tmp_path_factory.mktemp("whole") / "run.jsonl"
    evaluated(right, PAIRS, resume=path)
    return path.read_bytes()


def torn_at(cut: int, whole: bytes, path: Path) -> int:
    """How many rows a run asks for that goes on from the first bytes of a file."""
    path.write_bytes(whole[:cut])
    asked.clear()
    report = evaluated(right, PAIRS, resume=path)
    lines = whole[:cut].split(b"\n")[:-1]
    assert (report.n, report.mean) == (8, 1), cut
    assert len({*asked}) == len(asked)
    assert path.read_bytes().split(b"\n")[: len(lines)] == lines
    keys = [line["key"] for line in lines_of(path)[1:]]
    assert len(keys) == len({*keys}) == 8
    return len(asked)


def test_a_header_torn_at_any_byte_is_written_again(whole: bytes, tmp_path: Path) -> None:
    for cut in range(whole.index(b"\n") + 2):
        assert torn_at(cut, whole, tmp_path / "run.jsonl") == 8


def test_a_last_line_torn_at_any_byte_is_dropped(whole: bytes, tmp_path: Path) -> None:
    for cut in range(whole.rindex(b"\n", 0, -1), len(whole) + 1):
        assert torn_at(cut, whole, tmp_path / "run.jsonl") == whole[cut:].count(b"\n")


WRONG = [  # in an entry of this data set
    b'{"key": "KEY", "score": %s, "seconds": %s, "cost": %s, "output": ""}' % values
    for values in [
        (b"NaN", b"1.0", b"0.0"), (b"Infinity", b"1.0", b"0.0"), (b'"x"', b"1.0", b"0.0"),
        (b"null", b"1.0", b"0.0"), (b"1.0", b"null", b"0.0"), (b"1.0", b'"1"', b"0.0"),
        (b"1.0", b"NaN", b"0.0"), (b"1.0", b"1.0", b'"x"'), (b"1.0", b"1.0", b"NaN"),
        (b"1.0", b"1.0", b"[]"),
    ]
]  # fmt: skip


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]", b"{}", b"null", b"\xff", b'{"key": "1:1"}', b"[" * 100_000,
             b'{"key": [], "score": 1.0, "seconds": 1.0, "cost": 0.0, "output": ""}',
             b'{"key": "0:1", "score": 1.0, "seconds": 1.0, "cost": 0.0, "output": ""}',
             b'{"key": "1:1", "score": 1.0', b"\0" * 50, *WRONG],
)  # fmt: skip
def test_a_broken_line_that_is_not_torn_is_an_error_with_its_number(
    line: bytes, whole: bytes, tmp_path: Path
) -> None:
    path, lines = tmp_path / "run.jsonl", whole.splitlines(keepends=True)
    line = line.replace(b"KEY", json.loads(lines[3])["key"].encode())
    path.write_bytes(b"".join([*lines[:3], line + b"\n", *lines[3:]]))
    before = path.read_bytes()
    assert refused(right, PAIRS, resume=path).startswith(f"{path}:4: ")
    assert path.read_bytes() == before
    assert asked == []


@pytest.mark.parametrize(
    "content", [b"precious", b'{"input": 1}', b'{"input": 1}\n', b"a,b\n1,2\n", b"\n", b"[]\n",
                b'{"format": 2, "function": "', b"\xff\xfe"],
)  # fmt: skip
def test_a_file_of_something_else_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert str(path) in refused(right, PAIRS, resume=path)
    assert path.read_bytes() == content
    assert asked == []


async def polite(text: str, please: str = "please") -> str:
    """Another function."""
    return f"{text}, {please}"


def asking(temperature: float, more: object = None) -> Callable[[str], Any]:
    """Functions that differ in what they close over."""

    async def ask(text: str) -> str:
        return f"{text} {temperature} {more and 1}"

    return ask


def loosely(output: Any, expected: Any) -> bool:
    """Another metric."""
    return bool(output != expected)


@pytest.mark.parametrize(
    ("fn", "metric", "rows", "what"),
    [
        (polite, exact, PAIRS, "function: 'test_evidence.right "),
        (right, loosely, PAIRS, "metric: 'ember_accel.metrics.exact "),
        (right, exact, PAIRS[:-1], "data set: '8 rows "),
        (right, exact, [*PAIRS[:-1], ("question 7", "else")], "data set: '8 rows "),
        (right, exact, [*PAIRS, PAIRS[0]], "data set: '8 rows "),
    ],
)
def test_a_file_of_another_function_metric_or_data_set_is_refused(
    fn: Any, metric: Any, rows: Any, what: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    evaluated(right, PAIRS, resume=path)
    before = path.read_bytes()
    text = refused(fn, rows, metric, resume=path)
    assert f"is of another {what}" in text
    assert path.read_bytes() == before
    new = {"function": "polite", "metric": "loosely", "data set": " rows "}[what.partition(":")[0]]
    assert new in text.partition(", not ")[2]


def test_what_a_function_is_includes_what_it_closes_over_and_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    evaluated(asking(0.5), PAIRS, resume=path)
    evaluated(asking(0.5), PAIRS, resume=path)
    assert "another function" in refused(asking(0.7), PAIRS, resume=path)
    other, path = tmp_path / "other.jsonl", tmp_path / "lock.jsonl"
    evaluated(asking(0.5, threading.Lock()), PAIRS, resume=path)  # a lock has no form
    evaluated(asking(0.5, threading.Lock()), PAIRS, resume=path)
    evaluated(polite, PAIRS, resume=other)
    ruder = FunctionType(polite.__code__, globals(), "polite", ("at once",))
    ruder.__qualname__, ruder.__module__ = polite.__qualname__, polite.__module__
    assert "another function" in refused(ruder, PAIRS, resume=other)


def test_a_list_that_a_function_appends_to_makes_it_no_other(tmp_path: Path) -> None:
    calls = list[str]()

    async def ask(text: str) -> str:
        calls.append(text)
        return await often(text)

    first = evaluated(ask, PAIRS, resume=tmp_path / "run.jsonl")
    second = evaluated(retry(ask), PAIRS, resume=tmp_path / "run.jsonl")
    assert calls == [question for question, _ in PAIRS] + ["question 2"]
    assert [row.score for row in first.rows] == [row.score for row in second.rows]


def test_what_a_model_is_includes_its_parameters(
    connect: Connect, server: Server, tmp_path: Path
) -> None:
    server.play(OPENAI.good("right"))
    ask, path = connect(OPENAI), tmp_path / "run.jsonl"
    evaluated(ask, [("a", "right")], resume=path)
    evaluated(retry(cache(ask)), [("a", "right")], resume=path)
    assert "another function" in refused(ask.using(temperature=1), [("a", "right")], resume=path)
    assert len(server.requests) == 1
    assert "sk-no-secret" not in path.read_text()


class Asker:
    """A callable without a canonical form."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    async def __call__(self, text: str) -> str:
        """The answer."""
        return await right(text)


def test_callables_and_partials_can_be_resumed(tmp_path: Path) -> None:
    for n, make in enumerate([Asker, lambda: functools.partial(polite, please="now")]):
        path = tmp_path / f"{n}.jsonl"
        evaluated(make(), PAIRS, resume=path)
        before = path.read_bytes()
        evaluated(make(), PAIRS, resume=path)
        assert path.read_bytes() == before


@dataclass
class Answering:
    """A dataclass with an attribute that is no field."""

    name: str
    more: dataclasses.InitVar[float] = 0.0

    def __post_init__(self, more: float) -> None:
        self.inner = Config(more)

    async def ask(self, text: str) -> str:
        """The answer."""
        return await right(text)


def test_all_attributes_of_a_dataclass_count(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        evaluated(Answering("a").ask, PAIRS, resume=path)
    assert len(asked) == len(PAIRS)
    for other in (Answering("b"), Answering("a", 1.0)):
        assert "another function" in refused(other.ask, PAIRS, resume=path)


class Config:
    """A part of a bot, with slots."""

    __slots__ = ("lock", "temperature")

    def __init__(self, temperature: float) -> None:
        self.temperature, self.lock = temperature, threading.Lock()


class Bot:
    """An object that answers, and remembers."""

    def __init__(self, model: Any, temperature: float = 0.0) -> None:
        self.model, self.config, self.lock = model, Config(temperature), threading.Lock()
        self.calls, self.count, self.me = list[str](), 0, self

    async def ask(self, text: str) -> str:
        """The answer."""
        return await self(text)

    async def __call__(self, text: str) -> str:
        """The answer."""
        self.calls.append(text)
        self.count += 1
        return str(await self.model(text))

    retried = retry(ask)


def closing_over(bot: Bot) -> Any:
    """A function that has a bot."""

    async def ask(text: str) -> str:
        return await bot(text)

    return ask


HOLDING: dict[str, Callable[[Bot], Any]] = {
    "a method": lambda bot: bot.ask,
    "a method that is retried": lambda bot: bot.retried,
    "a retried method": lambda bot: retry(bot.ask),
    "an object": lambda bot: bot,
    "a closure": closing_over,
    "a partial": lambda bot: functools.partial(bot.ask),
}


@pytest.mark.parametrize("holding", HOLDING)
def test_objects_are_told_apart_by_what_is_in_them(holding: str, tmp_path: Path) -> None:
    make, path = HOLDING[holding], tmp_path / "run.jsonl"
    evaluated(make(Bot(right)), PAIRS, resume=path)
    evaluated(make(Bot(right)), PAIRS, resume=path)
    assert len(asked) == len(PAIRS)
    for other in (Bot(often), Bot(right, 0.5)):
        assert "another function" in refused(make(other), PAIRS, resume=path)


@pytest.mark.parametrize("holding", HOLDING)
def test_what_an_object_remembers_of_a_run_makes_it_no_other(holding: str, tmp_path: Path) -> None:
    bot, path = Bot(often), tmp_path / "run.jsonl"
    for _ in range(3):
        evaluated(HOLDING[holding](bot), PAIRS, resume=path)
    assert bot.calls == [question for question, _ in PAIRS] + ["question 2"] * 2
    bot.model = right
    assert "another function" in refused(HOLDING[holding](bot), PAIRS, resume=path)


async def test_two_runs_at_once_are_of_one_function(tmp_path: Path) -> None:
    async def both(bot: Bot) -> None:
        paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
        await asyncio.gather(*(evaluate(bot.ask, PAIRS, resume=path) for path in paths))

    await both(Bot(right))
    await both(Bot(right))
    assert len(asked) == 2 * len(PAIRS)


@pytest.mark.parametrize(
    "code", ["async def ask(self, text): return 'other'", "def part(self): return 'other'",
             "wait = 2", "async def __call__(self, text): return 'other'"],
)  # fmt: skip
@pytest.mark.parametrize("base", ["", "@dataclasses.dataclass"])
@pytest.mark.parametrize("name", ["ask", "__call__", ""])
def test_changed_code_of_a_class_is_another_function(
    code: str, base: str, name: str, tmp_path: Path
) -> None:
    program = f"""
import dataclasses
{base}
class Bot:
    wait = 1
    async def ask(self, text): return self.part()
    async def __call__(self, text): return self.part()
    def part(self): return "a"
    {{}}
bot = Bot()"""

    def bot(code: str) -> Any:
        there: dict[str, Any] = {"__name__": "changed"}
        exec(program.format(code), there)
        return getattr(there["bot"], name) if name else there["bot"]

    path = tmp_path / "run.jsonl"
    evaluated(bot("pass"), PAIRS, resume=path)
    evaluated(bot("pass"), PAIRS, resume=path)
    assert "another function" in refused(bot(code), PAIRS, resume=path)


@pytest.mark.parametrize("kind", ["method", "object", "closure"])
def test_objects_are_the_same_in_another_process(kind: str, tmp_path: Path) -> None:
    for _ in range(2):
        printed, problems = worker("bot", kind, str(tmp_path / "run.jsonl")).communicate(timeout=30)
        assert printed, problems
    assert json.loads(printed) == 0


def test_an_object_of_a_script_is_the_same_in_what_the_script_spawns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.jsonl"
    for module in ("__main__", "__mp_main__"):
        monkeypatch.setitem(sys.modules, module, pytest)  # a script may stand among packages
        there: dict[str, Any] = {"__name__": module}
        exec("class Bot:\n async def ask(self, text): return text", there)
        evaluated(there["Bot"]().ask, PAIRS, resume=path)
    assert len(lines_of(path)) == 1 + len(PAIRS)


def test_a_metric_that_is_an_object_is_told_apart(tmp_path: Path) -> None:
    class Near:
        def __init__(self, by: float) -> None:
            self.by, self.lock = by, threading.Lock()

        def __call__(self, output: Any, expected: Any) -> float:
            return self.by

    evaluated(right, PAIRS, Near(0.1), resume=tmp_path / "run.jsonl")
    assert "another metric" in refused(right, PAIRS, Near(0.2), resume=tmp_path / "run.jsonl")


def test_rows_in_another_order_are_the_same_data_set(tmp_path: Path) -> None:
    rows, path = [*PAIRS, *PAIRS[:3]], tmp_path / "run.jsonl"
    evaluated(right, rows, resume=path)
    report = evaluated(right, rows[::-1], resume=path)
    assert [row.output for row in report.rows] == [answer for _, answer in rows[::-1]]
    assert len(asked) == 11


def test_failed_rows_are_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = evaluated(often, PAIRS, resume=path)
    assert len(asked) == 8
    second = evaluated(often, PAIRS, resume=path)
    assert asked[8:] == ["question 2"]
    assert [row.error for row in second.rows] == [row.error for row in first.rows]
    assert len(lines_of(path)) == 8


def test_a_resumed_row_has_its_score_cost_and_time_and_a_plain_output(tmp_path: Path) -> None:
    async def ask(text: str) -> Any:
        await anyio.sleep(0.002)
        return Reply("Paris", "Paris") if text == "a" else {"b": [math.nan, {1}], 2: Asker}

    async def first(output: Any, expected: Any) -> float:
        return 0.25

    path = tmp_path / "run.jsonl"
    rows = [{"input": "a", "id": 1}, {"input": "b", "id": 2}]
    one, two = (evaluated(ask, rows, first, resume=path) for _ in range(2))
    assert [row.output for row in two.rows] == ["Paris", {"b": [None, "{1}"], "2": str(Asker)}]
    for before, after in zip(one.rows, two.rows, strict=True):
        assert (before.score, before.cost, before.seconds, before.extra) == (
            after.score, after.cost, after.seconds, after.extra,
        )  # fmt: skip
    assert (one.p50, one.p95, one.mean) == (two.p50, two.p95, two.mean)


def test_a_row_without_a_canonical_form_is_refused_by_its_number(tmp_path: Path) -> None:
    rows = [("a", "b"), (threading.Lock(), "b")]
    text = refused(right, rows, resume=tmp_path / "run.jsonl")
    assert text.startswith("row 2: <unlocked _thread.lock")
    assert evaluated(right, rows).n == 2


def test_two_processes_cannot_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    other = worker("hold", str(path))
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "running\n"
        text = refused(evaluate_worker.long, [("a", "a")], resume=path)
        assert f"another run adds to resume={str(path)!r}" in text
    finally:
        other.kill()
        other.communicate(timeout=10)
    assert "another function" in refused(right, [("a", "a")], resume=path)


def test_on_a_full_disk_an_evaluation_ends_and_goes_on_later(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    printed, problems = worker("full", str(path), "10000").communicate(timeout=30)
    assert printed == '"SetupError"\n100\n', problems
    assert len({line["key"] for line in lines_of(path)[1:]}) == 100


def test_the_folder_of_a_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no_such"):
        evaluated(right, PAIRS, resume=tmp_path / "no_such" / "run.jsonl")


# ── Statistics ───


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718), (29, 29, 0.8830, 1.0), (0, 1, 0.0, 0.7935), (1, 1, 0.2065, 1.0),
    ],
)  # fmt: skip
def test_the_interval_of_ones_and_zeros_is_wilsons(
    successes: int, n: int, low: float, high: float
) -> None:
    report = report_on([1.0] * successes + [0.0] * (n - successes))
    assert report.interval == pytest.approx((low, high), abs=6e-5)
    assert 0 <= report.interval[0] <= report.mean <= report.interval[1] <= 1


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 49, 1000])
def test_the_interval_of_none_begins_at_0_and_that_of_all_ends_at_1(n: int) -> None:
    assert report_on([0.0] * n).interval[0] == 0.0
    assert report_on([1.0] * n).interval[1] == 1.0


DRAWS: dict[str, tuple[Callable[[np.random.Generator, Any], Any], float]] = {
    "beta": (lambda random, size: random.beta(8, 3, size), 8 / 11),
    "skewed": (lambda random, size: np.minimum(1, random.exponential(0.25, size)),
               0.25 * (1 - math.exp(-4))),
    "bimodal": (lambda random, size: np.where(random.random(size) < 0.6, random.beta(20, 2, size),
                                              random.beta(2, 20, size)), 12.8 / 22),
}  # fmt: skip


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("shape", DRAWS)
def test_95_percent_of_the_intervals_have_the_mean(
    shape: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, mean = DRAWS[shape]
    random, means = np.random.default_rng(7), intervals._means
    monkeypatch.setattr(intervals, "_means", lambda values: means(values, 1000))
    found = [intervals.interval(draw(random, n)) for _ in range(500)]
    inside = sum(low <= mean <= high for low, high in found)
    assert 0.925 <= inside / 500 <= 0.975


def test_the_interval_is_the_same_each_time_and_goes_with_the_t_distribution() -> None:
    scores = list(np.random.default_rng(1).normal(0.5, 0.1, 12))
    report = report_on(scores)
    assert report.interval == report_on(scores).interval
    half = 2.201 * np.std(scores, ddof=1) / math.sqrt(12)
    low, high = report.interval
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)
    assert low < report.mean < high


def test_small_and_constant_data_sets_have_an_interval_that_says_so() -> None:
    assert all(map(math.isnan, report_on([0.5]).interval))
    assert report_on([0.5] * 5).interval == (0.5, 0.5)
    assert report_on([0.2, 0.8]).interval == (0.2, 0.8)


def test_p50_and_p95_are_of_answered_rows() -> None:
    rows = [Row(n, n, seconds=float(n)) for n in range(1, 101)]
    rows += [Row(n, n, error="Timeout: late", seconds=1e6) for n in range(5)]
    report = evidence._report("", rows, 0.0)
    assert (report.p50, report.p95) == (50, 95)
    assert math.isnan(evidence._report("", rows[-1:], 0.0).p50)


# ── compare ───


def binomial(won: int, lost: int) -> float:
    """The two-sided p of so many wins and losses."""
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


def votes(won: int, lost: int, both: int = 0, neither: int = 0) -> tuple[Report, Report]:
    """Two reports where the first alone is right so often, and so on."""
    first = [1.0] * won + [0.0] * lost + [1.0] * both + [0.0] * neither
    second = [0.0] * won + [1.0] * lost + [1.0] * both + [0.0] * neither
    return report_on(first), report_on(second)


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (0, 6, 0.03125), (4, 4, 1.0),
     (10, 2, 0.03857421875), (2, 10, 0.03857421875), (1, 8, 0.0390625), (21, 9, 0.042773945257)],
)  # fmt: skip
def test_ones_and_zeros_are_compared_by_mcnemars_exact_test(won: int, lost: int, p: float) -> None:
    first, second = votes(won, lost, both=30, neither=10)
    found = first.compare(second)
    assert found.p == pytest.approx(p, abs=1e-9)
    assert found.p == pytest.approx(binomial(won, lost))
    assert found.difference == pytest.approx((won - lost) / first.n)
    back = second.compare(first)
    assert (back.difference, back.p) == (-found.difference, found.p)
    assert back.interval == pytest.approx((-found.interval[1], -found.interval[0]))


def test_the_interval_of_paired_shares_is_bonett_and_prices() -> None:
    # (b, c, n) = (12, 5, 50): shares 13/52 and 6/52, so 0.134615 -+ 1.96 sqrt(0.347263 / 52)
    first, second = votes(12, 5, both=20, neither=13)
    assert first.compare(second).interval == pytest.approx((-0.025553, 0.294784), abs=2e-6)
    low, high = votes(3, 0)[0].compare(votes(3, 0)[1]).interval
    assert -1 <= low < high <= 1


def test_many_discordant_rows_have_an_exact_p() -> None:
    first, second = votes(5200, 4800)
    assert first.compare(second).p == pytest.approx(6.5e-5, rel=0.05)
    assert first.compare(second).p == pytest.approx(math.erfc(399 / 100 / math.sqrt(2)), rel=0.01)


def test_other_scores_are_compared_by_a_paired_bootstrap() -> None:
    random = np.random.default_rng(3)
    base = random.random(200)
    shift = random.normal(0, 0.1, 200)
    first, second = report_on(list(base + shift - shift.mean() + 0.02)), report_on(list(base))
    found = first.compare(second)
    error = 0.1 * np.std(shift / 0.1, ddof=1) / math.sqrt(200)
    assert found.difference == pytest.approx(0.02)
    assert found.interval == pytest.approx((0.02 - 1.972 * error, 0.02 + 1.972 * error), abs=0.002)
    assert found.p == pytest.approx(math.erfc(0.02 / error / math.sqrt(2)), abs=0.003)
    assert second.compare(first).p == pytest.approx(found.p, abs=1e-9)
    same = first.compare(first)
    assert (same.difference, same.interval, same.p) == (0, (0, 0), 1)
    far = report_on(list(base + 0.5 + shift / 10)).compare(second)
    assert far.p == pytest.approx(1e-4, rel=0.01)
    assert math.isnan(report_on([0.5]).compare(report_on([0.7])).p)


def test_equal_reports_are_found_different_in_about_5_percent_of_cases() -> None:
    random = np.random.default_rng(5)
    ps = [intervals.paired(random.normal(0, 1, 40), 1000)[1] for _ in range(500)]
    assert 0.03 <= np.mean(np.array(ps) < 0.05) <= 0.08


def test_rows_are_paired_by_content_and_occurrence_in_any_order() -> None:
    rows = [("a", 1), ("b", 1), ("a", 1), ({"x": [1, 2]}, None)]
    scores, order = (1, 0, 0, 1), [3, 0, 1, 2]
    scored = [Row(*row, score=score) for row, score in zip(rows, scores, strict=True)]
    first = evidence._report("", scored, 0.0)
    second = evidence._report("", [first.rows[at] for at in order], 0.0)
    assert first.compare(second).difference == 0
    assert first.compare(second).p == 1


def test_reports_on_other_rows_are_not_compared() -> None:
    with pytest.raises(SetupError) as caught:
        report_on([1, 0, 1]).compare(report_on([1, 0]))
    assert "1 rows are only in the first, and 0 only in the other" in str(caught.value)
    with pytest.raises(SetupError, match=r"row 1: .* has no canonical form"):
        first = evidence._report("", [Row(threading.Lock(), 1)], 0.0)
        first.compare(first)


def test_a_comparison_reads_well() -> None:
    first, second = votes(10, 2, both=30, neither=8)
    said = "+0.1600, 95% interval +0.0192 to +0.2885, p = 0.0386"
    assert str(first.compare(second)) == said


# ── Reports as texts ───


def test_a_report_prints_as_a_summary_with_the_first_failures() -> None:
    rows = [Row(f"question {n}", "", score=float(n % 2), cost=0.001) for n in range(993)]
    rows += [Row("x" * 99, "", error=f"ValueError: {n}{'y' * 99}", cost=0.0) for n in range(7)]
    lines = str(evidence._report("exact of ask", rows, 1.0)).split("\n")
    assert lines[0].startswith("exact of ask: 1,000 rows in ")
    assert lines[1:5] == [
        "  mean      0.4960, 95% interval 0.4651 to 0.5269",
        "  latency   p50 0.000 s, p95 0.000 s",
        "  cost      $0.993000",
        "  failures  7",
    ]
    assert lines[5].startswith("    ValueError: 0yyy")
    assert lines[-1] == "    and 2 more"
    assert len(lines) == 11
    assert max(map(len, lines)) <= 110


def test_a_report_without_failures_has_no_list_of_them() -> None:
    assert str(report_on([1, 1])).endswith("failures  0")


class Colour(enum.Enum):
    """An enum, as `output=` may have."""

    RED = "red"


@dataclass
class City:
    """A type of the user's own."""

    name: str


def test_a_report_is_strict_json_whatever_the_outputs() -> None:
    outputs: list[Any] = [
        "text", 1, None, math.nan, [math.inf, {"a": -math.inf}], {1: 2}, {(1, 2): 3}, {1, 2},
        Reply("Paris", "Paris"), City("Paris"), Colour.RED, b"\xff", "\ud800", np.float32(0.5),
        threading.Lock(),
    ]  # fmt: skip
    circle: list[Any] = []
    circle.append(circle)
    rows = [Row("q", None, output) for output in [*outputs, circle]]
    rows.append(Row("q", None, error="ValueError: no"))
    told = json.loads(evidence._report("exact of ask", rows, 0.0).to_json(), parse_constant=int)
    found = [row["output"] for row in told["rows"]]
    assert found[:6] == ["text", 1, None, None, [None, {"a": None}], {"1": 2}]
    assert found[6:11] == ["{(1, 2): 3}", "{1, 2}", "Paris", {"name": "Paris"}, "Colour.RED"]
    assert found[12] == "\ud800"
    assert (told["n"], told["mean"], told["name"]) == (17, 0, "exact of ask")
    assert [row["error"] for row in told["failures"]] == ["ValueError: no"]
    assert {*told["rows"][0]} == {
        "input", "expected", "output", "score", "error", "seconds", "cost", "extra",
    }  # fmt: skip
    lonely = json.loads(report_on([0.5]).to_json(), parse_constant=int)
    assert lonely["interval"] == [None, None]


# ── Metrics ───


@pytest.mark.parametrize(
    ("output", "expected", "score"),
    [
        ("Paris", "Paris", True), (" Paris\n", "Paris", True), ("Paris", " Paris ", True),
        ("paris", "Paris", False), ("Paris.", "Paris", False), ("", "", True), ("", None, False),
        (None, None, True), (None, "None", False), ("None", None, False), (42, 42.0, True),
        (42, "42", True), ("42", 42, True), (True, "True", True), ("b", ["a", "b"], True),
        ("c", ["a", "b"], False), (["a", "b"], ["a", "b"], True), (["a"], ["a", "b"], False),
        ([], [], True), ("", [], False), ({"a": 1}, {"a": 1}, True), ((1, 2), (1, 2), True),
        (City("Paris"), City("Paris"), True), (Colour.RED, "red", True),
        (42.0, "42", True), ("42.0", 42, True), (0.1, " 0.10", True), ("1e3", 1000, True),
        (42.5, "42", False), (2**60 + 1, str(2**60), False), (7, ["8", "7.0"], True),
        ("42.0", "42", False), (42, "x", False), (math.nan, "nan", True), (math.nan, "1", False),
        (True, "true", True), ("false", False, True), (True, "1", False), (True, "false", False),
        ("TRUE", "true", False), (42, "sNaN", False),
        (Reply("Paris", "Paris"), "Paris", True), (Reply('{"value": 42}', 42), "42", True),
        (Reply("{}", City("Rome")), City("Rome"), True), (Reply("", Colour.RED), "red", True),
    ],
)  # fmt: skip
def test_exact_compares_values_and_texts(output: Any, expected: Any, score: bool) -> None:
    assert exact(output, expected) is score


@pytest.mark.parametrize(
    ("output", "expected", "score"),
    [
        ("It is Paris, France.", "paris", True), ("It is\n  new\tYork", "New York", True),
        ("STRASSE", "straße", True), ("London", "Paris", False),
        ("Lutetia", ["Paris", "lut"], True),
        ("London", [], False), ("17", 7, True), (Reply("x", "It is Paris"), "paris", True),
        ("x", "", True), (["Paris", "Rome"], "rome", True),
    ],
)  # fmt: skip
def test_contains_ignores_case_and_spaces(output: Any, expected: Any, score: bool) -> None:
    assert contains(output, expected) is score


@pytest.mark.parametrize(
    ("output", "expected", "score"),
    [
        ("The Eiffel Tower", "eiffel tower", 1.0), ("an Eiffel, tower!", "The eiffel-tower", 0.0),
        ("", "", 1.0), ("the", "a", 1.0), ("", "Paris", 0.0), ("Paris", "", 0.0), ("...", "", 1.0),
        ("in Paris in spring", "Paris", 2 / 5), ("a b b c", "b b d", 4 / 6), ("x y", "p q", 0.0),
        ("Denver Broncos", ["Broncos", "Denver Broncos"], 1.0), ("x", [], 0.0), (42, "42", 1.0),
        ("“Paris”", "Paris", 1.0), ("Anna", "nna", 0.0), (Reply("", "the cat"), "cat", 1.0),
    ],
)  # fmt: skip
def test_f1_counts_shared_words_as_squad(output: Any, expected: Any, score: float) -> None:
    assert f1(output, expected) == pytest.approx(score)


NUMBERS: list[tuple[Any, float | None]] = [
    ("72", 72), ("She has 72 apples.", 72), ("$1,234.50.", 1234.5), ("-3", -3), ("= -3", -3),
    ("(-3)", -3), ("\u22125", -5), ("3/4", 0.75), ("3 / 4 of it", 0.75), ("-3/4", -0.75),
    ("1.5/2", 0.75), ("10 / 2 = 5", 5), ("1e-3", 1e-3), ("1E+3", 1000),
    ("about 2.5e6 people", 2.5e6),
    ("3 apples and 4 pears make 7 fruits", 7), ("12,345,678", 12345678), ("1,2,3", 3),
    ("It costs 5kg", 5), (".5", 0.5), ("-.5", -0.5), ("2.", 2), ("+7", 7), ("0", 0), ("-0", 0),
    ("**42**", 42), ("_42_", 42), ("`42`", 42), ("x=42", 42), ("\u20ac20", 20),
    ("-$5", -5), ("$-5", -5),
    ("US$5", 5), ("Rs.500", 500), ("12 \u2013 5 = 7", 7), ("pages 3\u20135", 5), ("10-3", 3),
    ("GPT-4 says 7", 7), ("CO2 is 44 g", 44), ("so 44 g of H2O", 44), ("it is 25 m^2", 25),
    ("1.2 \\times 10^{5}", 1.2e5), ("6.02 \u00d7 10^23 of them", 6.02e23), ("3 x 10^-2", 0.03),
    ("#### 72", 72), ("5 + 3\n#### $1,000", 1000), ("####-12", -12), ("#### 7\nI used 2 steps", 7),
    ("#### 2. Compute\nso it is 7", 7), ("### Step 3\nit is 9", 9), ("#### 2) Sum: 4", 4),
    ("\\boxed{42} in 3 steps", 42), ("\\boxed{ -7 }", -7), ("$\\boxed{1{,}234}$ by 5", 1234),
    ("\\boxed{\\frac{3}{4}} by 9", 0.75), ("\\boxed{-\\dfrac{7}{2}}", -3.5),
    ("first \\boxed{1}, then \\boxed{2}; 3 lines", 2), ("\\boxed{\\text{12 cm}} at 90 degrees", 12),
    ("half", None), ("", None), ("NaN", None), ("inf", None), ("1/0", math.nan),
    ("\\boxed{x} and 5", None), (7, 7), (0.1, 0.1), (1e-7, 1e-7), (1e22, 1e22),
    (Reply("x", 7), 7), (Reply("7", "It is 7."), 7), ("10:30", 30), ("1" * 400, math.inf),
]  # fmt: skip


@pytest.mark.parametrize(("output", "value"), NUMBERS)
def test_numeric_finds_the_number_that_a_text_settles_on(output: Any, value: float | None) -> None:
    found = metrics._number(output)
    assert found == (() if value is None else pytest.approx((value,), nan_ok=True))
    if value is not None and math.isfinite(value):
        assert numeric(output, value)
        assert not numeric(output, 2 * value + 1)
        assert not numeric(output, -value) or not value


@pytest.mark.parametrize(
    ("output", "expected", "score"),
    [
        ("50%", "50%", True), ("50%", 50, True), ("50 %", 0.5, True), ("50\\%", 0.5, True),
        ("0.5", "50%", True), ("50 percent", "50%", True),
        ("50%", "0.5%", False), ("5%", 50, False),
        ("33.3333333", "33.33333331", True), ("33.3", "33.333", False), ("1e-9", 0, False),
        ("0.0", 0, True), ("100", 100.00001, True), ("100", 100.1, False), ("no", 5, False),
        ("The total is #### 5", "4 + 1 = 5\n#### 5", True), ("1e999", 5, False),
    ],
)  # fmt: skip
def test_numeric_knows_per_cent_and_tolerance(output: Any, expected: Any, score: bool) -> None:
    assert numeric(output, expected) is score


def test_numeric_takes_a_tolerance_and_refuses_what_is_no_number() -> None:
    assert numeric("104", 100, tolerance=0.05)
    assert not numeric("106", 100, tolerance=0.05)
    for expected in (None, "many", "", True):
        with pytest.raises(ValueError, match="has no number"):
            numeric("5", expected)


LETTERS = [
    ("B", "B"), ("b", "B"), (" B.\n", "B"), ("(b)", "B"), ("**B**", "B"), ("A", "A"), ("I", "I"),
    ("[[B]]", "B"), ('"B"', "B"), ("`B`", "B"), ("B) Paris", "B"),
    ("b) Paris", "B"), ("B. Paris", "B"),
    ("B: Paris", "B"), ("**B. Paris**", "B"), ("**(B) Paris**", "B"),
    ("C, because A is wrong", "C"),
    ("\\boxed{B}", "B"), ("$\\boxed{\\text{(C)}}$ is it, not (A)", "C"),
    ("My final answer is: $\\boxed{\\mathrm{D}}$.", "D"), ("<answer>B</answer>", "B"),
    ("Answer: B", "B"), ("**Answer:** B", "B"), ("**Answer**: **C**", "C"), ("Answer:\n\nD", "D"),
    ("ANSWER: B", "B"), ("the answer IS B", "B"), ("Answer - B", "B"), ("Answer (B)", "B"),
    ("answer: c", "C"), ("the answer is b.", "B"), ("The answer is 'B'.", "B"),
    ("The answer is \u201cB\u201d.", "B"), ("The answer is A because it is", "A"),
    ("The answer is: **A**. A cat is a mammal.", "A"), ("The answer is A, B is not", "A"),
    ("The answer would be C", "C"), ("The answer to this question is D", "D"),
    ("The correct answer is option D.", "D"),
    ("Therefore, the correct answer is:\n\n**B) 12**", "B"),
    ("The correct choice is **B. Paris**", "B"), ("The best option is A.", "A"),
    ("Option B is correct.", "B"),
    ("(A) and (C) are wrong. (B) is the correct answer, not (D).", "B"),
    ("The answer is not A, it is B", "B"), ("The answer is not A. It's B.", "B"),
    ("It must be E", "E"), ("not A but B", "B"), ("It is not (A) but (C)", "C"),
    ("(B), not (A)", "B"), ("I first thought the answer is A, but the answer is C.", "C"),
    ("The answer is (B). Option (A) is wrong, and so is (C).", "B"),
    ("A) London: no\nB) Paris: yes\nThe answer is B.", "B"), ("Let me think.\n\nB", "B"),
    ("A good question. I think (C)", "C"), ("I'd go with C.", "C"), ("So, (B).", "B"),
    ("The answer is a tricky one, but I would say (D).", "D"),
    ("Option D", "D"), ("Choice D", "D"), ("Option B: Paris", "B"), ("Option B.", "B"),
    ("option b", "B"), ("Answer B", "B"), ("Letter B", "B"), ("I choose option C.", "C"),
    ("The best choice here is option A because it fits.", "A"), ("**Option C**", "C"),
    ("Among the options, D fits best.", "D"), ("D) Paris\n\nA) London is wrong", "D"),
    ("Option B fits. Option A is too small.", "B"), ("Option (A) is wrong; option (B)", "B"),
    ("**B. Paris**\n\nA) lies in England, C) in Spain.", "B"), ("It has to be (B).", "B"),
    ("A) London: no.\n\nB) Paris: yes. So B.", "B"), ("A) London: no\nB) Paris: yes", "B"),
    ("The right answer is therefore **B) Paris**", "B"), ("B is the answer", "B"), ("So: B", "B"),
    ("**B**\n\nExplanation: A and C are wrong.", "B"), ("not option A", ""),
    ("Option A is wrong", ""), ("an option a friend has", ""), ("The answer I gave", ""),
    ("A good question.", ""), ("I would say so", ""), ("I think so. A lot.", ""), ("", ""),
    ("Answer: I don't know", ""), ("Answer: A dog", ""), ("It isn't (A).", ""), ("Paris", ""),
    ("The answer is e.g. nothing", ""), ("A cat. I like it.", ""), ("none of them", ""),
]  # fmt: skip


@pytest.mark.parametrize(("output", "letter"), LETTERS)
def test_choice_finds_the_letter_that_a_text_settles_on(output: str, letter: str) -> None:
    assert metrics._letter(output) == letter
    if letter:
        assert choice(output, letter)
        assert choice(Reply("", output), f"({letter.lower()})")
    assert not choice(output, "Z")


def test_choice_refuses_an_expected_value_that_is_no_letter() -> None:
    for expected in (None, 2, "Paris", ""):
        with pytest.raises(ValueError, match="names no letter"):
            choice("B", expected)


@pytest.mark.parametrize("text", ["answer is " + "-" * 50_000, " " * 50_000, "answer" * 5_000,
                                  "(" * 50_000, "1," * 30_000, "\\boxed{" * 5_000, "_" * 50_000,
                                  "option " * 8_000, "the choice is " * 4_000, "\n" * 50_000])
def test_metrics_are_quick_on_odd_texts(text: str) -> None:
    assert not choice(text, "Z")
    assert not numeric(text, 12345)
    assert f1(text, "Z") == 0


def test_metrics_refuse_a_row_without_an_expected_value() -> None:
    for metric in (contains, f1):
        with pytest.raises(ValueError, match="no expected value"):
            metric("text", None)


def test_graded_asks_a_model_if_the_output_is_correct(connect: Connect, server: Server) -> None:
    def grade(seen: Seen) -> Answer:
        asked_for = prompt_of(seen) + json.dumps(seen.json)
        correct = "the capital of France" in asked_for
        return OPENAI.good(json.dumps({"reasoning": "I looked", "correct": correct}))

    server.play(grade)
    metric = graded(connect(OPENAI), "Other words are fine. {Braces} too.")
    rows = [("the capital of France", "Paris"), ("a town", "Paris"), ("a town", None)]

    async def same(text: str) -> str:
        return text

    report = evaluated(same, rows, metric)
    assert [row.score for row in report.rows] == [1, 0, 0]
    assert report.failures == []
    assert report.cost == 0
    assert "Other words are fine. {Braces} too." in json.dumps(server.requests[0].json)


# ── load ───


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    """A file."""
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


OBJECTS = [{"input": "a", "expected": "1"}, {"input": "b\u2028\u00e9", "expected": "2"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", "\n".join(map(json.dumps, OBJECTS))),
        ("x.ndjson", "\ufeff" + '{"input": "a", "expected": "1"}\r\n\r\n'
                     '{"input": "b\u2028\u00e9", "expected": "2"}'),
        ("x.JSONL", "\n\n" + "\n  \n".join(map(json.dumps, OBJECTS)) + "\n\n"),
        ("x.json", "\ufeff" + json.dumps(OBJECTS, indent=2)),
        ("x.csv", "input,expected\na,1\n\nb\u2028\u00e9,2\n"),
        ("x.csv", '\ufeffinput,expected\r\n"a","1"\r\n"b\u2028\u00e9",2'),
        ("x.TSV", "input\texpected\na\t1\nb\u2028\u00e9\t2"),
    ],
)  # fmt: skip
def test_load_reads_each_format(name: str, content: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    assert load(path) == load(str(path)) == OBJECTS


def test_load_reads_arrays_and_cells_with_anything_in_them(tmp_path: Path) -> None:
    assert load(written(tmp_path, "x.jsonl", '["a", 1]\n[{"b": 2}, null]')) == [
        ["a", 1], [{"b": 2}, None],
    ]  # fmt: skip
    cells = 'input,expected\n"say ""hi"",\nthen\r\n\ngo",1\n,\n'
    assert load(written(tmp_path, "x.csv", cells)) == [
        {"input": 'say "hi",\nthen\r\n\ngo', "expected": "1"}, {"input": "", "expected": ""},
    ]  # fmt: skip
    assert load(written(tmp_path, "x.csv", "input,expected\n")) == []
    assert load(written(tmp_path, "x.jsonl", "")) == []


@pytest.mark.parametrize(
    ("name", "content", "line", "what"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": }\n', 3, "no JSON: Expecting value"),
        ("x.jsonl", '{"a": 1}\n"text"\n', 2, "'text' is no object or array"),
        ("x.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', 3, "no UTF-8: invalid start byte"),
        ("x.jsonl", "[" * 100_000, 1, "no JSON: "),
        ("x.json", '[\n{"a": 1},\n{"a" 2}\n]', 3, "no JSON: Expecting ':' delimiter"),
        ("x.jsonl", '{"a": 1}\n{bad}\n', 2,
         "no JSON: Expecting property name enclosed in double quotes. Mend"),
        ("x.json", '{"a": 1}', 1, "no array of rows"),
        ("x.json", "", 1, "no JSON: Expecting value"),
        ("x.json", b"[\n\xff]", 2, "no UTF-8"),
        ("x.csv", "a,b\n1,2\n3,4,5\n", 3, "not as many cells as the 2 columns"),
        ("x.csv", 'a,b\n"1\n\n1",2\n3\n', 5, "not as many cells as the 2 columns"),
        ("x.csv", "", 1, "no header"),
        ("x.csv", "a,\n1,2\n", 1, "no header"),
        ("x.csv", "a,a\n1,2\n", 1, "no header"),
        ("x.csv", 'a,b\n"1"x,2\n', 2, "expected after"),
        ("x.csv", 'a,b\n1,"2\n', 2, "unexpected end of data"),
        ("x.tsv", b"a\tb\n1\t\xff\n", 2, "no UTF-8"),
    ],
)  # fmt: skip
def test_load_names_the_line_that_is_wrong(
    name: str, content: str | bytes, line: int, what: str, tmp_path: Path
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(SetupError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert what in str(caught.value)


@pytest.mark.parametrize(("rows", "what"), [([[1], 2], "row 2: 2"), (["a"], "row 1: 'a'")])
def test_rows_in_an_array_are_objects_or_arrays(rows: Any, what: str, tmp_path: Path) -> None:
    path = written(tmp_path, "x.json", json.dumps(rows))
    with pytest.raises(SetupError, match=f"x.json: {what} is no object or array"):
        load(path)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    rows = load(written(tmp_path, "x.csv", f"input,expected\n{'x' * 200_000},1\n"))
    assert len(rows[0]["input"]) == 200_000


def test_load_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"x\.txt is of no kind that is read: \.jsonl"):
        load(written(tmp_path, "x.txt", "a"))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.jsonl")


def test_a_sample_is_the_same_on_each_machine_and_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, "x.jsonl", "\n".join(f"[{n}, 0]" for n in range(100)))
    assert [row[0] for row in load(path, sample=5)] == SAMPLES[0]
    assert [row[0] for row in load(path, sample=5, seed=1)] == SAMPLES[1]
    assert load(path, sample=100) == load(path)
    assert {row[0] for row in load(path, 4)} < {row[0] for row in load(path, 5)}


SAMPLES = [[15, 44, 46, 87, 99], [30, 39, 71, 72, 90]]


@pytest.mark.parametrize("sample", [0, -1, 4, 1.5, "2"])
def test_a_sample_that_cannot_be_taken_is_refused(sample: Any, tmp_path: Path) -> None:
    path = written(tmp_path, "x.jsonl", "[1]\n[2]\n[3]")
    with pytest.raises(SetupError, match=r"sample=.* of the 3 rows in .* Take 1 to 3"):
        load(path, sample)


def test_load_reads_parquet(tmp_path: Path) -> None:
    pyarrow, path = pytest.importorskip("pyarrow"), tmp_path / "x.parquet"
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(OBJECTS * 3), path)
    assert load(path) == OBJECTS * 3
    assert len(load(path, sample=2)) == 2


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.parquet")
    for content in (b"PAR1 garbage", b"", b"PAR1" + bytes(99) + b"PAR1"):
        path = written(tmp_path, "x.parquet", content)
        with pytest.raises(SetupError, match=r"x\.parquet is no Parquet file"):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.parquet")


def test_without_pyarrow_load_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SetupError, match=r"needs pyarrow\. Install it"):
        load(written(tmp_path, "x.parquet", b""))


def test_what_is_loaded_can_be_evaluated(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.csv"):
        rows = [{"input": q, "expected": a} for q, a in PAIRS]
        cells = "input,expected\n" + "\n".join(map(",".join, PAIRS))
        text = "\n".join(map(json.dumps, rows)) if name == "x.jsonl" else cells
        assert evaluated(right, load(written(tmp_path, name, text))).mean == 1


def test_what_is_read_in_a_file_has_one_home() -> None:
    assert evidence.load is datasets.load


# ── What networks return ───


@pytest.mark.parametrize(
    "output",
    [
        ember.Consensus(Reply("72", "72"), 1.0, {"72": 5}),
        ember.Verdict("72", 0, (9.0, 5.0), "It is 5."),
        ember.Verification(ok=True, reason="not 5", answer="72"),
    ],
)
@pytest.mark.parametrize("metric", [exact, numeric, contains, f1])
def test_a_metric_is_of_the_answer_of_a_network(metric: Any, output: Any) -> None:
    assert metric(output, "72") == 1
    assert metric(output, "5") == 0


@pytest.mark.parametrize("metric", [exact, numeric, contains, f1, choice])
async def test_several_answers_are_a_failure_of_the_row_and_no_silent_zero(metric: Any) -> None:
    async def several(question: str) -> list[Any]:
        return [Reply("B", "B"), Reply("B", "B")]

    report = await evaluate(several, [("q", "B")], metric)
    [row] = report.failures
    assert "2 replies are no output" in (row.error or "")


async def test_errors_have_two_frames_of_embers_at_most(tmp_path: Path) -> None:
    async def fails(question: str) -> str:
        raise SetupError("no key")

    async def fine(question: str) -> str:
        return question

    async def other(question: str) -> str:
        return question + "!"

    bad = tmp_path / "bad.jsonl"
    bad.write_text("5\n", encoding="utf-8")
    kept = tmp_path / "kept.jsonl"
    await evaluate(other, [("a", "a")], resume=kept)
    home = Path(ember.__file__).parent
    for call in (
        lambda: evaluate(fails, [("a", "a")]), lambda: evaluate(fine, [("a", "a")], resume=kept),
        lambda: evaluate(fine, [("a", "a")], resume=bad), lambda: asyncio.to_thread(load, bad),
    ):  # fmt: skip
        with pytest.raises(SetupError) as caught:
            await call()
        files = [Path(frame.path) for frame in caught.traceback]
        ours = [f for f in files if f == home / "ember.py" or home / "ember_accel" in f.parents]
        assert len(ours) <= 2, files


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_a_full_disk_is_named() -> None:
    full = pytest.raises(SetupError, match=r"/dev/full: No space left .* run this again")
    with Path("/dev/full").open("ab", buffering=0) as file, full:
        evidence._add(file, "a line\n")


async def test_an_output_in_the_file_and_in_json_is_what_json_holds_of_it(tmp_path: Path) -> None:
    @dataclass
    class City:
        name: str

    async def ask(question: str) -> City:
        return City(question)

    def right(output: Any, expected: str) -> bool:
        return (output if isinstance(output, dict) else vars(output))["name"] == expected

    for _ in range(2):
        report = await evaluate(ask, [("a", "a")], right, resume=tmp_path / "run.jsonl")
        assert json.loads(report.to_json())["rows"][0]["output"] == {"name": "a"}
    assert report.rows[0].output == {"name": "a"}
