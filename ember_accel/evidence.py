"""Evidence: what a function scores on a data set, how sure that is, and what it costs.

    from ember_accel import evaluate, load, numeric

    rows = load("gsm8k.jsonl", sample=200)  # {"input": "How many…", "expected": "72"}
    report = await evaluate(models.gpt4, rows, numeric, resume="gpt4.jsonl")
    print(report)
    print(report.compare(await evaluate(models.claude, rows, numeric)))

`datasets.py` has the rows, `metrics.py` scores what is answered. This file is read downwards:
scores make an interval, a report holds them all, and `evaluate` makes the report.
"""

# pyright: reportPrivateUsage=false
# What a function is, and which content is equal, is known to Ember's caches: its only home.

from __future__ import annotations

import contextlib
import inspect
import json
import math
import sys
import time
from collections import Counter
from collections.abc import AsyncIterable, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import ember
from ember import Fn, SetupError
from ember_accel.datasets import Short, digest, json_value, load, wrong_line
from ember_accel.intervals import interval, is_binary, mcnemar, paired
from ember_accel.metrics import choice, contains, exact, f1, graded, numeric

__all__ = [
    "Comparison", "Report", "Row", "choice", "contains", "evaluate", "exact", "f1", "graded",
    "load", "numeric",
]  # fmt: skip

# ── 1. Reports ─── rows with their scores


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, and what came of it.

    `error` is None where it was answered and scored, else the class and text of what went wrong.
    `seconds` and `cost` are the function's own, without the metric's; `cost` is in US dollars, and
    None where a price is unknown. `extra` has the row's other keys.
    """

    input: Any
    expected: Any
    output: Any = None
    score: float = 0.0
    error: str | None = None
    seconds: float = 0.0
    cost: float | None = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much better a report is than another on the same rows.

    `difference` of the means, its 95% `interval`, and `p`: the chance of one as large, or larger,
    if both were equally good.
    """

    difference: float
    interval: tuple[float, float]
    p: float

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.difference:+.4f}, 95% interval {low:+.4f} to {high:+.4f}, p = {self.p:.4f}"


@dataclass(frozen=True, slots=True)
class Report:
    """What a function scored: `print(report)` is a summary, `report.to_json()` has everything.

    `interval`: of the mean, 95%. `failures`: a list of the rows that were not answered, or not
    scored; they count 0, and are among `rows` too. `cost`: US dollars for all rows, resumed ones
    too, but for what is uncertain, as of a call cut off after it was sent; None where a price is
    unknown. `seconds`: how long the run took. `p50`, `p95`: the latency,
    in seconds, that so many of the answered rows did not exceed. `rows`: all, in the data set's
    order.
    """

    name: str
    n: int
    mean: float
    interval: tuple[float, float]
    cost: float | None
    seconds: float
    p50: float
    p95: float
    failures: list[Row] = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)

    def compare(self, other: Report) -> Comparison:
        """This report's mean less the other's, row by row: McNemar's test, or a bootstrap."""
        ours, theirs = _scores(self.rows), _scores(other.rows)
        if ours.keys() != theirs.keys():
            mine, others = len(ours.keys() - theirs.keys()), len(theirs.keys() - ours.keys())
            what = f"{mine} rows are only in the first, and {others} only in the other"
            raise SetupError(f"compare() takes two reports on the same rows: {what}. Use one set")
        scores = np.array([(ours[key], theirs[key]) for key in ours])
        more = scores[:, 0] - scores[:, 1]
        won, lost = int((more > 0).sum()), int((more < 0).sum())
        near, p = mcnemar(won, lost, self.n) if is_binary(scores) else paired(more)
        return Comparison(float(more.mean()), near, p)

    def to_json(self) -> str:
        """All of it as strict JSON: null for NaN, and a text for what JSON cannot hold."""
        return json.dumps(_plain(self), allow_nan=False)

    def __str__(self) -> str:
        cost = "unknown" if self.cost is None else f"${self.cost:.6f}"
        lines = [
            f"{self.name}: {self.n:,} rows in {self.seconds:.1f} s",
            "  mean      {:.4f}, 95% interval {:.4f} to {:.4f}".format(self.mean, *self.interval),
            f"  latency   p50 {self.p50:.3f} s, p95 {self.p95:.3f} s",
            f"  cost      {cost}",
            f"  failures  {len(self.failures):,}",
        ]
        failed = [(" ".join(str(row.error).split()), row.input) for row in self.failures[:5]]
        lines += [f"    {error:.60}  {given!r:.40}" for error, given in failed]
        lines += [f"    and {len(self.failures) - 5:,} more"] if self.failures[5:] else []
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    """What strict JSON can hold of a value."""
    if isinstance(value, str):
        return value
    try:
        return json.loads(json.dumps(value, default=_told), parse_constant=lambda _: None)
    except (TypeError, ValueError, RecursionError):  # odd keys, circles
        return str(value)


def _told(value: Any) -> Any:
    """The fields of a dataclass, else a text."""
    if isinstance(value, Row | Report):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    is_held = hasattr(value.__class__, "__dataclass_fields__") and not ember._is_reply(value)
    return ember._data(value) if is_held else str(value)


def _scores(rows: Sequence[Row]) -> dict[str, float]:
    """The score of each row, by its key."""
    return {key: row.score for key, row in zip(_keys(rows), rows, strict=True)}


def _keys(rows: Sequence[Row]) -> list[str]:
    """A key for each row: a hash of input and expected, and which of several equal ones it is."""
    seen, keys, plain = Counter[str](), list[str](), {str, int, float, bool, type(None)}
    for number, row in enumerate(rows, 1):
        pair = (row.input, row.expected)
        try:  # repr() is as exact for what is plain, and quicker
            form = repr(pair) if plain.issuperset(map(type, pair)) else ember._form(pair)
            key = digest(form)[:32]
        except (TypeError, RecursionError) as error:
            raise SetupError(f"row {number}: {error}. Use texts, numbers, dataclasses") from None
        seen[key] += 1
        keys.append(f"{key}:{seen[key]}")
    return keys


# ── 2. Evaluation ─── a function and rows → a report


async def evaluate(
    fn: Fn[..., Any], rows: Iterable[Any] | AsyncIterable[Any],
    metric: Callable[[Any, Any], Any] = exact, *, limit: int = 64, progress: bool = False,
    resume: str | Path | None = None,
) -> Report:
    """What `fn` scores on rows of `{"input": …, "expected": …}`, or of pairs.

    It is called as `fn(input)`, or `fn(**input)` where the input is a mapping, at most `limit` at
    once. `metric(output, expected)` gives a number or a bool, and may be async. A row whose call
    or metric fails counts 0 and is among the report's failures; a SetupError is raised at once.

    resume: a file, to which each row is added as it is done. Another run with the same function,
    metric and data set asks only for the rest, and for what failed. From there an output is what
    JSON holds of it, a reply its text. What the function calls may change unseen.
    """
    ember._async_only(fn, "evaluate()")
    if not callable(metric):
        raise TypeError(f"evaluate() takes a function as its metric, not {metric!r:.80}")
    if not ember._is_count(limit):
        raise SetupError(f"evaluate: limit={limit!r} lets nothing run; use 1 or more")
    started = time.perf_counter()
    given = [row async for row in rows] if isinstance(rows, AsyncIterable) else rows
    done = [_asked(number, row) for number, row in enumerate(given, 1)]
    if not done:
        raise SetupError("evaluate() got no rows; give it one or more")

    async def one(number: int) -> None:
        done[number] = await _answered(fn, metric, done[number])
        keep(number, done[number])

    with Short(), _record(resume, fn, metric, done) as (todo, keep):
        await ember.parallel(one, todo, limit=limit, progress=progress)
    return _report(f"{ember._name(metric)} of {ember._name(fn)}", done, started)


def _asked(number: int, row: Any) -> Row:
    """A row of a data set, before it is answered."""
    if issubclass(type(row), Mapping) and "input" in row:
        given: dict[str, Any] = {**row}
        return Row(given.pop("input"), given.pop("expected", None), extra=given)
    if issubclass(type(row), list | tuple) and len(row) == 2:
        return Row(*row)
    raise SetupError(f"evaluate: row {number} is {row!r:.80}, no pair and no mapping with 'input'")


async def _answered(fn: Fn[..., Any], metric: Callable[[Any, Any], Any], row: Row) -> Row:
    """A row with its output and score, or with its error."""
    output, error, ledger = None, None, ember.track()
    started, ended = time.perf_counter(), 0.0
    try:
        with ledger:
            named = issubclass(type(row.input), Mapping)
            output = await (fn(**row.input) if named else fn(row.input))
        ended = time.perf_counter()
        score = await ember._awaited(metric(output, row.expected))
        if not hasattr(score, "__float__") or not math.isfinite(score):
            what = f"{ember._name(metric)}() gave {score!r:.80}, not a finite number"
            raise ValueError(what)  # noqa: TRY301
    except SetupError:
        raise
    except Exception as fault:  # noqa: BLE001
        score, error = 0.0, f"{type(fault).__name__}: {fault}"
    seconds = (ended or time.perf_counter()) - started
    cost = _total([call.cost for call in ledger.calls])
    return Row(row.input, row.expected, output, float(score), error, seconds, cost, row.extra)


def _report(name: str, rows: list[Row], started: float) -> Report:
    """The report on rows that are done."""
    scores = np.array([row.score for row in rows])
    failures = [row for row in rows if row.error is not None]
    times = [row.seconds for row in rows if row.error is None] or [math.nan]
    p50, p95 = map(float, np.quantile(times, (0.5, 0.95), method="inverted_cdf"))
    cost, seconds = _total([row.cost for row in rows]), time.perf_counter() - started
    return Report(
        name=name, n=len(rows), mean=float(scores.mean()), interval=interval(scores), cost=cost,
        seconds=seconds, p50=p50, p95=p95, failures=failures, rows=tuple(rows),
    )  # fmt: skip


def _total(costs: list[float | None]) -> float | None:
    """The sum of costs; None where one is unknown."""
    return None if None in costs else math.fsum(filter(None, costs))


# The file of a run: a line that says what it belongs to, then a line for each row that is done.


@contextlib.contextmanager
def _record(
    path: Any, fn: Any, metric: Any, rows: list[Row]
) -> Generator[tuple[list[int], Callable[[int, Row], None]]]:
    """Which rows are to do, when those in a file are in place; and a function that adds one."""
    if path is None:
        yield [*range(len(rows))], lambda number, row: None  # noqa: ARG005
        return
    keys = _keys(rows)
    data = f"{len(keys)} rows {digest(''.join(sorted(keys)))[:16]}"
    with (
        Path(path).open("ab+", buffering=0) as file, _identity(fn) as function,
        _identity(metric) as scorer,
    ):  # fmt: skip
        _lock(file, path)
        belongs = {"format": 1, "function": function, "metric": scorer, "data set": data}
        found = _found(file, path, belongs, keys)

        def keep(number: int, row: Row) -> None:
            if row.error is None:  # repr() is as good for floats, and quicker
                cost = "null" if row.cost is None else repr(row.cost)
                output = json.dumps(_plain(row.output))
                told = f'"score": {row.score!r}, "seconds": {row.seconds!r}, "cost": {cost}'
                _add(file, f'{{"key": "{keys[number]}", {told}, "output": {output}}}\n')

        todo = [number for number, key in enumerate(keys) if key not in found]
        for number in {*range(len(keys))}.difference(todo):
            rows[number] = replace(rows[number], **found[keys[number]])
        yield todo, keep


# What a function has become in a run → what it was: a list that it appends to changes nothing.
# While it runs, it goes by its id.
_was: dict[object, str] = {}


@contextlib.contextmanager
def _identity(fn: Any) -> Generator[str]:
    """A function's name, and a hash of what it does, as far as any process can tell it."""
    owner = getattr(fn, "__self__", fn)
    running = (id(owner), id(getattr(fn, "__func__", fn)))

    def form() -> str:
        held = object.__getstate__(owner) if ember._parts(owner) is None else None
        return _lasting([fn, held], {})

    was = _was[running] = _was.get(running) or _was.get(now := form(), now)
    try:
        yield f"{ember._home(fn)}.{getattr(fn, '__qualname__', ember._name(fn))} {was[:16]}"
    finally:
        _was.pop(running, None)
        _was[form()] = was


def _lasting(value: Any, seen: dict[int, tuple[Any, str]]) -> str:
    """What any process says of a value: of an object its class, the code of that, and attributes.

    What is of Python or of installed packages, and has no canonical form, is only its class.
    """
    while inspect.isfunction(value) and ember._is_own(value, "wrapper"):
        value = value.__dict__["__wrapped__"]
    kind: Any = value.__class__
    parts = ember._parts(value)
    if parts is None:
        with contextlib.suppress(TypeError):
            return ember._form(value)
    if id(value) not in seen:
        seen[id(value)] = value, f"again:{len(seen)}"
        file = str(getattr(sys.modules.get(kind.__module__), "__file__", ""))
        foreign = "-packages" in file and kind.__module__ not in {"__main__", "__mp_main__"}
        foreign = foreign or kind.__module__.partition(".")[0] in _FOREIGN
        parts = [*(parts or ()), None if foreign else object.__getstate__(value)]
        forms = [_lasting(one, seen) for one in parts]
        forms = sorted(forms) if kind in {set, frozenset} else forms
        name = f"{kind.__module__}.{kind.__qualname__}" if foreign else ember._class_form(kind)
        told = f"{name}({','.join(forms)})".replace("__mp_main__", "__main__")
        seen[id(value)] = value, digest(told)
    return seen[id(value)][1]


_FOREIGN = {*sys.stdlib_module_names, "ember", "ember_accel"}


def _lock(file: Any, path: Any) -> None:
    """Keep other runs from the file."""
    with contextlib.suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"evaluate: another run adds to resume={str(path)!r}"
            raise SetupError(f"{what}. Wait for its end, or give another file") from None


def _found(file: Any, path: Any, belongs: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """What the whole lines of a file have of rows, by their keys; a torn last line is dropped."""
    file.seek(0)
    *lines, torn = file.read().split(b"\n")
    if not lines and not json.dumps(belongs).encode().startswith(torn):
        wrong_line(path, 1, "not written by evaluate()")
    values = [json_value(path, number, line) for number, line in enumerate(lines, 1)]
    header = ember._object(values[0]) if lines else belongs
    for name, value in belongs.items():
        if (was := header.get(name)) != value:
            what = f"{path} is of another {name}: {was!r}, not {value!r}"
            raise SetupError(f"evaluate: {what}. Give another file, or delete it")
    known, found, kept = {*keys}, dict[str, Any](), {"score", "seconds", "cost", "output"}
    for number, value in enumerate(values[1:], 2):
        entry = ember._object(value)
        if entry.keys() != {"key", *kept} or (key := str(entry["key"])) not in known:
            wrong_line(path, number, "not written by evaluate() for this data set")
        cost = 0.0 if entry["cost"] is None else entry["cost"]
        numbers = [entry["score"], entry["seconds"], cost]
        if not all(isinstance(one, int | float) and math.isfinite(one) for one in numbers):
            wrong_line(path, number, "score, seconds or cost is no number")
        found[key] = {name: entry[name] for name in kept}
    file.truncate(sum(len(line) + 1 for line in lines))
    if not lines:
        _add(file, f"{json.dumps(belongs)}\n")
    return found


def _add(file: Any, text: str) -> None:
    """Append a text by one write; by more where the system takes a part, as of a full disk."""
    line = text.encode()
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        what = f"evaluate: {file.name}: {error.strerror}. It keeps the rows that it has"
        raise SetupError(f"{what}: make room for it, and run this again") from None
