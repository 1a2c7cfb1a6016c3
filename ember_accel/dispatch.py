"""Dual implementation: one operation, several implementations, the best of them for each call.

    from ember_accel.dispatch import measured, operation

    topk = operation("topk", {"numpy": in_numpy, "jax": in_jax}, choose=measured("topk", size))
    topk(queries, docs, 10)                     # the fastest for this size, where the data lies
    topk(queries, docs, 10, prefer="jax")       # or `with prefer("jax"):`, or EMBER_ACCEL=jax

An operation is a value and a function, with the signature and the docstring of its first
implementation, and async where they are. Results lie where the arguments lie: JAX's arrays where
one of them is JAX's, else NumPy's, whatever implementation ran. What is missing falls back, with
one warning; `fallback=False` makes that a SetupError.

`python tests/bench/bench_dispatch.py --rebuild` measures the library's operations on a machine and
rewrites measured.json, the table that they choose by.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from ember import SetupError
from ember_accel.places import COLD, DEVICE, HOST, TRACED, leaves_of, moved, place_of

R = TypeVar("R")

# ── 1. Context ─── what the code around a call prefers, and who watches


@dataclass(frozen=True, slots=True)
class Choice:
    """What ran: an implementation of an operation, the size it was chosen by, and how it ended.

    JAX's functions return before they have computed: `seconds` has all of it for host data only.
    """

    operation: str
    implementation: str
    size: tuple[int, ...]
    seconds: float
    outcome: str = "ok"  # or the class of the exception


_preferred = ContextVar[tuple[str, ...]]("ember_accel_preferred", default=())
_hooks = ContextVar[tuple[Callable[[Choice], object], ...]]("ember_accel_hooks", default=())


def prefer(*names: str) -> contextlib.AbstractContextManager[None]:
    """A context in which operations use these implementations: of several, the first they have.

    They come before those of a context around it. An operation that has none of them is as before.

    >>> with prefer("jax", "dspy"):
    ...     answer = topk(queries, docs, 10)
    """
    return _extended(_preferred, names)


def on_choice(fn: Callable[[Choice], object]) -> contextlib.AbstractContextManager[None]:
    """A context in which `fn` gets the Choice of each call as it ends, also of one that fails.

    >>> with on_choice(print):
    ...     answer = topk(queries, docs, 10)
    """
    return _extended(_hooks, (fn,))


@contextlib.contextmanager
def _extended(variable: ContextVar[Any], values: tuple[Any, ...]) -> Generator[None, None, None]:
    """A context in which a variable has more values, before those it has."""
    token = variable.set(values + variable.get())
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # left in another context, which has nothing of it
            variable.reset(token)


# ── 2. Measured ─── a choice by a table of what was measured

_FILE = Path(__file__).with_name("measured.json")


@functools.cache
def _table() -> dict[str, Any]:
    """Operation → "host", or JAX's backend → rows of a size and each implementation's µs."""
    return dict(json.loads(_FILE.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Measured:
    """The `choose=` of an operation whose implementations differ in speed only.

    name: of its rows in the table; without any, data on the host is for numpy, other data for jax.
    size: the numbers that the time depends on, as (queries, width, docs), by a call's arguments.

    >>> choose = measured("topk", lambda queries, docs, k: (*queries.shape, len(docs)))
    """

    name: str
    size: Callable[..., tuple[int, ...]]

    def __call__(self, available: Sequence[str], *args: Any, **kwargs: Any) -> str:
        """The fastest for a call, for a `choose=` that goes on to this one."""
        place = place_of((*args, *kwargs.values()))
        return self.fastest(available, place, self.of(*args, **kwargs))

    def of(self, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        """The size of a call; () for wrong arguments, of which the implementation complains."""
        try:
            return tuple(max(0, int(n)) for n in self.size(*args, **kwargs))
        except (AttributeError, LookupError, TypeError, ValueError):
            return ()

    def fastest(self, available: Sequence[str], place: int, size: tuple[int, ...]) -> str:
        """The fastest of those available at the nearest size, by the ratios of its numbers."""
        backend = sys.modules["jax"].default_backend() if place >= DEVICE else "host"
        # Pallas is interpreted on a CPU. Data on the host is no reason to import JAX.
        never = ["pallas"] * (backend in {"host", "cpu"}) + ["jax"] * (place == COLD)
        names = [name for name in available if name not in never] or available
        rows = [row for row in _table().get(self.name, {}).get(backend, []) if size]
        logs = [math.log1p(n) for n in size]
        rows = [row for row in rows if len(row[0]) == len(size)]  # else the call is wrong
        far = [math.dist([math.log1p(n) for n in row[0]], logs) for row in rows]
        near: dict[str, float] = rows[far.index(min(far))][1] if rows else {}
        usual = "jax" if place >= DEVICE else "numpy"  # where the data lies, if it is a near thing
        times = {usual: sys.float_info.max} | near
        return min(names, key=lambda name: times.get(name, math.inf) * (1 - 0.15 * (name == usual)))


measured = Measured


# ── 3. Operations ─── the choice, the call, and what takes over

_MODULES = {"numpy": "numpy", "jax": "jax", "pallas": "jax", "dspy": "dspy"}
_HOMES = {"numpy": (COLD, HOST, TRACED), "jax": (DEVICE, TRACED)}  # of what they return


@dataclass(frozen=True, eq=False)
class Operation(Generic[R]):
    """A function that runs the best of its implementations: all of them async, or none.

    It takes their arguments, and `prefer=`, the name of one, and `fallback=`. The name in the call
    comes before those of `with prefer(…)`, those of the environment variable EMBER_ACCEL (with
    commas between them), and `choose(available, *args, **kwargs)`; without it, the first is chosen.
    One that is not installed, or raises ImportError or NotImplementedError, falls back with one
    RuntimeWarning; with `fallback=False` it is a SetupError. All other errors are the caller's.

    needs: the module that each cannot do without; known for numpy, jax, pallas and dspy. recovers:
    exceptions that fall back too, as RuntimeError, JAX's for want of memory; not if async, as the
    call may have been paid for. cases: a function that gives tuples of arguments to measure.

    >>> double = operation("double", {"sum": lambda x: x + x, "shift": lambda x: x << 1})
    >>> double(4), double(4, prefer="shift")
    (8, 8)
    """

    name: str
    implementations: Mapping[str, Callable[..., R]]
    _: KW_ONLY
    choose: Callable[..., str] | None = None
    needs: Mapping[str, str] | None = None
    recovers: Sequence[type[Exception]] = ()
    cases: Callable[[], Iterable[tuple[Any, ...]]] | None = None
    is_async: bool = field(init=False, repr=False)
    modules: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the implementations, and look like the first."""
        given: Any = self.implementations
        functions: dict[Any, Any] = dict(given) if hasattr(given, "keys") else {}
        if not functions or not all(isinstance(name, str) for name in (self.name, *functions)):
            told = f"{self.name!r:.80} and {given!r:.200}"
            raise TypeError(f"operation() takes a name and {{name: function}}, not {told}")
        first, *_ = functions.values()
        for name, fn in functions.items():
            if not callable(fn) or _is_async(fn) != _is_async(first):
                told = f"{name!r} is {fn!r:.80}. Give functions: either all are async, or none"
                raise TypeError(f"{self.name}: {told}")
        looks = functools.update_wrapper(cast("Any", types.SimpleNamespace()), first, updated=())
        modules = {name: (_MODULES | dict(self.needs or {})).get(name, "") for name in functions}
        vars(self).update(vars(looks), modules=modules, is_async=_is_async(first))
        vars(self)["implementations"] = types.MappingProxyType(functions)
        if self.is_async:
            vars(self)["__call__"] = self._awaited  # where decorators look for what is async

    def __call__(
        self, *args: Any, prefer: str | None = None, fallback: bool = True, **kwargs: Any
    ) -> R:
        """What the chosen implementation returns: that of `prefer=`, or its `fallback=`."""
        if self.is_async:
            return cast("R", self._awaited(*args, prefer=prefer, fallback=fallback, **kwargs))
        place, size, order = self._chosen(args, kwargs, prefer, fallback=fallback)
        for at, name in enumerate(order, 1):
            started = time.perf_counter()
            try:
                result = self.implementations[name](*args, **kwargs)
                if place not in _HOMES.get(self.modules[name], ()):
                    result = moved(result, place)
            except BaseException as error:
                if not self._takes_over(order[at:], name, size, started, error):
                    raise
            else:
                if _hooks.get():
                    self._show(name, size, started)
                return result
        raise AssertionError("unreachable")

    async def _awaited(
        self, *args: Any, prefer: str | None = None, fallback: bool = True, **kwargs: Any
    ) -> Any:
        """As `__call__`. The choice is made when this is awaited."""
        _, size, order = self._chosen(args, kwargs, prefer, fallback=fallback)
        for at, name in enumerate(order, 1):
            started = time.perf_counter()
            try:
                result = await cast("Any", self.implementations[name](*args, **kwargs))
            except BaseException as error:
                if not self._takes_over(order[at:], name, size, started, error):
                    raise
            else:
                self._show(name, size, started)
                return result
        raise AssertionError("unreachable")

    def _chosen(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], prefer: str | None, *, fallback: bool
    ) -> tuple[int, tuple[int, ...], tuple[str, ...]]:
        """The place and the size of a call, and the implementations to try, in this order."""
        place, choose = place_of((*args, *kwargs.values()) if kwargs else args), self.choose
        size = choose.of(*args, **kwargs) if isinstance(choose, Measured) else ()
        asked = prefer, _preferred.get(), os.environ.get("EMBER_ACCEL", "")
        order, lost = _order(self, *asked, place, size)
        if choose and not order[0]:
            if (name := choose(order[1:], *args, **kwargs)) not in order[1:]:
                raise SetupError(f"{self.name}: choose= gave {name!r:.80}, not one of {order[1:]}")
            order = tuple(dict.fromkeys([name, *order[1:]]))
        for name, cause in lost.items():
            if not fallback:
                raise SetupError(f"{self.name}: {name!r} cannot run. {cause}")
            _warn(self, name, cause, order[0])
        return place, size, order if fallback else order[:1]

    def missing(self, place: int = HOST) -> dict[str, str | None]:
        """Why each implementation cannot run; None where it can."""
        causes = {name: _absent(module) for name, module in self.modules.items()}
        blind = [name for name in causes if place == TRACED and self.modules[name] == "numpy"]
        return causes | dict.fromkeys(blind, "jit, grad and vmap trace functions of JAX only")

    def _takes_over(
        self, others: tuple[str, ...], name: str, size: Any, started: float, error: BaseException
    ) -> bool:
        """Whether another implementation does what one has failed to do."""
        self._show(name, size, started, type(error).__name__)
        missing, cause = isinstance(error, ImportError | NotImplementedError), f"{error!r:.500}"
        if others and (missing or (isinstance(error, tuple(self.recovers)) and not self.is_async)):
            _warn(self, name, cause, others[0])
            return True
        if missing:
            raise SetupError(f"{self.name}: {name!r} cannot run. {cause}") from error
        if isinstance(error, Exception):
            error.add_note(f"in the implementation {name!r} of the operation {self.name!r}")
        return False

    def _show(self, name: str, size: Any, started: float, outcome: str = "ok") -> None:
        """Tell who watches what ran."""
        seconds = time.perf_counter() - started
        for hook in _hooks.get():
            try:
                hook(Choice(self.name, name, size, seconds, outcome))
            except Exception as error:  # noqa: BLE001, it is not the call's
                told = f"{self.name}: on_choice's {hook!r:.80} failed with {error!r:.200}"
                warnings.warn(told, RuntimeWarning, stacklevel=4)


def _is_async(fn: Any) -> bool:
    """Whether what a call returns is to be awaited."""
    return any(map(inspect.iscoroutinefunction, (fn, getattr(fn, "__call__", None))))  # noqa: B004


def _absent(module: str) -> str | None:
    """Why a module cannot be imported; None where it can. Nothing is imported to tell."""
    with contextlib.suppress(ValueError):  # of what is there, but was not made from a file
        if module and not importlib.util.find_spec(module.partition(".")[0]):
            return f"{module} is not installed. Install it, as by `pip install {module}`"
    return None


@functools.lru_cache(4096)
def _order(
    operation: Operation[Any], prefer: str | None, context: tuple[str, ...], environment: str,
    place: int, size: tuple[int, ...],
) -> tuple[tuple[str, ...], dict[str, str]]:  # fmt: skip
    """What can run, in this order, after "" if `choose=` is to be asked; why not the preferred."""
    causes, choose = operation.missing(place), operation.choose
    if prefer is not None and prefer not in causes:
        raise SetupError(f"{operation.name}: has no {prefer!r:.80}. It has {', '.join(causes)}")
    around = (*context, *environment.replace(" ", "").split(","))
    named = [name for name in (prefer, *around) if name in causes]
    usable = [name for name in causes if causes[name] is None]
    if not usable:
        raise SetupError(f"{operation.name}: no implementation can run. {causes}")
    wanted = [name for name in named if name in usable]
    if not wanted and choose:
        wanted = [choose.fastest(usable, place, size) if isinstance(choose, Measured) else ""]
    lost = itertools.takewhile(lambda name: name not in usable, named)
    return tuple(dict.fromkeys([*wanted, *usable])), {name: str(causes[name]) for name in lost}


def _warn(operation: Operation[Any], name: str, cause: str, instead: str) -> None:
    """Say that another implementation takes the place of one: once for each kind of cause."""
    if (key := (operation, name, cause.partition("(")[0])) not in _warned:
        _warned.add(key)
        told = f"{operation.name}: {name!r} cannot run, {instead!r} takes its place. {cause}"
        warnings.warn(told, RuntimeWarning, stacklevel=4)


_warned = set[tuple[Any, ...]]()
operation = Operation


def implementations(*operations: Operation[Any]) -> dict[str, dict[str, str | None]]:
    """Why each implementation of operations cannot run, or None; without any, of the library's.

    >>> implementations(topk)
    {'topk': {'numpy': None, 'jax': None, 'pallas': None}}
    """
    return {one.name: one.missing() for one in operations or library()}


def library() -> list[Operation[Any]]:
    """The operations of this library."""
    values = list[Any]()
    for home in ("retrieval", "routing", "scoring"):
        with contextlib.suppress(ModuleNotFoundError):
            values += vars(importlib.import_module(f"ember_accel.{home}")).values()
    found: list[Operation[Any]] = [one for one in values if isinstance(one, Operation)]
    return [*{one.name: one for one in found}.values()]


# ── 4. Parity ─── whether implementations agree


@dataclass(frozen=True)
class Parity:
    """How far the implementations of an operation agree with one of them: see `parity`."""

    operation: str
    reference: str
    gaps: Mapping[str, Sequence[float]]  # implementation → the largest difference in each row
    tolerance: float

    def apart(self, name: str) -> list[int]:
        """The rows in which an implementation differs, or failed."""
        return [row for row, gap in enumerate(self.gaps[name]) if gap > self.tolerance]

    def __str__(self) -> str:
        lines = [f"{self.operation}: compared with {self.reference!r}, within {self.tolerance:g}"]
        for name, gaps in self.gaps.items():
            rows, most = self.apart(name), max(gaps, default=0.0)
            told = f"{len(gaps) - len(rows)} of {len(gaps)} rows equal, apart by {most:.2g} at most"
            lines.append(f"  {name:<10}{told}" + f": rows {rows}" * bool(rows))
        return "\n".join(lines)


def parity(
    operation: Operation[Any], rows: Iterable[Any], *, prefer: Sequence[str] = (),
    tolerance: float = 1e-5,
) -> Any:  # fmt: skip
    """The Parity of an operation's implementations; of an async operation, to be awaited.

    rows: tuples of arguments, or mappings of names to them. prefer: the implementations, the first
    being the reference; without any, all that can run. Numbers are equal within `tolerance`, of
    their size where it is above 1, NaN to NaN; failures are, where they are of one class.

    >>> print(parity(double, [(1,), (2,)]))
    double: compared with 'sum', within 1e-05
      shift     2 of 2 rows equal, apart by 0 at most
    """
    causes = operation.missing()
    names = prefer or [name for name in causes if causes[name] is None]
    if isinstance(prefer, str) or {*names} - {*causes}:
        raise SetupError(f"{operation.name}: prefer={prefer!r:.80} is no list of {[*causes]}")
    if not names:
        raise SetupError(f"{operation.name}: no implementation can run. {causes}")

    async def compared() -> Parity:
        found: dict[str, list[Any]] = {name: [] for name in names}
        for row, name in itertools.product(rows, names):
            call: Any = functools.partial(operation, prefer=name, fallback=False)
            try:
                result = call(**row) if isinstance(row, Mapping) else call(*row)
                found[name].append(await result if operation.is_async else result)
            except Exception as error:  # noqa: BLE001, it is compared as results are
                found[name].append(error)
        gaps = {name: list(map(_gap, found[names[0]], found[name])) for name in names[1:]}
        return Parity(operation.name, names[0], gaps, tolerance)

    try:
        return compared() if operation.is_async else compared().send(None)  # which never waits
    except StopIteration as done:
        return done.value


def _gap(ours: Any, theirs: Any) -> float:
    """The largest difference of the numbers in two results; inf where all else is not the same."""
    most = 0.0
    for a, b in itertools.zip_longest(leaves_of(ours, 99), leaves_of(theirs, 99)):
        if all(isinstance(one, int | float) or hasattr(one, "__array__") for one in (a, b)):
            import numpy as np

            x, y = np.asarray(a, float), np.asarray(b, float)
            if x.shape != y.shape:
                return math.inf
            with np.errstate(all="ignore"):
                gap = np.nan_to_num(abs(x - y) / np.maximum(1, abs(x)), nan=np.inf, posinf=np.inf)
            gap = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, gap)
            most = max(most, float(gap.max(initial=0)))
        elif type(a) is not type(b) or not (isinstance(a, Exception) or a == b):
            most = math.inf
    return most
