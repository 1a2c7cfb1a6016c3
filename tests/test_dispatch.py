"""Operations: which implementation runs, what takes over, where the results lie, and parity."""

import asyncio
import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ember
from ember_accel import dispatch
from ember_accel.dispatch import (
    Choice,
    Operation,
    implementations,
    measured,
    on_choice,
    operation,
    parity,
    prefer,
)  # fmt: skip

np = pytest.importorskip("numpy")
ROOT = Path(__file__).parents[1]


def named(*names: str, **options: Any) -> Operation[str]:
    """An operation that returns the name of what has run."""
    functions = {name: functools.partial(lambda name, *values: name, name) for name in names}
    return operation("named", functions, **options)


def lacking(name: str, error: BaseException, *others: str, **options: Any) -> Operation[str]:
    """An operation whose first implementation raises."""

    def fails(*values: Any) -> str:
        raise error

    functions = dict(named(*others).implementations) if others else {}
    return operation("lacking", {name: fails, **functions}, **options)


# ── What is refused ───


async def waiting(x: int) -> int:
    """It waits."""
    return x


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("op", {}), ("op", {"a": 3}), ("op", {3: len}), (3, {"a": len}), (None, {"a": len}),
        ("op", {"a": waiting, "b": len}), ("op", {"a": len, "b": waiting}),
    ],
)  # fmt: skip
def test_a_wrong_operation_is_refused_when_it_is_made(name: Any, functions: Any) -> None:
    with pytest.raises(TypeError, match=r"takes a name|either all are async, or none"):
        operation(name, functions)


def test_an_unknown_name_in_a_call_is_refused_with_those_there_are() -> None:
    with pytest.raises(ember.SetupError, match=r"named: has no 'torch'\. It has a, b"):
        named("a", "b")(prefer="torch")


def test_wrong_arguments_are_the_implementations_own_type_error() -> None:
    def area(width: int, height: int) -> int:
        return width * height

    sized = operation("area", {"a": area}, choose=measured("area", lambda width, height: (width,)))
    with pytest.raises(TypeError, match=r"area\(\) missing 1 required positional argument") as one:
        sized(3)
    with pytest.raises(TypeError) as other:
        area(3)  # type: ignore[call-arg]
    assert str(one.value) == str(other.value)


# ── Which runs ───


def test_a_call_comes_before_contexts_these_before_the_environment_and_the_choice_is_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op = named("a", "b", "c", "d", choose=lambda available, *values: "d")
    assert op() == "d"
    monkeypatch.setenv("EMBER_ACCEL", " x, c ,b")
    assert op() == "c"
    with prefer("b"):
        assert op() == "b"
        assert op(prefer="a") == "a"
        with prefer("x", "a"):
            assert op() == "a"
        with prefer("x"):
            assert op() == "b"
    assert op() == "c"
    monkeypatch.delenv("EMBER_ACCEL")
    assert op() == "d"


def test_without_choose_the_first_runs_and_choose_sees_names_and_arguments() -> None:
    seen = list[Any]()

    def choose(available: Any, *args: Any, **kwargs: Any) -> str:
        seen.append((list(available), args, kwargs))
        return "b"

    assert named("a", "b")() == "a"
    assert named("a", "b", "c", choose=choose, needs={"a": "no_such_module"})(1) == "b"
    assert seen == [(["b", "c"], (1,), {})]


def test_a_context_holds_in_its_own_task_and_thread_only() -> None:
    op = named("a", "b")

    async def task(name: str) -> str:
        with prefer(name):
            await asyncio.sleep(0)
            return op()

    async def main() -> list[str]:
        return await asyncio.gather(*(task(name) for name in "abab"), asyncio.to_thread(op))

    assert asyncio.run(main()) == ["a", "b", "a", "b", "a"]
    found = list[str]()
    with prefer("b"):
        thread = threading.Thread(target=lambda: found.append(op()))
        thread.start()
        thread.join()
    assert found == ["a"]


def test_an_operation_looks_like_its_first_implementation_and_can_be_changed() -> None:
    def first(x: int, *, y: int = 1) -> int:
        """The sum."""
        return x + y

    op = operation("sum", {"a": first})
    assert (op.__doc__, op.__name__, str(inspect.signature(op))) == (
        "The sum.", "first", "(x: int, *, y: int = 1) -> int",
    )  # fmt: skip
    more = dataclasses.replace(op, implementations={**op.implementations, "b": lambda x, y=1: -x})
    assert (op(1), more(1), more(1, prefer="b")) == (2, 2, -1)


# ── What takes over ───


def test_what_is_not_installed_falls_back_with_one_warning_that_points_to_the_call() -> None:
    op = named("a", "b", needs={"a": "no_such_module"})
    with pytest.warns(RuntimeWarning) as caught:
        assert op(prefer="a") == "b"
        assert op(prefer="a") == "b"
    [warning] = caught
    assert str(warning.message) == (
        "named: 'a' cannot run, 'b' takes its place. "
        "no_such_module is not installed. Install it, as by `pip install no_such_module`"
    )
    assert warning.filename == __file__
    assert op() == "b"  # nobody asked for it


def test_without_fallback_what_is_missing_is_a_setup_error_each_time() -> None:
    op = named("a", "b", needs={"a": "no_such_module"})
    for _ in range(2):
        with pytest.raises(ember.SetupError, match=r"'a' cannot run\. no_such_module is not"):
            op(prefer="a", fallback=False)
    assert op(fallback=False) == "b"


def test_where_nothing_can_run_all_causes_are_told() -> None:
    with pytest.raises(ember.SetupError, match=r"'a': 'no_x is not .*, 'b': 'no_y is not"):
        named("a", "b", needs={"a": "no_x", "b": "no_y"})()


@pytest.mark.parametrize("error", [ImportError("no wheel"), NotImplementedError("no kernel")])
def test_an_implementation_that_cannot_run_falls_back_with_one_warning(error: Exception) -> None:
    op = lacking("a", error, "b")
    with pytest.warns(RuntimeWarning, match=str(error)) as caught:
        assert [op(), op()] == ["b", "b"]
    assert len(caught) == 1
    with pytest.raises(ember.SetupError, match=f"lacking: 'a' cannot run. .*{error}") as raised:
        op(fallback=False)
    assert raised.value.__cause__ is error
    with pytest.raises(ember.SetupError, match=str(error)):
        lacking("a", error)()


def test_any_other_error_is_the_callers_with_a_note() -> None:
    op = lacking("a", KeyError("x"), "b")
    with pytest.raises(KeyError, match="x") as caught:
        op()
    assert caught.value.__notes__ == ["in the implementation 'a' of the operation 'lacking'"]


def test_errors_that_it_recovers_from_fall_back_too() -> None:
    op = lacking("a", MemoryError("48 GB"), "b", recovers=(RuntimeError, MemoryError))
    with pytest.warns(RuntimeWarning, match="48 GB"):
        assert op() == "b"
    with pytest.raises(MemoryError):
        op(fallback=False)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_not_held_up(stop: type[BaseException]) -> None:
    with pytest.raises(stop):
        lacking("a", stop(), "b", recovers=(Exception,))()


# ── Async operations ───


def asked(error: BaseException | None = None) -> tuple[Operation[Any], list[str]]:
    """An async operation, and the names of what has run."""
    calls = list[str]()

    async def a(x: int) -> int:
        calls.append("a")
        await asyncio.sleep(0.01)
        if error:
            raise error
        return x

    async def b(x: int) -> int:
        calls.append("b")
        return x

    return operation("asked", {"a": a, "b": b}, recovers=(RuntimeError,)), calls


async def test_an_async_operation_chooses_when_it_is_awaited_and_tells_how_long_it_took() -> None:
    op, calls = asked()
    choices = list[Choice]()
    running = op(3)
    assert calls == []
    with on_choice(choices.append), prefer("a"):
        assert await running == 3
    [choice] = choices
    assert choice == Choice("asked", "a", (), choice.seconds)
    assert choice.seconds > 0.005


async def test_an_async_operation_never_asks_another_after_a_failure() -> None:
    op, calls = asked(RuntimeError("overloaded"))
    choices = list[Choice]()
    with on_choice(choices.append), pytest.raises(RuntimeError, match="overloaded"):
        await op(3)
    assert calls == ["a"]
    assert choices[0].outcome == "RuntimeError"
    assert choices[0].seconds > 0.005


async def test_an_async_operation_falls_back_from_what_is_missing() -> None:
    op, calls = asked(ImportError("no dspy"))
    with pytest.warns(RuntimeWarning, match="no dspy"):
        assert await op(3) == 3
    assert calls == ["a", "b"]


async def test_a_cancelled_call_is_told_and_stays_cancelled() -> None:
    op, calls = asked()
    choices = list[Choice]()
    with on_choice(choices.append):
        task = asyncio.create_task(op(3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (calls, choices[0].outcome) == (["a"], "CancelledError")


async def test_embers_decorators_take_an_async_operation() -> None:
    op, _ = asked()
    assert await ember.retry(op)(3) == 3
    assert await ember.parallel(op, [1, 2]) == [1, 2]
    with pytest.raises(TypeError):
        await op()


# ── Who watches ───


def test_hooks_see_each_call_and_their_failures_are_not_the_calls() -> None:
    op = lacking("a", ImportError("no wheel"), "b")
    choices = list[Choice]()
    with on_choice(choices.append), on_choice(lambda _: 1 / 0), pytest.warns() as caught:
        assert op() == "b"
    assert [" failed with ZeroDivisionError" in str(each.message) for each in caught] == [
        True, False, True,
    ]  # fmt: skip
    assert [(each.implementation, each.outcome) for each in choices] == [
        ("a", "ImportError"), ("b", "ok"),
    ]  # fmt: skip
    op(prefer="b")
    assert len(choices) == 2


# ── Where the data lies ───


class Pair(NamedTuple):
    """A result of two arrays."""

    a: Any
    b: Any


def in_numpy(x: Any, k: int = 1) -> Any:
    """Twice the array, and its last axis."""
    x = np.asarray(x)
    return Pair(x * 2, {"n": np.arange(k), "text": "numpy"})


def in_jax(x: Any, k: int = 1) -> Any:
    import jax.numpy as jnp

    return Pair(jnp.asarray(x) * 2, {"n": jnp.arange(k), "text": "jax"})


def size(x: Any, k: int = 1) -> tuple[int, ...]:
    return (len(x), k)


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> Operation[Any]:
    """An operation of NumPy's and JAX's, of which nothing is measured."""
    monkeypatch.setattr(dispatch, "_table", dict)
    choose = measured("doubled", size)
    return operation("doubled", {"numpy": in_numpy, "jax": in_jax}, choose=choose)


def test_results_lie_where_the_arguments_lie_whatever_has_run(doubled: Operation[Any]) -> None:
    jax = pytest.importorskip("jax")
    ones = np.ones(2)
    for given, kind in ((ones, np.ndarray), ([*ones], np.ndarray), (jax.numpy.ones(2), jax.Array)):
        for name in ("numpy", "jax"):
            found = doubled(given, 3, prefer=name)
            assert isinstance(found, Pair)
            assert isinstance(found.a, kind), (given, name)
            assert isinstance(found.b["n"], kind)
            assert found.b["text"] == name
            assert found.a.tolist() == [2.0, 2.0]
    host = doubled(np.ones(2), prefer="jax").a
    host[0] = 7.0  # it can be written to
    assert host[0] == 7.0


def test_data_that_holds_itself_is_no_trap() -> None:
    pytest.importorskip("jax")
    ring = list[Any]()
    ring.append({"ring": ring})
    assert operation("count", {"a": len})(ring) == 1


def test_the_default_is_numpy_for_the_host_and_jax_for_a_device(doubled: Operation[Any]) -> None:
    jax = pytest.importorskip("jax")

    @dataclasses.dataclass
    class Holder:
        inner: Any

        def __len__(self) -> int:
            return 2

    op = dataclasses.replace(
        doubled, implementations={"numpy": lambda x, k=1: "numpy", "jax": lambda x, k=1: "jax"}
    )
    on_device = jax.numpy.ones(2)
    host = [np.ones(2), [1.0], (np.ones(2),), {"x": 1}, Holder([np.ones(2)]), range(2)]
    device = [on_device, [on_device], {"x": (on_device,)}, Holder([np.ones(2), on_device])]
    assert {op(each) for each in host} == {"numpy"}
    assert {op(each) for each in device} == {"jax"}
    assert op([1.0], k=on_device) == "jax"


def test_what_jax_traces_is_never_given_to_numpy(doubled: Operation[Any]) -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones(2)
    assert jax.jit(lambda x: doubled({"x": x}["x"]).a)(x).tolist() == [2.0, 2.0]
    assert jax.grad(lambda x: doubled(x).a.sum())(x).tolist() == [2.0, 2.0]
    with pytest.warns(RuntimeWarning, match="'numpy' cannot run, 'jax' takes its place"):
        assert jax.grad(lambda x: doubled(x, prefer="numpy").a.sum())(x).tolist() == [2.0, 2.0]
    with pytest.raises(ember.SetupError, match="jit, grad and vmap trace"):
        jax.jit(lambda x: doubled(x, prefer="numpy", fallback=False).a)(x)
    with pytest.raises(ember.SetupError, match="no implementation can run"):
        jax.jit(operation("one", {"numpy": lambda x: x}))(x)


PROGRAM = """
import sys
import numpy as np
from ember_accel import dispatch
from ember_accel.dispatch import measured, operation
rows = [[[1], {"numpy": 9.0, "jax": 1.0}]]
dispatch._table = lambda: {"op": {"host": rows}}
def by_jax(x):
    import jax
op = operation("op", {"jax": by_jax, "numpy": np.asarray, "pallas": by_jax},
               choose=measured("op", lambda x: (len(x),)))
print(op([1, 2, 3]).tolist(), "jax" in sys.modules)
sys.modules["jax"] = None
print(op([1, 2, 3]).tolist(), op.missing()["jax"], op.missing()["numpy"])
"""


def test_a_cold_call_on_host_data_does_not_import_jax_and_needs_none() -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == "[1, 2, 3] False"
    assert second.startswith("[1, 2, 3] jax is not installed. Install it")
    assert second.endswith(" None")


# ── The table ───


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A table in which JAX is faster for much data, on the host and on the CPU."""
    pytest.importorskip("jax")
    few = [[10, 1], {"numpy": 1.0, "jax": 9.0}]
    many = [[10_000, 1], {"numpy": 9.0, "jax": 1.0, "pallas": 0.1}]
    table = {"sized": {"host": [few, many], "cpu": [few]}}
    monkeypatch.setattr(dispatch, "_table", lambda: table)
    return table


def sized(*names: str) -> Operation[str]:
    """An operation that is in the table."""
    return dataclasses.replace(named(*names), name="sized", choose=measured("sized", size))


def test_the_nearest_size_by_ratio_decides_and_pallas_is_never_chosen_on_a_cpu(
    table: dict[str, Any],
) -> None:
    import jax

    op = sized("pallas", "numpy", "jax")
    counts = (1, 10, 100, 1_000, 10_000, 10**6)
    assert [op(range(n)) for n in counts] == ["numpy"] * 3 + ["jax"] * 3
    assert op(jax.numpy.ones(10_000)) == "numpy"  # nearest of the device's own rows
    assert sized("mine", "jax", "numpy")(range(10)) == "numpy"
    assert sized("mine", "jax")(range(10)) == "jax"
    assert sized("mine", "other")(range(10)) == "mine"


def test_hooks_see_the_size_by_which_it_was_chosen(table: dict[str, Any]) -> None:
    choices = list[Choice]()
    with on_choice(choices.append):
        sized("numpy", "jax")(range(7))
    assert choices[0].size == (7, 1)


def test_a_choice_of_ones_own_can_go_on_to_the_table(table: dict[str, Any]) -> None:
    by_table = measured("sized", size)

    def choose(available: Any, x: Any) -> str:
        return "mine" if len(x) == 5 else by_table(available, x)

    op = dataclasses.replace(named("numpy", "jax", "mine"), choose=choose)
    assert [op(range(n)) for n in (5, 10, 10_000)] == ["mine", "numpy", "jax"]


def test_the_table_that_is_shipped_is_small_and_says_where_it_was_measured() -> None:
    text = Path(dispatch.__file__).with_name("measured.json").read_text(encoding="utf-8")
    shipped = json.loads(text)
    assert len(text) < 8_192
    assert {"host", "cpu"} <= shipped.pop("machine").keys()
    for places in shipped.values():
        for rows in places.values():
            assert rows
            for sizes, times in rows:
                assert all(isinstance(n, int) for n in sizes)
                assert all(us > 0 for us in times.values())
    assert shipped.keys() <= implementations().keys()


# ── Parity ───


def test_parity_measures_numbers_and_names_the_rows_that_differ_or_fail() -> None:
    def exact(x: Any, y: float = 0.0) -> Any:
        return {"x": x, "sum": [np.asarray(x) + y, "text"]}

    def rough(x: Any, y: float = 0.0) -> Any:
        if y == 3:
            raise ValueError("three")
        off = {1.0: 1e-7, 2.0: 0.5}.get(y, 0.0)
        return {"sum": [np.asarray(x) + y + off, "text"], "x": x}

    rows = [(1.0,), {"x": 1.0, "y": 1.0}, (1e30, 2.0), (0.0, 2.0), (1.0, 3.0), (math.nan, 1.0)]
    compared = parity(operation("sum", {"exact": exact, "rough": rough}), rows)
    assert compared.gaps["rough"] == pytest.approx([0, 5e-8, 0, 0.25, math.inf, 0])
    assert compared.apart("rough") == [3, 4]
    assert str(compared) == (
        "sum: compared with 'exact', within 1e-05\n"
        "  rough     4 of 6 rows equal, apart by inf at most: rows [3, 4]"
    )


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ([1, 2], [1, 2], True), ([1, 2], [1, 2, 3], False), ((1,), [1], True), ("a", "b", False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True), ({"a": 1}, {"b": 1}, False), (1, "1", False),
        (np.zeros((2, 0)), np.zeros((2, 0)), True), (np.zeros((2, 1)), np.zeros(2), False),
        (math.inf, math.inf, True), (math.inf, -math.inf, False), (math.nan, 0.0, False),
        (None, None, True), (None, 0.0, False), (ValueError("a"), ValueError("b"), True),
        (ValueError("a"), TypeError("a"), False), (ValueError("a"), 1, False),
        (Pair(1, "a"), Pair(1, "a"), True), (Pair(1, "a"), Pair(2, "a"), False),
        (np.uint8([1]), np.uint8([2]), False), (True, 1.0, True), (1e300, 1e300, True),
    ],
)  # fmt: skip
def test_parity_knows_equal_from_unequal(one: Any, other: Any, equal: bool) -> None:
    def gives(value: Any) -> Any:
        def give() -> Any:
            if isinstance(value, Exception):
                raise value
            return value

        return give

    op = operation("given", {"one": gives(one), "other": gives(other)})
    assert (parity(op, [()]).apart("other") == []) is equal


async def test_parity_of_an_async_operation_is_awaited_and_compares_what_is_asked_for() -> None:
    op, calls = asked()
    compared = await parity(op, [(1,), (2,)], prefer=["b", "a"])
    assert (compared.reference, dict(compared.gaps)) == ("b", {"a": [0, 0]})
    assert calls == ["b", "a", "b", "a"]


def test_parity_leaves_out_what_is_missing_and_takes_no_fallback_for_it() -> None:
    op = named("a", "b", "c", needs={"c": "no_such_module"})
    assert parity(op, [(), ()]).gaps == {"b": [math.inf, math.inf]}
    assert parity(op, [()], prefer=["a", "c"]).apart("c") == [0]


# ── The library's own ───


def test_the_librarys_operations_are_found_and_none_lacks_numpy() -> None:
    found = implementations()
    assert {"topk", "maxsim", "local_quality"} <= found.keys()
    assert {causes["numpy"] for causes in found.values()} == {None}


def test_measuring_rewrites_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jax = pytest.importorskip("jax")
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tests/bench/bench_dispatch.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    file = tmp_path / "measured.json"
    op = operation(
        "op", {"numpy": np.asarray, "jax": jax.numpy.asarray, "pallas": lambda x: 1 / 0},
        choose=measured("op", lambda x: (len(x),)), cases=lambda: [(np.ones(3),)],
    )  # fmt: skip
    monkeypatch.setattr(dispatch, "_FILE", file)
    monkeypatch.setattr(dispatch, "_table", lambda: {"op": {"gpu": ["kept"]}})
    monkeypatch.setattr(dispatch, "library", lambda: [op, named("without", "cases")])
    bench.rebuild()
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written.keys() == {"op", "machine"}
    assert written["op"]["gpu"] == ["kept"]
    for place in ("host", "cpu"):
        [[sizes, times]] = written["op"][place]
        assert sizes == [3]
        assert times.keys() == {"numpy", "jax"}
        assert min(times.values()) > 0
