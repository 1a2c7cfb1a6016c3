"""Retrieval: exact search, late interaction, and nearest neighbours that can be trained.

    from ember_accel import local_quality, maxsim, topk

    scores, indices = topk(queries, docs, 10)                   # each query's ten best documents
    scores = maxsim(query_tokens, docs_tokens)                  # ColBERT's score of each document
    quality = local_quality(queries, points, outcomes, 0.05)    # what near points came to

Each walks over tiles of documents and keeps a small state, never the matrix of all scores: beside
arguments and results it takes less than 64 MB, in NumPy, in JAX, and for JAX's gradients. (Not so
with bfloat16: XLA's CPU turns all of it into float32 first, and gradients are summed in float32.)
Sums are float32, or float64 where an argument is. JAX compiles once for each set of shapes.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ember_accel.dispatch import Operation, measured, operation

Array = Any
Arrays = tuple[Any, ...]
SCORES, VALUES = 2**20, 2**21  # in a tile, of float32: 4 MB, and 8 MB of documents or queries

# ── 1. Tiles ─── one walk for NumPy and for JAX: xp is numpy, or jax.numpy


def tile(rows: int, columns: int, width: int, extra: int = 0) -> tuple[int, int]:
    """How many of the rows and columns of scores make a tile, each row with some extra values.

    Columns come in sixteens; of many rows in windows as equal as can be, as `dots` pads the last.
    """
    most = max(16, VALUES // max(width, 1))
    count = max(1, -(-columns // min(most, max(2048, SCORES // max(rows, 1)))))
    size = max(16, (columns if rows == 1 else columns + 16 * count - 1) // (16 * count) * 16)
    return max(1, min(rows, most, SCORES // (size + extra))), size


def window(xp: Any, array: Array, start: Any, length: int) -> Array:
    """Rows of an array."""
    if xp is np:
        return array[start : start + length]
    return sys.modules["jax"].lax.dynamic_slice_in_dim(array, start, length)


def walk(xp: Any, total: int, size: int, step: Callable[..., Arrays], carry: Arrays) -> Arrays:
    """What is left of a carry after `step(carry, start, length)` for windows that cover a total."""
    whole, rest = divmod(total, size)
    if xp is np:
        for index in range(whole):
            carry = step(carry, index * size, size)
    elif whole:
        loop = sys.modules["jax"].lax.fori_loop
        carry = loop(0, whole, lambda index, kept: step(kept, index * size, size), carry)
    return step(carry, whole * size, rest) if rest else carry


def rows_of(xp: Any, total: int, size: int, block: Callable[..., Arrays]) -> Arrays:
    """The arrays of `block(start, length)` for windows that cover a total, one below the other."""
    whole, rest = divmod(total, size)
    blocks = [block(index * size, size) for index in range(whole if xp is np else 0)]
    if whole and not blocks:
        stacks = sys.modules["jax"].lax.map(lambda i: block(i * size, size), xp.arange(whole))
        blocks = [tuple(each.reshape(whole * size, *each.shape[2:]) for each in stacks)]
    blocks += [block(whole * size, rest)] if rest or not whole else []
    return tuple(xp.concatenate(parts) for parts in zip(*blocks, strict=True))


def kind_of(xp: Any, *arrays: Array) -> Any:
    """The dtype of sums: float32, or the wider one that the arrays ask for."""
    return functools.reduce(xp.promote_types, (array.dtype for array in arrays), np.dtype("f4"))


def product(xp: Any, left: Array, right: Array) -> Array:
    """The matrix product, at full precision also where a GPU would round factors to TF32."""
    kind, factor = kind_of(xp, left, right), xp.promote_types(left.dtype, right.dtype)
    # in JAX bfloat16 stays what it is, for the matrix units
    factor = factor if xp is not np and xp.issubdtype(factor, xp.floating) else kind
    options = {} if xp is np else {"precision": "highest", "preferred_element_type": kind}
    return xp.matmul(left.astype(factor, copy=False), right.astype(factor, copy=False), **options)


def dots(xp: Any, left: Array, right: Array, size: int = 16) -> Array:
    """Inner products (rows of left, rows of right).

    Right is padded to a size, or one row's to sixteens: matrix libraries sum in another order where
    the shape is another, and the columns left over too, but equal documents need equal scores.
    """
    length, size = len(right), size if len(left) > 1 else 16
    right = xp.pad(right, ((0, -length % size), (0, 0))) if length % size else right
    return product(xp, left, right.T)[:, :length]


def _matrices(xp: Any, name: str, *arrays: Array) -> list[Array]:
    """Arrays that are matrices, the first two of one width."""
    found = [_numbers(xp, name, array) for array in arrays]
    shapes = [array.shape for array in found]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        rule = "takes matrices, the first two of one width; of a row x make x[None]"
        raise ValueError(f"{name} {rule}. It was given the shapes {shapes}")
    return found


def _numbers(xp: Any, name: str, values: Any) -> Array:
    """Values as an array of real numbers."""
    found = values if hasattr(values, "dtype") else xp.asarray(values)
    if found.dtype.kind in "OSUTcMm":
        raise TypeError(f"{name} takes real numbers, got {values!r:.80}")
    return xp.asarray(found)


def _known(value: Any) -> bool:
    """Whether a value is there already, and not only when a compiled function runs."""
    core = getattr(sys.modules.get("jax"), "core", None)  # without, JAX is still being imported
    return not isinstance(value, getattr(core, "Tracer", ()))


def _in_jax(name: str, implementation: str, check: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of JAX, or of Pallas."""
    from ember_accel.kernels import compiled

    return compiled(name, implementation)(*check(sys.modules["jax"].numpy, *args, **kwargs))


def _size(numbers: int, values: Arrays) -> tuple[int, ...]:
    """What decides about the time: the sizes of all matrices, of a list by its first."""
    shapes = [(len(x), *np.shape(x[0])) if isinstance(x, list) else np.shape(x) for x in values]
    sizes = tuple(n for shape in shapes if len(shape) > 1 for n in shape)
    return sizes if len(sizes) == numbers else ()  # of wrong arguments


def _random(*shapes: tuple[int, ...]) -> Arrays:
    """Arrays to measure with."""
    return tuple(np.random.default_rng(0).normal(size=shape).astype("f4") for shape in shapes)


def _retrieval(check: Any, numbers: int, case: Any) -> Callable[..., Operation[Any]]:
    """A decorator that makes an operation of NumPy's function: beside it, JAX's and Pallas's."""

    def size(*args: Any, **kwargs: Any) -> tuple[int, ...]:
        return _size(numbers, (*args, *kwargs.values()))

    def decorate(fn: Callable[..., Any]) -> Operation[Any]:
        functions: dict[str, Any] = {"numpy": np.errstate(all="ignore")(fn)}
        for other in ("jax", "pallas"):
            functions[other] = functools.partial(_in_jax, fn.__name__, other, check)
        return operation(
            fn.__name__, functions, choose=measured(fn.__name__, size),
            recovers=(RuntimeError, MemoryError),
            cases=lambda: (case(q, n) for q in (1, 8, 32, 128, 1024) for n in (100, 1000, 10_000)),
        )

    return decorate


# ── 2. Top k ─── by integers that are ordered as scores are, with NaN last


def _topk_arguments(xp: Any, queries: Array, docs: Array, k: int) -> Arrays:
    """The arguments, checked."""
    queries, docs = _matrices(xp, "topk", queries, docs)
    if not hasattr(k, "__index__") or not 0 <= operator.index(k) <= len(docs):
        raise ValueError(f"topk: k={k!r:.20} must be an integer from 0 to {len(docs)}, all docs")
    return queries, docs, operator.index(k)


@_retrieval(_topk_arguments, 4, lambda q, n: (*_random((q, 384), (n, 384)), 10))
def topk(queries: Array, docs: Array, k: int) -> tuple[Array, Array]:
    """The scores and indices, each (q, k), of the documents with the largest inner products.

    queries (q, d), docs (n, d). Exact, as a stable sort of all scores: equal scores come by lower
    index, and NaN comes last. k from 0 to n; any other is a ValueError. JAX needs to know k when
    it compiles, takes scores below 1.2e-38 for 0, and lets gradients flow to the scores.

    >>> scores, indices = topk([[1.0, 0.0]], [[0.5, 9.0], [2.0, 0.0], [0.5, 0.0]], 2)
    >>> indices.tolist()
    [[1, 0]]
    """
    return topk_tiles(np, *_topk_arguments(np, queries, docs, k))[0]


def topk_tiles(xp: Any, queries: Array, docs: Array, k: int) -> tuple[Arrays, Any]:
    """Scores and indices; a query's state is its best keys so far, and where they were."""
    kind = kind_of(xp, queries, docs)
    rows, columns = tile(len(queries), len(docs), queries.shape[1], k)

    def block(start: Any, length: int) -> Arrays:
        some = window(xp, queries, start, length)

        def step(best: Any, first: Any, width: int) -> Any:
            keys = keys_of(xp, dots(xp, some, window(xp, docs, first, width), columns))
            keys, places = largest(xp, xp.concatenate([best[0], keys], axis=1), k)
            before = xp.take_along_axis(best[1], xp.minimum(places, k - 1), axis=1)
            return keys, xp.where(places < k, before, places + (first - k)).astype(before.dtype)

        # the keys of no document, below that of NaN
        best = (keys_of(xp, xp.full((length, k), np.nan, kind)) - 1, xp.zeros((length, k), int))
        keys, indices = walk(xp, len(docs), columns, step, best) if k else best
        return scores_of(xp, keys, kind), indices

    return rows_of(xp, len(queries), rows, block), ()


def keys_of(xp: Any, scores: Array) -> Array:
    """Integers ordered as the scores: -0.0 is 0.0, NaN is below all others, above the lowest."""
    whole = np.dtype(f"i{scores.dtype.itemsize}")
    bits = xp.where(scores == 0, scores.dtype.type(0), scores).view(whole)
    keys = bits ^ ((bits >> (8 * whole.itemsize - 1)) & np.iinfo(whole).max)  # if negative
    return xp.where(xp.isnan(scores), np.iinfo(whole).min + 1, keys)


def scores_of(xp: Any, keys: Array, kind: Any) -> Array:
    """The scores of keys."""
    return xp.where(keys < 0, keys ^ np.iinfo(keys.dtype).max, keys).view(kind)


def largest(xp: Any, keys: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row, and their places; equal ones by lower place."""
    if xp is np:
        floor = np.partition(keys, -k, axis=1)[:, -k, None]
        chosen = keys >= floor
        for row in np.flatnonzero(np.count_nonzero(chosen, axis=1) > k):  # ties: the first of them
            chosen[row, np.flatnonzero(keys[row] == floor[row])[k - chosen[row].sum() :]] = False
        places = np.nonzero(chosen)[1].reshape(-1, k)
        order = np.argsort(~np.take_along_axis(keys, places, axis=1), axis=1, kind="stable")
        places = np.take_along_axis(places, order, axis=1)
    else:
        lax, floats = sys.modules["jax"].lax, keys.dtype == np.int32
        places = lax.platform_dependent(  # XLA's CPU sorts integers; floats it selects, by their
            keys,  # bits, so that NaN has its place: 50 times faster
            cpu=lambda x: lax.top_k(scores_of(xp, x, np.float32) if floats else x, k)[1],
            default=lambda x: lax.top_k(x, k)[1],
        )
    return xp.take_along_axis(keys, places, axis=1), places


# ── 3. Late interaction ─── the sum, over a query's tokens, of the best of a document's


def _maxsim_arguments(xp: Any, query: Array, docs: Any, lengths: Any = None) -> Arrays:
    """The arguments, checked; documents padded, with the lengths of all."""
    query = _numbers(xp, "maxsim", query)
    if lengths is None and query.ndim == 2 and isinstance(docs, list | tuple):
        docs, lengths = _padded(xp, docs, query.shape[1])
    docs = _numbers(xp, "maxsim", docs)
    if query.ndim != 2 or not len(query) or docs.ndim != 3 or docs.shape[2] != query.shape[1]:
        rule = "maxsim takes (tokens, d), and a list of (tokens, d), or padded (docs, tokens, d)"
        raise ValueError(f"{rule}. It was given the shapes {query.shape} and {docs.shape}")
    lengths = np.full(len(docs), docs.shape[1]) if lengths is None else lengths
    if _known(lengths):
        lengths, whole = np.asarray(lengths), np.asarray(lengths, int)
        wrong = (lengths != whole) | (whole < 0) | (whole > docs.shape[1])
        if lengths.shape != docs.shape[:1] or wrong.any():
            rule = f"maxsim: lengths must be {len(docs)} numbers from 0 to {docs.shape[1]}"
            raise ValueError(f"{rule}, one for each of the docs, got {lengths.tolist()!r:.80}")
    return query, docs, xp.asarray(lengths, int)


def _padded(xp: Any, docs: Any, width: int) -> Arrays:
    """Documents as one array, zeros behind them, and lengths; by sixteens: few shapes compile."""
    docs = [doc if hasattr(doc, "shape") else np.asarray(doc, float) for doc in docs]
    for at, doc in enumerate(docs):
        if doc.shape[:1] != (0,) and (doc.ndim != 2 or doc.shape[1] != width):
            raise ValueError(f"maxsim: docs[{at}] has the shape {doc.shape}, not (tokens, {width})")
    docs = [doc if len(doc) else np.zeros((0, width), np.float32) for doc in docs]
    lengths = np.array([len(doc) for doc in docs], int)
    longest = -(-lengths.max(initial=1) // 16) * 16
    xp = np if all(isinstance(doc, np.ndarray) for doc in docs) else xp
    padded = [xp.pad(doc, ((0, longest - len(doc)), (0, 0))) for doc in docs]
    return xp.stack(padded) if padded else xp.zeros((0, longest, width), np.float32), lengths


@_retrieval(_maxsim_arguments, 5, lambda q, n: _random((q, 128), (n // 50, 64, 128)))
def maxsim(query: Array, docs: Any, lengths: Array | None = None) -> Array:
    """The scores (n,) of documents: for each token of the query the best inner product, summed.

    query (Lq, d); docs a list of (Ld, d), which is padded first, or padded (n, Ld, d) with lengths
    (n,), whose padding may hold anything. A document without tokens has -inf, one with NaN has NaN.
    In JAX gradients flow to the first of equally good tokens.
    Source: Khattab and Zaharia, ColBERT, 2020, equation 3.

    >>> maxsim([[1.0, 0.0], [0.0, 1.0]], [[[1.0, 0.0], [0.0, 3.0]], [[2.0, 2.0]]]).tolist()
    [4.0, 4.0]
    """
    return maxsim_tiles(np, *_maxsim_arguments(np, query, docs, lengths))[0]


def maxsim_tiles(xp: Any, query: Array, docs: Array, lengths: Array) -> tuple[Array, Any]:
    """The scores; a document's state is the best product of each of the query's tokens."""

    def block(start: Any, length: int) -> Arrays:
        return (best_tokens(xp, query, docs, lengths, start, length)[0].sum(axis=0),)

    return rows_of(xp, len(docs), maxsim_tile(query, docs)[0], block)[0], ()


def maxsim_tile(query: Array, docs: Array) -> tuple[int, int]:
    """How many documents, and how many tokens of each, make a tile."""
    values = max(query.shape)
    tokens = max(1, min(docs.shape[1], SCORES // values))
    return max(1, min(len(docs), SCORES // (values * tokens))), tokens


def best_tokens(xp: Any, query: Array, docs: Array, lengths: Array, at: Any, size: int) -> Arrays:
    """The best products (tokens of the query, documents), and the tokens that have them."""
    counts, rows = window(xp, lengths, at, size)[:, None], docs.reshape(-1, docs.shape[2])

    def step(best: Any, first: Any, length: int) -> Any:
        tokens = window(xp, rows, at * docs.shape[1] + first, size * length)  # all, or of one alone
        products = dots(xp, query, tokens).reshape(len(query), size, length)
        products = xp.where(first + xp.arange(length) < counts, products, -np.inf)
        top, places = products.max(axis=2), products.argmax(axis=2) + first
        if xp is not np:  # XLA's CPU loses NaN where it takes product and maximum in one
            top = xp.where(xp.isnan(products).any(axis=2), np.nan, top)
        better = (top > best[0]) | (xp.isnan(top) & ~xp.isnan(best[0]))
        return xp.where(better, top, best[0]), xp.where(better, places, best[1])

    none = xp.full((len(query), size), -np.inf, kind_of(xp, query, docs))
    none = (none, xp.zeros(none.shape, int))
    return walk(xp, docs.shape[1], maxsim_tile(query, docs)[1], step, none)


# ── 4. Nearest neighbours ─── a mean of what is known, weighted by closeness


def _local_arguments(xp: Any, queries: Any, points: Any, quality: Any, temperature: Any) -> Arrays:
    """The arguments, checked."""
    queries, points, quality = _matrices(xp, "local_quality", queries, points, quality)
    if not 0 < len(points) == len(quality):
        rule = "local_quality takes a point at least, and a row of quality for each"
        raise ValueError(f"{rule}. It was given {len(points)} points and {len(quality)} rows")
    given = hasattr(temperature, "__float__") and not np.ndim(temperature)
    if not given or (_known(temperature) and not 2**-126 <= float(temperature) < 2**128):
        rule = "must be a finite number above 0"
        raise ValueError(f"local_quality: temperature={temperature!r:.40} {rule}")
    return queries, points, quality, xp.asarray(temperature, kind_of(xp, queries, points, quality))


@_retrieval(_local_arguments, 6, lambda q, n: (*_random((q, 384), (n, 384), (n, 8)), 0.1))
def local_quality(queries: Array, points: Array, quality: Array, temperature: Any) -> Array:
    """The quality (q, m) expected of queries: a mean over all points, the near ones weighing more.

    softmax(queries @ points.T / temperature) @ quality, of queries (q, d), points (n, d), quality
    (n, m). Finite products of any size are stable; NaN and infinity go on to what they touch: a NaN
    in a column of quality makes that column NaN. In JAX differentiable by all four arguments.
    Source: Nadaraya and Watson, 1964, with the weights of attention.

    >>> local_quality([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[1.0], [0.0]], 1.0).round(3).tolist()
    [[0.731]]
    """
    return local_quality_tiles(np, *_local_arguments(np, queries, points, quality, temperature))[0]


def local_quality_tiles(xp: Any, queries: Any, points: Any, quality: Any, temperature: Any) -> Any:
    """The quality; a query's state is its largest product, and sums of weights and of quality."""
    kind = temperature.dtype
    rows, columns = tile(len(queries), len(points), queries.shape[1], quality.shape[1])

    def block(start: Any, length: int) -> Arrays:
        some = window(xp, queries, start, length)

        def step(state: Any, first: Any, width: int) -> Any:
            near, known = (window(xp, each, first, width) for each in (points, quality))
            return weigh(xp, state, dots(xp, some, near), known.astype(kind), temperature)

        none = xp.zeros((length, 1), kind), xp.zeros((length, quality.shape[1]), kind)
        top, mass, total = walk(xp, len(points), columns, step, (none[0] - np.inf, *none))
        return total / mass, top, mass

    value, *state = rows_of(xp, len(queries), rows, block)
    return value, state


def weigh(xp: Any, state: Any, products: Array, quality: Array, temperature: Array) -> Any:
    """The state with more points: what was summed shrinks where a larger product comes."""
    top = xp.maximum(state[0], products.max(axis=1, keepdims=True))
    safe = xp.where(top == -np.inf, xp.zeros_like(top), top)
    shrink, weights = (xp.exp((each - safe) / temperature) for each in (state[0], products))
    mass = state[1] * shrink + weights.sum(axis=1, keepdims=True)
    return top, mass, state[2] * shrink + product(xp, weights, quality)
