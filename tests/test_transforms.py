"""Transforms: on eight devices all is as on one, whatever the sizes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ember
from ember_accel.state import state, static_field
from ember_accel.transforms import compose, pmap, sharded, vmap

jax = pytest.importorskip("jax")
jnp = jax.numpy
P = jax.sharding.PartitionSpec

SIZES = [0, 1, 7, 8, 17]
RANDOM = np.random.default_rng(0)
RIGHT = RANDOM.normal(size=(3, 2)).astype(np.float32)

if jax.device_count() < 8:
    pytest.skip("XLA_FLAGS came too late for eight devices", allow_module_level=True)


@state
class Scorer:
    weights: Any
    bias: Any = 0.5
    way: Any = static_field(default=jnp.tanh)


def score(scorer: Scorer, x: Any) -> Any:
    running, _ = jax.lax.scan(lambda sum_, one: (sum_ + one, None), jnp.float32(0), x)
    return {"score": scorer.way(x @ scorer.weights + scorer.bias), "inverse": 1 / running}


def reduced(x: Any, y: Any) -> Any:
    return x.sum(0) / max(len(x), 1), jax.nn.softmax(x @ y, 0), x.T @ x


def rows(size: int) -> Any:
    return RANDOM.normal(size=(size, 3)).astype(np.float32)


def is_near(got: Any, wanted: Any) -> bool:
    """Whether two trees have one form, and the same numbers within 1e-6."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    pairs = [*zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)]
    assert all((one.shape, one.dtype) == (two.shape, two.dtype) for one, two in pairs)
    return all(np.allclose(*pair, rtol=1e-6, atol=1e-6, equal_nan=True) for pair in pairs)


on_all = pmap(score, in_axes=(None, 0))
on_one = jax.jit(vmap(score, in_axes=(None, 0)))


@pytest.mark.parametrize("size", SIZES)
def test_pmap_is_vmap_for_any_number_of_rows(size: int) -> None:
    scorer, x = Scorer(RIGHT), rows(size)
    assert is_near(on_all(scorer, x), on_one(scorer, x))


def test_pmap_gives_each_device_its_rows() -> None:
    found = on_all(Scorer(RIGHT), rows(8))["score"]
    assert len({shard.device for shard in found.addressable_shards}) == 8
    assert {shard.data.shape for shard in found.addressable_shards} == {(1, 2)}
    two = pmap(jnp.sin, devices=jax.devices()[:2])(rows(8))
    assert [shard.data.shape for shard in two.addressable_shards] == [(4, 3)] * 2


def test_pmap_has_the_gradients_of_vmap_also_within_jit() -> None:
    scorer, x = Scorer(RIGHT), rows(7)

    def loss(scorer: Scorer, over: Any) -> Any:
        return over(scorer, x)["score"].sum()

    wanted = jax.grad(loss)(scorer, on_one)
    assert is_near(jax.jit(jax.grad(lambda scorer: loss(scorer, on_all)))(scorer), wanted)


def test_pmap_reduces_over_all_rows_by_the_name_of_their_axis() -> None:
    x = rows(7)
    share = pmap(lambda row: row - jax.lax.pmean(row, "batch"), axis_name="batch")
    assert is_near(share(x), jnp.asarray(x - x.mean(0)))


def test_pmap_takes_random_keys_and_rows_of_another_device() -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    assert is_near(pmap(jax.random.key_data)(keys), jax.random.key_data(keys))
    x = jax.device_put(rows(7), jax.devices()[3])  # the size that has been compiled above
    assert is_near(on_all(Scorer(RIGHT), x), on_one(Scorer(RIGHT), np.asarray(x)))


def test_pmap_refuses_what_vmap_does() -> None:
    with pytest.raises(ValueError, match="inconsistent sizes"):
        pmap(jnp.add)(rows(3), rows(5))
    with pytest.raises(ValueError, match="rank should be at least 1"):
        pmap(jnp.sin)(1.0)
    with pytest.raises(ValueError, match=r"in_axes=\(0, 1\)"):
        pmap(jnp.add, in_axes=(0, 1))(rows(3), rows(3))


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
MESHES = {
    (kind.name, shape): jax.make_mesh(shape, tuple(names), axis_types=(kind,) * len(shape))
    for kind, shape, names in [(AUTO, (8,), "a"), (EXPLICIT, (8,), "a"), (EXPLICIT, (4, 2), "ab")]
}
PLACED = {
    name: sharded(reduced, mesh, (P(mesh.axis_names), P(None, mesh.axis_names[-1])))
    for name, mesh in MESHES.items()
}


@pytest.mark.parametrize(
    ("kind", "shape", "size"),
    [("Auto", (8,), 7), ("Explicit", (4, 2), 9), *(("Explicit", (8,), size) for size in (0, 8))],
)
def test_sharded_computes_what_one_device_does_also_over_the_batch(
    kind: str, shape: Any, size: int
) -> None:
    x = rows(size)
    assert is_near(PLACED[kind, shape](x, RIGHT), jax.jit(reduced)(x, RIGHT))


def test_sharded_places_its_inputs_and_traces_each_size_once() -> None:
    seen: list[Any] = []
    jax_fn = sharded(lambda x: seen.append(x.shape) or x * 2, MESHES["Explicit", (8,)], P("a"))
    for size in (16, 16, 9, 9):
        found = jax_fn(rows(size))
    assert seen == [(16, 3), (9, 3)]
    assert found.shape == (9, 3)
    assert {one.data.shape for one in jax_fn(rows(16)).addressable_shards} == {(2, 3)}


def test_sharded_splits_a_state_by_a_state_of_specs_or_by_one_for_all_of_it() -> None:
    scorer, x = Scorer(rows(9), np.ones(9)), rows(9)
    mesh = MESHES["Auto", (8,)]
    for spec in (P("a"), (Scorer(P("a"), None), P("a")), (P("a"), None)):
        got = sharded(lambda net, x: (net.way(net.weights) * x).sum(), mesh, spec)(scorer, x)
        assert is_near(got, (jnp.tanh(scorer.weights) * x).sum())


def test_sharded_has_gradients_and_works_within_the_mesh_of_its_caller() -> None:
    mesh, x = MESHES["Explicit", (8,)], jnp.asarray(rows(7))
    mean = sharded(lambda x: (x**2).mean(), mesh, P("a"))
    assert is_near(jax.grad(mean)(x), 2 * x / x.size)
    even = jax.device_put(rows(8), jax.sharding.NamedSharding(mesh, P("a")))
    with jax.set_mesh(mesh):
        assert is_near(mean(x), (x**2).mean())
        found = mean(even)
    assert is_near(found, jnp.asarray((np.asarray(even) ** 2).mean()))


def test_sharded_names_an_axis_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="z"):
        sharded(jnp.sin, MESHES["Auto", (8,)], P("z"))(rows(8))


def test_compose_applies_the_last_transform_first() -> None:
    def adds(text: str) -> Any:
        return lambda fn: lambda given: fn(given) + text

    assert compose(adds("a"), adds("b"), adds("c"))(str)(1) == "1cba"
    assert compose()(score) is score
    slopes = compose(jax.jit, vmap, jax.grad)(jnp.sin)
    assert is_near(slopes(np.zeros(3)), jnp.ones(3))


def test_without_jax_it_can_be_defined_and_a_call_says_what_to_install() -> None:
    text = "import sys, ember_accel.transforms as t; t.vmap(abs), t.pmap(abs), t.sharded(abs, 1, 1)"
    program = f"{text}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_a_missing_jax_is_a_set_up_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ember.SetupError, match=r"abs.* needs JAX: pip install"):
        vmap(abs)([1])
