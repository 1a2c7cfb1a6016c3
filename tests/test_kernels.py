"""ember_accel/kernels.py: gradients, memory, and the Pallas kernels in the interpreter."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import ember
from ember_accel import retrieval
from ember_accel.retrieval import local_quality, maxsim, topk

jax = pytest.importorskip("jax")
jnp = jax.numpy

from ember_accel import kernels  # noqa: E402

RNG = np.random.default_rng(3)
QUERIES, POINTS = (RNG.normal(size=(rows, 20)).astype(np.float32) for rows in (18, 64))
OUTCOMES = RNG.normal(size=(64, 3)).astype(np.float32)
TOKENS, LENGTHS = RNG.normal(size=(5, 40, 20)).astype(np.float32), np.array([40, 0, 16, 17, 1])
ARGUMENTS = {
    "topk": (topk, (QUERIES, POINTS, 9)),
    "maxsim": (maxsim, (QUERIES, TOKENS, LENGTHS)),
    "local_quality": (local_quality, (QUERIES, POINTS, OUTCOMES, 0.7)),
}
QUICK = {"xla_backend_optimization_level": 0}  # to compile, where it runs but once
EACH = pytest.mark.parametrize("name", ARGUMENTS)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that tiny inputs have several, and a compiler in a hurry."""
    monkeypatch.setattr(retrieval, "SCORES", 640)
    for name in ("ROWS", "COLUMNS", "WIDTH"):
        monkeypatch.setattr(kernels, name, 16)
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# ── 1. Compiled functions ───


def dense(name: str, arguments: Any) -> Any:
    """The same with all scores at once, as JAX differentiates it; topk's at the known indices."""
    if name == "topk":
        queries, docs, indices = arguments
        return jnp.einsum("qd,qkd->qk", queries, docs[indices], precision="highest")
    if name == "maxsim":
        query, docs, lengths = arguments
        scores = jnp.einsum("id,nld->nil", query, docs, precision="highest")
        scores = jnp.where(jnp.arange(40) < lengths[:, None, None], scores, -1e9)
        return jnp.where(lengths > 0, scores.max(axis=2).sum(axis=1), -jnp.inf)
    queries, points, quality, temperature = arguments
    logits = jnp.matmul(queries, points.T, precision="highest") / temperature
    return jnp.matmul(jax.nn.softmax(logits), quality, precision="highest")


@pytest.mark.usefixtures("small_tiles")
@EACH
def test_gradients_are_those_of_the_matrix_of_all_scores(name: str) -> None:
    operation, args = ARGUMENTS[name]
    learned = [np.float32(arg) for arg in args[: {"topk": 2, "maxsim": 2}.get(name, 4)]]
    first = operation(*args, prefer="numpy")
    weights = RNG.normal(size=np.shape(first[0] if name == "topk" else first)).astype(np.float32)

    def loss(values: Any) -> Any:
        found = operation(*values, *args[len(values) :])
        found = found[0] if name == "topk" else found
        return jnp.where(jnp.isfinite(found), found * weights, 0).sum()

    def plain(values: Any) -> Any:
        rest = (first[1],) if name == "topk" else args[len(values) :]
        found = dense(name, (*values, *rest))
        return jnp.where(jnp.isfinite(found), found * weights, 0).sum()

    both = jax.jit(lambda values: (jax.grad(loss)(values), jax.grad(plain)(values)))
    for ours, theirs in zip(*both(learned), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_maxsim_gives_the_gradient_to_the_first_of_equal_tokens_and_none_to_padding() -> None:
    docs = np.ones((2, 3, 2), np.float32)
    docs[0, 0], docs[1] = 0.5, np.nan
    grad = jax.grad(lambda query, docs: maxsim(query, docs, np.array([3, 0]))[0], argnums=(0, 1))
    grads = jax.jit(grad)(np.ones((1, 2), np.float32), docs)
    assert grads[0].tolist() == [[1, 1]]
    assert grads[1].tolist() == [[[0, 0], [1, 1], [0, 0]], [[0, 0]] * 3]


@pytest.mark.parametrize("name", ["topk", "local_quality"])
def test_second_derivatives_are_the_differences(name: str) -> None:
    operation, args = ARGUMENTS[name]
    given = [np.array(arg, float)[:6, :3] for arg in args[:2]]
    given += [np.array(OUTCOMES[:6], float), np.array(0.7)] * (name == "local_quality")
    rest = (3,) * (name == "topk")
    moves = [RNG.normal(size=each.shape) / 9 for each in given]

    def along(step: Any, by: str = "jax") -> Any:  # squares, as the sums themselves are bilinear
        values = [each + step * move for each, move in zip(given, moves, strict=True)]
        found = operation(*values, *rest, prefer=by)
        return ((found[0] if name == "topk" else found) ** 2).sum()

    less, same, more = (along(step, "numpy") for step in (-1e-4, 0, 1e-4))
    found = jax.jit(jax.grad(jax.grad(along)), compiler_options=QUICK)(0.0)
    np.testing.assert_allclose(found, (more - 2 * same + less) / 1e-8, rtol=1e-3)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.eval_shape(jax.hessian(along), 0.0)


def test_maxsim_keeps_nan_where_a_compiler_takes_product_and_maximum_in_one() -> None:
    docs = np.ones((20, 64, 1), np.float32)
    docs[3, 10] = np.nan
    scores = maxsim(np.ones((4, 1), np.float32), docs, prefer="jax")
    assert np.flatnonzero(np.isnan(scores)).tolist() == [3]


def test_a_new_temperature_compiles_nothing() -> None:
    for temperature in (0.5, np.float64(1.5), 2, jnp.float32(2.5)):
        local_quality(QUERIES[:2], POINTS[:3], OUTCOMES[:3], temperature, prefer="jax")
    before = kernels.compiled("local_quality", "jax")._cache_size()
    local_quality(QUERIES[:2], POINTS[:3], OUTCOMES[:3], 3.5, prefer="jax")
    assert kernels.compiled("local_quality", "jax")._cache_size() == before


SHAPES = {  # at least 4,096 x 1,000,000 x 384, so that no window is left over to compile
    "topk": ((4392, 384), (2**20, 384)),
    "local_quality": ((4590, 384), (2**20, 384), (2**20, 8), ()),
    "maxsim": ((1024, 128), (4096, 1024, 128), (4096,)),
}


@EACH
def test_memory_is_that_of_arguments_results_and_64_megabytes(name: str) -> None:
    specs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in SHAPES[name]]
    call, rest = kernels.compiled(name, "jax"), (100,) * (name == "topk")

    def total(*args: Any) -> Any:
        found = call(*args, *rest)
        return (found[0] if rest else found).sum()

    learned = (0, 1) if name == "topk" else tuple(range(len(specs) - (name == "maxsim")))
    both = jax.jit(jax.value_and_grad(total, argnums=learned))
    memory = both.lower(*specs).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 64e6
    assert memory.output_size_in_bytes > 1e9 or name == "maxsim"  # the gradients themselves


# ── 2. Pallas ───


def edge_cases(name: str) -> Any:
    """Arguments of one shape each: ties, NaN, infinities, and numbers that overflow."""
    _, args = ARGUMENTS[name]
    yield args
    data = [np.round(arg) for arg in args[:2]]
    docs = data[1].reshape(-1, 20)
    docs[3], docs[5, 2], docs[40:44] = np.nan, np.inf, 0
    docs[40:44, 0] = 3e38, -3e38, 3e38, np.inf  # alone: what a sum overflows to is its order's
    yield (*data, *args[2:])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@EACH
def test_kernels_find_what_numpy_finds(name: str) -> None:
    operation, _ = ARGUMENTS[name]
    for args in edge_cases(name):
        expected = operation(*args, prefer="numpy")
        found = operation(*args, prefer="pallas", fallback=False)
        if name == "topk":
            assert (found[1] == expected[1]).all()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@EACH
def test_kernels_lower_for_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _, args = ARGUMENTS[name]
    arrays = [jnp.asarray(arg) for arg in args[: 2 if name == "topk" else None]]
    rest = args[2:] if name == "topk" else ()
    fn = jax.jit(lambda *arrays: getattr(kernels, f"{name}_kernel")(*arrays, *rest)[0])
    try:
        lowered = fn.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        if "No supported GPU devices" not in str(error):
            raise
        pytest.skip("from JAX 0.12 on it lowers for a GPU only where there is one")
    assert "triton" in lowered


def test_a_kernel_that_cannot_keep_so_many_says_so() -> None:
    docs = np.ones((1026, 1), np.float32)
    with pytest.raises(ember.SetupError, match="at most 1,024 documents of a query, k is 1025"):
        topk(docs[:1], docs, 1025, prefer="pallas", fallback=False)
