"""State: what JAX sees of it, what it cannot get wrong, and what it is without JAX."""

import copy
import dataclasses
import functools
import importlib.machinery
import inspect
import json
import pickle
import subprocess
import sys
from collections import namedtuple
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import ember
from ember_accel.state import (
    Frozen,
    combine,
    field,
    is_static,
    partition,
    restore,
    save,
    state,
    static_field,
)  # fmt: skip

jax = pytest.importorskip("jax")
jnp = jax.numpy
ROOT = Path(__file__).parents[1]


@state
class Net:
    weights: Any
    bias: Any = 0.5
    mode: Any = static_field(default="plain")
    tools: Any = static_field(default=())


@dataclasses.dataclass(frozen=True)
class Config:
    size: Any


class Pair(NamedTuple):
    left: Any
    right: Any


def double(x: Any) -> Any:
    return 2 * x


def total(net: Net) -> Any:
    return (net.weights * net.bias).sum()


# Construction


@pytest.mark.parametrize(
    "given", [1.5, np.float64(1.5), np.array(1.5), jnp.array(1.5), jnp.float32(1.5)]
)
def test_every_float_becomes_a_strongly_typed_float32_array(given: Any) -> None:
    (leaf,) = jax.tree.leaves(Net(given, None))
    typed = jax.typeof(leaf)
    assert (typed.dtype, typed.weak_type, typed.shape, float(leaf)) == (np.float32, False, (), 1.5)


def test_ints_bools_and_holes_stay_and_containers_are_converted_within() -> None:
    net = Net({"a": [1, True, None, 2.0], "b": (np.zeros(2), Pair(1j, Net(0.5)))})
    assert net.weights["a"][:3] == [1, True, None]
    kinds = [getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(net.weights)]
    assert kinds == [None, None, *["float32"] * 2, "complex64", *["float32"] * 2]
    assert type(net.weights["b"][1]) is Pair


@pytest.mark.parametrize(
    "wrong",
    [double, lambda: 0, functools.partial(double), "text", b"text", ember.models.gpt4, Config, {1},
     object(), np.array(["text"]), np.array([None]), jax.jit(double), Config(1)],
)  # fmt: skip
def test_what_is_no_array_cannot_be_dynamic(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"Net\.weights=.* no array.*static_field\(\)"):
        Net(wrong)
    with pytest.raises(TypeError, match=r"Net\.weights\['a'\]\[1\]="):
        Net({"a": [1.0, wrong]})


@pytest.mark.parametrize(
    "wrong", [np.ones(2), jnp.ones(2), [np.ones(2)], bytearray(b"x"), {"a": Net(1.0)}]
)
def test_what_has_no_hash_cannot_be_static(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"Net\.mode=.* is static, but .* has no hash"):
        Net(1.0, mode=wrong)


@pytest.mark.parametrize("wrong", [float("nan"), [1, np.float32("nan")], {"a": complex("nan")}])
def test_nan_cannot_be_static(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Net\.mode is static, but NaN"):
        Net(1.0, mode=wrong)


def test_a_static_value_within_another_that_has_no_hash_is_named() -> None:
    with pytest.raises(TypeError, match="unhashable") as caught:
        Net(1.0, mode=Config([1]))
    assert caught.value.__notes__ == ["It was raised for Net.mode"]


def test_statics_are_frozen_all_the_way_down() -> None:
    given = {"a": [1, {"b": {2}}], "c": Pair([1], 2)}
    net = Net(1.0, mode=given)
    given["a"].append(3)
    assert net.mode == {"a": (1, {"b": frozenset({2})}), "c": Pair((1,), 2)}
    assert net.mode["a"][1]["b"] == {2}
    assert type(net.mode["c"]) is Pair
    assert json.loads(json.dumps(Frozen(a=1))) == {"a": 1}
    assert hash(net.mode) == hash(Net(1.0, mode=net.mode).mode)
    for change in ("clear", "popitem", "update"):
        with pytest.raises(TypeError, match="static: it cannot change"):
            getattr(net.mode, change)()
    with pytest.raises(TypeError, match="static: it cannot change"):
        net.mode["a"] = 1
    assert pickle.loads(pickle.dumps(net.mode)) == copy.deepcopy(net.mode) == net.mode


def test_models_functions_and_lists_of_them_are_static_values() -> None:
    net = Net(1.0, mode=ember.models.gpt4, tools=[double, functools.partial(double, 1), Config])
    assert (net.mode, net.tools[0]) == (ember.models.gpt4, double)
    assert jax.tree.structure(net) == jax.tree.structure(Net(2.0, mode=net.mode, tools=net.tools))
    assert jax.tree.structure(Net(1.0, mode=ember.model("openai:gpt-4o"))) == jax.tree.structure(
        Net(1.0, mode=ember.model("openai:gpt-4o"))
    )


def test_converters_run_at_construction_only_and_their_errors_name_the_field() -> None:
    runs: list[Any] = []

    @state
    class Converted:
        weights: Any = field(converter=lambda given: runs.append(given) or np.asarray(given))
        names: Any = static_field(default=(), converter=sorted, kw_only=True)

    made = Converted([1, 2], names="ba")
    assert (made.names, made.weights.tolist()) == (("a", "b"), [1, 2])
    jax.tree.map(str, made)
    partition(made)
    assert runs == [[1, 2]]
    with pytest.raises(TypeError, match="int") as caught:
        Converted(1, names=1)
    assert caught.value.__notes__ == ["It was raised for Converted.names"]


def test_a_state_is_a_frozen_dataclass() -> None:
    net = Net(np.arange(3.0))
    assert str(inspect.signature(Net)) == (
        "(weights: Any, bias: Any = 0.5, mode: Any = 'plain', tools: Any = ()) -> None"
    )
    assert dataclasses.replace(net, weights=2.0).weights.dtype == np.float32
    assert [*dataclasses.asdict(net)] == ["weights", "bias", "mode", "tools"]
    assert copy.deepcopy(net) == pickle.loads(pickle.dumps(net)) == copy.copy(net) == net
    with pytest.raises(dataclasses.FrozenInstanceError):
        net.bias = 1.0  # type: ignore
    with pytest.raises(TypeError, match="unhashable type: 'Net'"):
        hash(net)
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'weights'"):
        Net()  # type: ignore


@pytest.mark.parametrize(
    ("other", "equal"),
    [(Net(np.ones(2)), True), (Net(jnp.ones(2)), True), (Net(np.zeros(2)), False),
     (Net(np.ones(3)), False), (Net([1.0, 1.0]), False), (Net(np.ones(2), mode="x"), False),
     (Net(np.ones(2), None), False), (1, False)],
)  # fmt: skip
def test_states_are_equal_by_value(other: Any, equal: bool) -> None:
    assert (Net(np.ones(2)) == other) is equal


def test_post_init_runs_where_the_user_constructs_and_not_where_jax_does() -> None:
    runs: list[str] = []

    @state
    class Checked:
        weights: Any

        def __post_init__(self) -> None:
            runs.append("post")
            object.__setattr__(self, "weights", self.weights * 2)

    made = Checked(1.0)
    assert float(made.weights) == 2.0
    assert float(jax.tree.map(lambda leaf: leaf + 1, made).weights) == 3.0
    assert runs == ["post"]


# Classes


def test_a_subclass_has_to_be_decorated_and_inherits_the_fields() -> None:
    class Plain(Net):
        pass

    @dataclasses.dataclass(frozen=True)
    class Data(Net):
        more: Any = 1.0

    class Own(Net):
        def __init__(self) -> None:
            object.__setattr__(self, "weights", 1.0)

    for wrong in (Plain, Data):
        with pytest.raises(TypeError, match=rf"{wrong.__name__}.*@state: a subclass"):
            wrong(1.0)
    with pytest.raises(TypeError, match=r"Own.*@state"):
        Own()

    @state
    class Deep(Plain):
        more: Any = 2.0

    assert [float(leaf) for leaf in jax.tree.leaves(Deep(1.0))] == [1.0, 0.5, 2.0]
    assert Deep(1.0) != Net(1.0)
    assert is_static(Deep, "mode")


def test_what_jax_would_lose_is_refused_when_a_class_is_decorated() -> None:
    with pytest.raises(TypeError, match=r"Lost\.x has init=False"):

        @state
        class Lost:
            x: Any = field(default=1.0, init=False)

    for wrong in (dataclasses.make_dataclass("Wrong", ["x"], frozen=True), Net):
        with pytest.raises(TypeError, match=r"it cannot have .*__dataclass_fields__"):
            state(wrong)
    with pytest.raises(TypeError, match="it cannot have __init__"):
        state(type("Wrong", (), {"__init__": lambda self: None}))


def test_is_static_knows_the_fields_of_objects_and_classes() -> None:
    assert (is_static(Net, "mode"), is_static(Net(1.0), "weights")) == (True, False)
    with pytest.raises(AttributeError, match=r"no field 'modes'.*weights, bias, mode, tools"):
        is_static(Net, "modes")


# What JAX sees


def test_a_step_is_traced_once_however_the_state_was_made() -> None:
    traces: list[int] = []

    @jax.jit
    def step(net: Net) -> Net:
        traces.append(1)
        return dataclasses.replace(net, weights=net.weights - 0.1 * net.bias, bias=net.bias * 0.5)

    first = Net(1.0, tools=[double])
    for _ in range(3):
        first = step(first)
    step(Net(jnp.array(1.0), np.float64(3.0), tools=(double,)))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (1, 1.0), (0.0, -0.0), ((1, (2,)), (1, (2.0,))), ({1, 2.0}, {1.0, 2}),
     ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({1: "a"}, {True: "a"}), (Config(1), Config(True)),
     (1.0, np.float64(1.0)), (Pair(1, 2), (1, 2))],
)  # fmt: skip
def test_static_values_that_are_equal_and_not_the_same_are_told_apart(one: Any, other: Any) -> None:
    assert one == other
    assert jax.tree.structure(Net(1.0, mode=one)) != jax.tree.structure(Net(1.0, mode=other))
    assert Net(1.0, mode=one) != Net(1.0, mode=other)
    assert Net(1.0, mode=one) == Net(1.0, mode=copy.deepcopy(one))


def test_a_changed_static_gives_no_stale_result() -> None:
    @jax.jit
    def last(net: Net) -> Any:
        return net.weights * net.mode[-1]

    given = [1.0, 2.0]
    assert float(last(Net(1.0, mode=given))) == 2.0
    given.append(3.0)
    assert float(last(Net(1.0, mode=given))) == 3.0


def test_gradients_reach_the_dynamic_fields_only() -> None:
    net = Net(np.ones(3), tools=[double], mode={"a": 1})
    slope = jax.grad(total)(net)
    assert slope == Net(np.full(3, 0.5), 3.0, tools=[double], mode={"a": 1})
    learned, rest = partition(Net({"w": np.ones(3), "n": 3}, tools=[double]))
    assert (learned.weights["n"], rest.weights["w"], rest.bias) == (None, None, None)
    slope = jax.grad(lambda part: total_of(combine(part, rest)))(learned)
    assert (slope.weights["n"], float(slope.bias)) == (None, 9.0)


def total_of(net: Net) -> Any:
    return (net.weights["w"] * net.weights["n"] * net.bias).sum()


def test_vmap_takes_a_state_of_axes() -> None:
    nets, rows = Net(np.arange(3.0)), np.arange(3.0)
    for axes in (Net(0, None), jax.tree.map(lambda leaf: 0 if leaf.ndim else None, nets)):
        got = jax.vmap(lambda net, x: total(net) * x, in_axes=(axes, 0))(nets, rows)
        assert got.tolist() == [0.0, 0.5, 2.0]


def test_scan_carries_a_state_and_refuses_another_static() -> None:
    def step(net: Net, _: Any) -> tuple[Net, None]:
        return dataclasses.replace(net, weights=net.weights + 1), None

    assert jax.lax.scan(step, Net(1.0), None, length=3)[0] == Net(4.0)
    with pytest.raises(ValueError, match="metadata"):
        jax.tree.map(lambda *two: two, Net(1.0), Net(1.0, mode="x"))


def test_leaves_may_be_anything_where_jax_rebuilds_a_state() -> None:
    net = Net(np.ones(2), tools=[double])
    assert jax.tree.map(str, net).bias == "0.5"
    assert jax.tree.map(lambda leaf: None, net).weights is None
    assert jax.eval_shape(lambda one: one, net).weights.shape == (2,)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert jax.device_put(net, Net(place, place, tools=[double])) == net
    assert jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(net)[0][0]) == ".weights"


# Partition


@pytest.mark.parametrize(
    "tree",
    [Net(np.ones(2), None), [1, (2.0, np.ones(2))], {"b": 1, "a": Pair(np.ones(1), None)}, None,
     np.ones(2), Net({"n": Net(np.nan)}), (), [[], {}]],
    ids=str,
)  # fmt: skip
def test_combine_undoes_partition(tree: Any) -> None:
    learned, rest = partition(tree)
    assert str(combine(learned, rest)) == str(combine(rest, learned)) == str(tree)
    whole = Net(tree)
    assert combine(*partition(whole)) == whole


def test_partition_takes_any_filter_and_any_pytree() -> None:
    tree = {"p": jax.tree_util.Partial(double, 1.0, x=jnp.ones(2, jnp.bfloat16)), "n": 1}
    learned, rest = partition(tree)
    assert (learned["p"].args, rest["p"].keywords) == ((None,), {"x": None})
    assert partition([1, "a"], lambda leaf: leaf == "a") == ([None, "a"], [1, None])
    assert partition([jax.random.key(0), np.arange(2)])[0] == [None, None]


@pytest.mark.parametrize(
    "other", [(1, None), [1], [1, [None]], [1, None, None], {"a": 1}, {"c": 1, "b": 2}]
)
def test_combine_refuses_trees_of_other_forms(other: Any) -> None:
    with pytest.raises(ValueError, match="combine: the forms differ"):
        combine({"a": None, "b": 2} if type(other) is dict else [None, 2], other)
    with pytest.raises(ValueError, match="combine: the forms differ"):
        combine(Net(1.0), Net(1.0, mode="x"))


def test_partition_keeps_no_cached_property_of_other_leaves() -> None:
    @state
    class Cached:
        weights: Any

        @functools.cached_property
        def twice(self) -> Any:
            return None if self.weights is None else 2 * self.weights

    made = Cached(1.0)
    assert made.twice == 2.0
    assert partition(made, lambda leaf: False)[0].twice is None


# Files


def test_save_and_restore_keep_arrays_and_take_models_from_what_is_given(tmp_path: Path) -> None:
    layers = {"a/b": np.ones(2), "n": 3, "half": jnp.ones(2, jnp.bfloat16), "no": None}
    net = Net([layers, Net(0.25)], mode={"q": [1, 2]}, tools=[double, ember.models.gpt4])
    save(net, tmp_path / "net")
    blank = jax.tree.map(lambda leaf: 0 * leaf, net)
    assert blank != net
    assert restore(blank, tmp_path / "net") == net
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize(
    ("like", "message"),
    [(Net(np.ones(3)), r"Net\.weights is float32\[2\] in .*, and float32\[3\] in the object"),
     (Net(np.ones(2, int)), r"Net\.weights is float32\[2\] in .*, and int64\[2\]"),
     (Net(np.ones(2), None), r"Net\.bias is float32\[\] in .*, and missing"),
     (Net(np.ones(2), mode=True), r'Net\.mode is "plain" in .*, and true'),
     (Net({"a": np.ones(2)}), r"Net\.weights is float32\[2\] in .*, and missing"),
     ([np.ones(2)], r"Net\.bias is float32\[\] in .*, and missing")],
)  # fmt: skip
def test_restore_names_what_differs(tmp_path: Path, like: Any, message: str) -> None:
    save(Net(np.ones(2)), tmp_path / "net.npz")
    with pytest.raises(ValueError, match=message):
        restore(like, tmp_path / "net.npz")


def test_a_save_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "net.npz"
    save(Net(1.0), path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"list\[0\]"):
        save(["text"], path)
    assert (path.read_bytes(), [*tmp_path.iterdir()]) == (before, [path])


def test_restore_unpickles_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, json=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        restore(Net(1.0), path)


# With and without JAX

LATE = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from ember_accel.state import combine, partition, restore, save, state, static_field

@state
class Net:
    weights: object
    mode: object = static_field(default=())

class Plain(Net): ...

early = Net({{"a": [0.5, None]}}, mode=[1])
assert combine(*partition(early)) == early != Net(1.0)
save(early, {path!r})
assert restore(early, {path!r}) == early
assert "jax" not in sys.modules
if {late}:
    import importlib.util
    importlib.util.find_spec("jax")
    import jax.numpy
    assert len(jax.tree.leaves([early, Net(np.ones(3))])) == 2
    assert jax.grad(lambda net: net.weights["a"][0] ** 2)(early).weights["a"][0] == 1.0
else:
    sys.modules["jax"] = None
    @state
    class Later(Net):
        more: object = 1.0
    assert Later(2.0, [1]).mode == (1,)
"""


@pytest.mark.parametrize("late", [True, False])
def test_a_state_is_plain_without_jax_and_a_pytree_once_it_is_there(
    late: bool, tmp_path: Path
) -> None:
    root = str(Path(__file__).parents[1])
    text = LATE.format(root=root, path=str(tmp_path / "net.npz"), late=late)
    subprocess.run([sys.executable, "-W", "error", "-c", text], check=True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Decimal(1), Decimal("1.00")), (range(0, 3, 2), range(0, 4, 2)),
        (namedtuple("N", "a b")(1, 2), namedtuple("N", "b a")(1, 2)),
        (datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))),
         datetime(2026, 1, 1, tzinfo=timezone.utc)),
    ],
)  # fmt: skip
def test_statics_that_are_equal_but_not_the_same_are_compiled_for_themselves(
    first: Any, second: Any
) -> None:
    @state
    class Held:
        weight: Any
        value: Any = static_field()

    seen: list[Any] = []
    run = jax.jit(lambda held: seen.append(held.value) or held.weight)
    for value in (first, second, first):
        run(Held(1.0, value))
    assert [*map(repr, seen)] == [repr(first), repr(second)]


def test_a_partial_over_what_can_change_is_refused() -> None:
    @state
    class Held:
        value: Any = static_field()

    with pytest.raises(TypeError, match="unhashable type: 'list'") as caught:
        Held(functools.partial(print, [1]))
    assert "Held.value" in caught.value.__notes__[0]
    assert Held(functools.partial(print, 1)).value.args == (1,)


def test_a_whole_number_in_a_field_of_floats_is_learned() -> None:
    @state
    class Gate:
        threshold: float = 0.5
        count: int = 3

    dynamic, _ = partition(Gate(1))
    assert dynamic.threshold.dtype == np.float32
    assert dynamic.count is None


def test_states_under_jit_have_no_truth() -> None:
    @state
    class Held:
        weight: Any

    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda one, two: one == two)(Held(1.0), Held(1.0))


def test_a_name_that_jax_needs_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Taken\._kinds is a name that JAX needs"):

        @state
        class Taken:
            _kinds: Any


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    @state
    class Held:
        weight: Any
        call: Any = static_field(default=print)

    np.savez(tmp_path / "other.npz", weight=np.ones(2))
    with pytest.raises(ValueError, match="was not written by save"):
        restore(Held, tmp_path / "other.npz")
    save(Held(1.0), tmp_path / "held.npz")
    with pytest.raises(ValueError, match=r"Held\.call is not in .* Give an object that has it"):
        restore(Held, tmp_path / "held.npz")


RACE = """
import sys, threading, time
from ember_accel.state import partition, state

@state
class Made:
    weight: float = 1.0

faults, done = [], threading.Event()

def work():
    while not done.is_set():
        time.sleep(0.0005)
        try:
            partition(Made(2.0))
            assert Made(1.0) == Made(1.0)
            made = state(type("Later", (), {"__annotations__": {"w": float}, "__module__": "m"}))
            later.append(made(1.0))
        except Exception as error:
            faults.append(error)

later = []
thread = threading.Thread(target=work)
thread.start()
import jax
done.set()
thread.join()
assert not faults, faults[:1]
assert len(jax.tree.leaves([Made(3.0), later[0], later[-1]])) == 3
leaf = jax.tree.leaves(type(later[0])(2.0))[0]
assert leaf.dtype == "float32"
"""


def test_states_are_made_while_another_thread_imports_jax() -> None:
    done = subprocess.run([sys.executable, "-c", RACE], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_jax_has_left_behind_is_not_jax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jax").mkdir()
    watch = next(each for each in sys.meta_path if type(each).__name__ == "_Watch")
    monkeypatch.setattr(sys, "meta_path", [watch, importlib.machinery.PathFinder])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert watch.find_spec("jax", None, None).loader is None
