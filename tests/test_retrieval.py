"""ember_accel/retrieval.py: what is found, by NumPy and by JAX, against float64 on one sheet."""

import json
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ember_accel import retrieval
from ember_accel.retrieval import local_quality, maxsim, topk

INF, NAN = np.inf, np.nan
HUGE = np.float32(3e38)
BOTH = pytest.mark.parametrize("by", ["numpy", "jax"])
ALL = pytest.mark.parametrize("by", ["numpy", "jax", None])


def call(operation: Any, by: str | None, *args: Any) -> Any:
    if by == "jax":
        pytest.importorskip("jax")
    return operation(*args, prefer=by, fallback=False)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that tiny inputs have several, with windows left over; a hasty compiler."""
    monkeypatch.setattr(retrieval, "SCORES", 96)
    monkeypatch.setattr(retrieval, "VALUES", 256)
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    if jax:
        jax.config.update("jax_disable_most_optimizations", False)


def sorted_scores(queries: Any, docs: Any, k: int) -> tuple[Any, Any]:
    """A stable sort of all scores in float64, NaN last."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = np.einsum("qd,nd->qn", np.asarray(queries, float), np.asarray(docs, float))
        scores = scores.astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def softmax_mean(queries: Any, points: Any, quality: Any, temperature: float) -> Any:
    """The same as local_quality, in float64, at once."""
    logits = np.asarray(queries, float) @ np.asarray(points, float).T / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ np.asarray(quality, float)


def late(query: Any, docs: Any) -> Any:
    """The same as maxsim, in float64, one document after another."""
    each = [(np.asarray(query, float) @ np.asarray(doc, float).T) for doc in docs]
    return np.array([scores.max(axis=1).sum() if scores.size else -INF for scores in each])


# ── 2. Top k ───

SPECIAL = [NAN, -INF, INF, 0.0, -0.0, HUGE, -HUGE, 1.0, 1.0, -1.0, NAN, -INF]
RNG = np.random.default_rng(7)
DOCS = {  # 40 of two numbers each: one shape, one program
    "random": RNG.normal(size=(40, 2)),
    "tied": RNG.integers(-1, 2, size=(40, 2)),
    "all equal": np.ones((40, 2)),
    "descending": -np.arange(80.0).reshape(40, 2),
    "ascending": np.arange(80.0).reshape(40, 2),
    "NaN": np.full((40, 2), NAN),
    "special": np.stack([np.resize(SPECIAL, 40), np.zeros(40)], axis=1),
    "special, shuffled": np.stack([RNG.permutation(np.resize(SPECIAL, 40)), np.zeros(40)], axis=1),
}
QUERIES = np.array([[1, 0], [-1, 0], [0.5, -2], [0, 0], [3, 1], [1, 1], [2, -1]], np.float32)


@BOTH
@pytest.mark.parametrize("name", DOCS)
def test_topk_is_a_stable_sort_of_all_scores(by: str, name: str) -> None:
    docs = DOCS[name].astype(np.float32)
    scores, indices = call(topk, by, QUERIES, docs, 17)
    expected, order = sorted_scores(QUERIES, docs, 17)
    assert indices.tolist() == order.tolist()
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert isinstance(scores, np.ndarray) and scores.dtype == np.float32


@BOTH
def test_topk_finds_equal_documents_by_lower_index(by: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(retrieval, "VALUES", 2**12)
    monkeypatch.setattr(retrieval, "SCORES", 2**12)
    kinds = RNG.integers(0, 6, size=67)  # of random vectors: no sum may depend on the place
    docs = RNG.normal(size=(6, 64)).astype(np.float32)[kinds]
    _, indices = call(topk, by, RNG.normal(size=(40, 64)).astype(np.float32), docs, 67)
    for row in indices:
        for kind in range(6):
            assert (np.diff(row[kinds[row] == kind]) > 0).all()


def test_topk_in_numpy_takes_every_k_dtype_and_shape() -> None:
    for trial in range(60):
        q, n, d = (int(size) for size in RNG.integers(0, 40, size=3))
        docs = RNG.integers(-2, 3, size=(n, d)).astype(["f2", "f4", "f8", "i4"][trial % 4])
        queries = RNG.integers(-2, 3, size=(q, d)).astype("f4")
        k = int(RNG.integers(0, n + 1))
        scores, indices = topk(queries, docs, k, prefer="numpy")
        expected, order = sorted_scores(queries, docs, k)
        assert scores.shape == indices.shape == (q, k)
        assert indices.tolist() == order.tolist()
        assert (scores == expected).all()
        assert scores.dtype == (np.float64 if trial % 4 > 1 else np.float32)


@BOTH
@pytest.mark.parametrize(("q", "n", "k"), [(0, 3, 2), (2, 3, 0), (2, 0, 0)])
def test_topk_of_nothing_is_empty(by: str, q: int, n: int, k: int) -> None:
    scores, indices = call(topk, by, np.ones((q, 2), "f4"), np.ones((n, 2), "f4"), k)
    assert scores.shape == indices.shape == (q, k)


def test_topk_takes_its_arguments_by_name() -> None:
    assert topk([[1.0]], docs=[[1.0], [2.0]], k=1)[1].tolist() == [[1]]


@ALL
@pytest.mark.parametrize(
    ("args", "error", "said"),
    [
        (([[1.0]], [[1.0]], 2), ValueError, "k=2 must be an integer from 0 to 1, all docs"),
        (([[1.0]], [[1.0]], -1), ValueError, "k=-1"),
        (([[1.0]], [[1.0]], 1.0), ValueError, "k=1.0 must be an integer"),
        (([1.0], [[1.0]], 1), ValueError, r"make x\[None\].*\(1,\)"),
        (([[[1.0]]], [[1.0]], 1), ValueError, r"make x\[None\].*\(1, 1, 1\)"),
        (([[1.0]], [[1.0, 2.0]], 1), ValueError, "of one width"),
        ((np.array([["a"]]), [[1.0]], 1), TypeError, "topk takes real numbers, got .*'a'"),
        ((np.array([[1j]]), [[1.0]], 1), TypeError, "topk takes real numbers"),
    ],
)
def test_topk_says_what_is_wrong(by: str | None, args: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        call(topk, by, *args)


# ── 3. Late interaction ───

QUERY = RNG.normal(size=(5, 8)).astype(np.float32)
RAGGED = [RNG.normal(size=(length, 8)).astype(np.float32) for length in (3, 0, 16, 1, 11, 7)]


def padded(fill: float) -> tuple[Any, Any]:
    docs = np.full((len(RAGGED), 16, 8), fill, np.float32)
    for row, doc in zip(docs, RAGGED, strict=True):
        row[: len(doc)] = doc
    return docs, np.array([len(doc) for doc in RAGGED])


@BOTH
@pytest.mark.parametrize("fill", [0.0, NAN, INF, HUGE])
def test_maxsim_of_padded_documents_is_that_of_the_list(by: str, fill: float) -> None:
    expected = late(QUERY, RAGGED)
    np.testing.assert_allclose(call(maxsim, by, QUERY, *padded(fill)), expected, rtol=1e-5)
    np.testing.assert_allclose(call(maxsim, by, QUERY, RAGGED), expected, rtol=1e-5)
    assert expected[1] == -INF


@BOTH
def test_maxsim_passes_on_nan_of_tokens_and_takes_huge_ones(by: str) -> None:
    docs, lengths = padded(0.0)
    docs[0, 1, 0], docs[3, 0], docs[5, 4] = NAN, -HUGE, INF
    scores = call(maxsim, by, np.abs(QUERY), docs, lengths)
    assert np.isnan(scores[0]) and scores[3] == -INF and scores[5] == INF
    np.testing.assert_allclose(scores[[2, 4]], late(np.abs(QUERY), RAGGED)[[2, 4]], rtol=1e-5)


@BOTH
def test_maxsim_of_no_documents_is_empty(by: str) -> None:
    assert call(maxsim, by, QUERY, []).shape == (0,)
    assert call(maxsim, by, QUERY, np.ones((0, 4, 8), "f4")).shape == (0,)
    assert call(maxsim, by, QUERY, [[], np.ones((0, 8))]).tolist() == [-INF, -INF]


@ALL
@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((np.ones(3), [np.ones((2, 3))]), "takes .tokens, d."),
        ((1.0, [np.ones((2, 3))]), "takes .tokens, d."),
        ((np.ones(3), np.ones((5, 2, 3))), "takes .tokens, d."),
        ((np.ones((0, 3)), [np.ones((2, 3))]), "takes .tokens, d."),
        ((np.ones((1, 3)), np.ones((1, 2, 4))), r"\(1, 3\) and \(1, 2, 4\)"),
        ((np.ones((1, 3)), [np.ones((2, 3)), np.ones((2, 4))]), r"docs\[1\] has .* \(2, 4\)"),
        ((np.ones((1, 3)), [np.ones(3)]), r"docs\[0\] has the shape \(3,\), not \(tokens, 3\)"),
        ((np.ones((1, 3)), [1.0]), r"docs\[0\] has the shape \(\)"),
        ((np.ones((1, 3)), np.ones((2, 4, 3)), [4, 5]), r"2 numbers from 0 to 4.*\[4, 5\]"),
        ((np.ones((1, 3)), np.ones((2, 4, 3)), [4, -1]), "from 0 to 4"),
        ((np.ones((1, 3)), np.ones((2, 4, 3)), [4, 0.5]), "from 0 to 4"),
        ((np.ones((1, 3)), np.ones((2, 4, 3)), [4]), "one for each"),
    ],
)
def test_maxsim_says_what_is_wrong(by: str | None, args: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(maxsim, by, *args)


# ── 4. Nearest neighbours ───

POINTS, OUTCOMES = (RNG.normal(size=(40, width)).astype(np.float32) for width in (2, 3))


@BOTH
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e18])
def test_local_quality_is_a_softmax_mean_at_any_scale(by: str, scale: float) -> None:
    points = (POINTS * scale).astype(np.float32)
    found = call(local_quality, by, QUERIES, points, OUTCOMES, 0.3)
    np.testing.assert_allclose(
        found, softmax_mean(QUERIES, points, OUTCOMES, 0.3), atol=2e-4 if scale > 1 else 2e-6
    )


@BOTH
def test_local_quality_passes_on_nan_to_what_it_touches(by: str) -> None:
    outcomes, queries, points = OUTCOMES.copy(), QUERIES.copy(), POINTS.copy()
    outcomes[39, 1], queries[2, 0], points[:20] = NAN, NAN, [-INF, 0]
    found = call(local_quality, by, queries, points, outcomes, 0.3)
    assert np.isnan(found[:, 1]).all() and np.isnan(found[2]).all()
    expected = softmax_mean(QUERIES[:1], POINTS[20:], OUTCOMES[20:], 0.3)  # -inf weighs nothing
    np.testing.assert_allclose(found[:1, [0, 2]], expected[:, [0, 2]], rtol=1e-5)


@ALL
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (([[1.0]], np.ones((0, 1)), np.ones((0, 2)), 1.0), "0 points"),
        (([[1.0]], [[1.0]], np.ones((2, 2)), 1.0), "1 points and 2 rows"),
        (([[1.0]], [[1.0]], [[1.0]], 0.0), "temperature=0.0 must be a finite number above 0"),
        (([[1.0]], [[1.0]], [[1.0]], -1), "must be a finite number above 0"),
        (([[1.0]], [[1.0]], [[1.0]], NAN), "temperature=nan"),
        (([[1.0]], [[1.0]], [[1.0]], INF), "temperature=inf"),
        (([[1.0]], [[1.0]], [[1.0]], 1e39), "temperature=1e.39"),
        (([[1.0]], [[1.0]], [[1.0]], "a"), "temperature='a' must be a finite number"),
        (([[1.0]], [[1.0]], [[1.0]], np.ones(1)), "must be a finite number above 0"),
        (([[1.0]], [[1.0]], [1.0], 1.0), r"make x\[None\]"),
        (([1.0], [[1.0]], [[1.0]], 1.0), r"make x\[None\]"),
    ],
)
def test_local_quality_says_what_is_wrong(by: str | None, args: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(local_quality, by, *args)


# ── 5. Memory, and no JAX ───


def test_numpy_takes_a_tile_of_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "SCORES", 2**16)
    queries, docs = (RNG.normal(size=(rows, 2)).astype(np.float32) for rows in (500, 4096))
    tracemalloc.start()
    topk(queries, docs, 3, prefer="numpy")  # of 8 MB of scores
    local_quality(queries, docs, docs, 1.0, prefer="numpy")
    maxsim(queries, docs.reshape(64, 64, 2), prefer="numpy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6


def test_one_query_is_answered_without_importing_jax() -> None:
    program = (
        "import sys, json; from ember_accel.retrieval import local_quality, maxsim, topk;"
        "rows = [[1.0, 0.0], [0.0, 1.0]];"
        "a = topk(rows, rows, 1)[1].tolist(), maxsim(rows, [rows]).tolist();"
        "b = local_quality(rows, rows, rows, 1e-3).tolist();"
        "print(json.dumps([*a, b, 'jax' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert json.loads(done.stdout or "null") == [
        [[0], [1]], [2.0], [[1.0, 0.0], [0.0, 1.0]], False,
    ], done.stderr
