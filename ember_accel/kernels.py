"""Kernels: what JAX compiles for retrieval, its gradients, and one family of Pallas kernels.

Each kernel streams tiles of documents past a tile of queries, multiplies them on the chip, and
folds the products into a small state: the best so far, the k best so far, or sums of weights. The
documents are split among programs, as one query must fill a GPU too; XLA merges their states.

On a CPU they run in Pallas's interpreter, which shows that they are right, and is slow. For a GPU
they are written for Triton, to which they lower; they have not been run or measured on one yet
(`python tests/bench/bench_kernels.py` does both). Gradients have no kernels: theirs are sums over
queries and over documents at once, which programs side by side would have to share. XLA adds them
up tile by tile, as fast as its products are, from the kernels' states. Second derivatives keep all
tiles, and are those of jax.grad twice: jax.jvp, and so jax.hessian, is an error.
"""

# JAX's own types are partly unknown.
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ember_accel import retrieval as tiles
from ember_accel.retrieval import dots, keys_of, product, scores_of, walk, window

Array = Any
Arrays = tuple[Any, ...]

# ── 1. Compiled functions ─── once each, with gradients that compute the scores anew


@functools.cache
def compiled(name: str, implementation: str) -> Any:
    """A compiled function with its gradient.

    Forward gives the result, and what else the gradient needs. The gradient takes the arguments
    that are arrays, the result, that rest, and the cotangents of both: a gradient's own gradient
    comes to the arguments through the result and the rest, too.
    """
    walked = functools.partial(getattr(tiles, f"{name}_tiles"), jnp)
    kernel = walked if implementation == "jax" else globals()[f"{name}_kernel"]
    backward, static = globals()[f"{name}_gradient"], (2,) if name == "topk" else ()

    def forward(*args: Any) -> Any:
        return (walked if 0 in np.concatenate([*map(np.shape, args)]) else kernel)(*args)

    def saved(*args: Any) -> Any:
        found = call(*args)  # not forward: it is differentiated, too
        return found, (args[: 2 if static else None], *found)

    call: Any = jax.custom_vjp(forward, nondiff_argnums=static)
    call.defvjp(saved, lambda *args: backward(*args[-2], *args[-1]))
    return jax.jit(lambda *args: call(*args)[0], static_argnums=static)


def topk_gradient(arguments: Any, result: Any, _: Any, cotangent: Any, __: Any) -> Arrays:
    """The gradients for queries and docs: a document has those of the queries that found it."""
    queries, docs = arguments

    def step(grads: Any, start: Any, length: int) -> Any:
        each = (queries, cotangent[0], result[1])
        some, weight, found = (window(jnp, array, start, length) for array in each)
        near = jnp.einsum("qk,qkd->qd", weight, docs[found], precision="highest")
        far = grads[1].at[found].add(weight[:, :, None] * some[:, None, :])
        return _added(grads[0], near, start), far

    size = max(1, tiles.SCORES // max(1, result[1].shape[1] * queries.shape[1]))
    return _summed(len(queries), size, step, arguments)


def maxsim_gradient(arguments: Any, _: Any, __: Any, cotangent: Array, ___: Any) -> Arrays:
    """The gradients for query and docs: a token has those of the tokens that it is best for."""
    query, docs, lengths = arguments

    def step(grads: Any, start: Any, length: int) -> Any:
        _, places = tiles.best_tokens(jnp, query, docs, lengths, start, length)
        rows = start + jnp.arange(length)
        filled = (window(jnp, lengths, start, length) > 0)[:, None]
        weight = jnp.where(filled, window(jnp, cotangent, start, length)[:, None], 0)
        found = jnp.where(filled, docs[rows, places], 0)
        near = jnp.einsum("nx,ind->id", weight, found, precision="highest")
        return grads[0] + near, grads[1].at[rows, places].add(weight * query[:, None, :])

    size = tiles.maxsim_tile(query, docs)[0]
    return (*_summed(len(docs), size, step, (query, docs)), None)


def local_quality_gradient(
    arguments: Any, value: Array, state: Any, cotangent: Array, more: Any
) -> Arrays:
    """The gradients for all arguments: those of `part`, summed over tiles.

    The largest product, which result and sums are relative to, counts as a constant: all is right
    whatever it is.
    """
    queries, points, quality, temperature = arguments
    share = cotangent / state[1]
    fixed = (state[0], share, (share * value).sum(axis=1, keepdims=True) - more[1])

    def part(some: Array, near: Array, known: Array, rate: Array, fixed: Any) -> Array:
        top, share, mean = fixed
        gaps = jnp.maximum(dots(jnp, some, near) - top, -1e4 * temperature)  # exp(-1e4) is 0
        return (jnp.exp(gaps * rate) * (product(jnp, share, known.T) - mean)).sum()

    def row(grads: Any, start: Any, length: int) -> Any:
        some, *rest = (window(jnp, each, start, length) for each in (queries, *fixed))

        def step(grads: Any, first: Any, width: int) -> Any:
            near, known = (window(jnp, each, first, width) for each in (points, quality))
            parts = jax.grad(part, (0, 1, 2, 3))(some, near, known, 1 / temperature, rest)
            return tuple(map(_added, grads, parts, (start, first, first, None)))

        return walk(jnp, len(points), columns, step, grads)

    rows, columns = tiles.tile(len(queries), len(points), queries.shape[1], quality.shape[1])
    *grads, rate = _summed(len(queries), rows, row, arguments)
    return (*grads, -rate / temperature / temperature)


def _added(array: Array, part: Array, start: Any) -> Array:
    """An array with a part added to it, or to its rows from a start on."""
    if start is None:
        return array + part
    rows = window(jnp, array, start, len(part)) + part
    return lax.dynamic_update_slice_in_dim(array, rows, start, 0)


def _summed(total: int, size: int, step: Any, arrays: Any) -> Arrays:
    """Gradients that a step adds to, in the types of the arrays that they are for."""
    zeros = tuple(jnp.zeros(each.shape, tiles.kind_of(jnp, each)) for each in arrays)
    grads = walk(jnp, total, size, step, zeros)
    return tuple(grad.astype(each.dtype) for grad, each in zip(grads, arrays, strict=True))


# ── 2. The stream ─── tiles of documents past a tile of queries

ROWS, COLUMNS, WIDTH = 64, 64, 64  # of a tile of queries and documents, and of a product's step
PROGRAMS = 512  # a few for each multiprocessor of a GPU


def load(array: Any, places: Any, inside: Array) -> Array:
    """Rows and columns of what is in a GPU's memory, with 0 where they are not inside."""
    return plgpu.load(array.at[places], mask=inside, other=0)


def stream(queries: Array, docs: Array, spans: Any, before: Any, fold: Any, *more: Array) -> Any:
    """The state of each query after each span of documents: arrays (spans, queries, width).

    before() is the state before any document, matrices of ROWS rows, and fold(state, products,
    first document, which are real, references to more) the state with those of a tile.
    """
    # Triton's offsets are 32 bits wide
    if docs.size >= 2**31 or jnp.result_type(float) != np.float32 or not hasattr(plgpu, "load"):
        need = "pallas.triton.load, fewer than 2**31 numbers in docs, and no jax_enable_x64"
        raise NotImplementedError(f"the kernels need {need}")
    (rows, width), empty = queries.shape, jax.eval_shape(before)
    tall = pl.cdiv(rows, ROWS)

    def program(starts: Any, lengths: Any, left: Any, right: Any, *rest: Any) -> None:
        top, span = pl.program_id(0) * ROWS, pl.program_id(1)
        start, length = starts[span], lengths[span]
        asked = (top + jnp.arange(ROWS) < rows)[:, None]

        def step(index: Any, state: Any) -> Any:
            first, real = start + index * COLUMNS, index * COLUMNS + jnp.arange(COLUMNS) < length

            def part(index: Any, total: Array) -> Array:
                inside = (index * WIDTH + jnp.arange(WIDTH) < width)[None, :]
                across = pl.ds(index * WIDTH, WIDTH)
                some = load(left, (pl.ds(top, ROWS), across), asked & inside)
                near = load(right, (pl.ds(first, COLUMNS), across), real[:, None] & inside)
                return total + dots(jnp, some, near)

            products = jnp.zeros((ROWS, COLUMNS), jnp.float32)
            products = lax.fori_loop(0, pl.cdiv(width, WIDTH), part, products)
            return fold(state, products, first, real, rest[: len(more)])

        state = lax.fori_loop(0, pl.cdiv(length, COLUMNS), step, before())
        for out, value in zip(rest[len(more) :], state, strict=True):
            out[...] = value

    results = pl.pallas_call(
        program,
        grid=(tall, len(spans[0])),
        out_shape=[e.update(shape=(len(spans[0]), tall * ROWS, e.shape[1])) for e in empty],
        out_specs=[pl.BlockSpec((None, *e.shape), lambda i, j: (j, i, 0)) for e in empty],
        interpret=jax.default_backend() == "cpu",
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    )(*spans, queries, docs, *more)
    return [each[:, :rows] for each in results]


def spans(rows: int, docs: int) -> tuple[Array, Array]:
    """Starts and lengths of parts of the documents, so many that a GPU has enough to do."""
    parts = max(1, min(pl.cdiv(docs, COLUMNS), PROGRAMS // pl.cdiv(rows, ROWS)))
    size = pl.cdiv(docs, parts * COLUMNS) * COLUMNS
    starts = jnp.arange(parts, dtype=jnp.int32) * size
    return starts, jnp.clip(docs - starts, 0, size)


# ── 3. Reducers ─── the k best; the best; sums of weights


def topk_kernel(queries: Array, docs: Array, k: int) -> tuple[Arrays, Any]:
    """Scores and indices.

    A row's k best lie in no order. While the best product of a tile beats the worst of them, it
    takes its place; of several worst ones, that of the last document.
    """
    least, most = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    if k > 1024:
        raise NotImplementedError(f"the kernel keeps at most 1,024 documents of a query, k is {k}")
    wide = pl.next_power_of_2(max(k, 16))

    def before() -> Any:
        slots = jnp.broadcast_to(jnp.arange(wide), (ROWS, wide))
        return jnp.where(slots < k, least, most), jnp.full((ROWS, wide), -1, jnp.int32)

    def fold(state: Any, products: Array, first: Any, real: Array, _: Any) -> Any:
        def beats(carry: Any) -> Array:
            return jnp.max((carry[0].max(axis=1) > carry[1].min(axis=1)).astype(jnp.int32)) > 0

        def swap(carry: Any) -> Any:
            keys, best, where = carry
            top, worst = keys.max(axis=1)[:, None], best.min(axis=1)[:, None]
            at = jnp.argmax(keys, axis=1).astype(jnp.int32)[:, None]
            last = jnp.argmax(jnp.where(best == worst, where, -2), axis=1)[:, None]
            put = (top > worst) & (jnp.arange(wide)[None, :] == last)
            keys = jnp.where((top > worst) & (jnp.arange(COLUMNS)[None, :] == at), least, keys)
            return keys, jnp.where(put, top, best), jnp.where(put, first + at, where)

        keys = jnp.where(real[None, :], keys_of(jnp, products), least)
        return lax.while_loop(beats, swap, (keys, *state))[1:]

    best = stream(queries, docs, spans(len(queries), len(docs)), before, fold)
    shape = len(queries), len(best[0]) * k
    keys, where = (each[..., :k].swapaxes(0, 1).reshape(shape) for each in best)
    keys, where = lax.sort((~keys, where), num_keys=2)  # by key, the largest first, then by index
    return (scores_of(jnp, ~keys[:, :k], np.float32), where[:, :k]), ()


def maxsim_kernel(query: Array, docs: Array, lengths: Array) -> tuple[Array, Any]:
    """The scores: for each row of the query the best, or NaN."""

    def before() -> Any:
        return (jnp.full((ROWS, 1), -np.inf, jnp.float32),)

    def fold(state: Any, products: Array, _: Any, real: Array, __: Any) -> Any:
        broken = real[None, :] & jnp.isnan(products)  # Triton's max passes over NaN
        top = jnp.where(real[None, :], products, -np.inf).max(axis=1)[:, None]
        nan = jnp.isnan(state[0]) | (broken.astype(jnp.int32).max(axis=1) > 0)[:, None]
        return (jnp.where(nan, np.nan, jnp.maximum(state[0], top)),)

    starts = jnp.arange(len(docs), dtype=jnp.int32) * docs.shape[1]
    rows = docs.reshape(-1, docs.shape[2])
    return stream(query, rows, (starts, lengths), before, fold)[0].sum(axis=(1, 2)), ()


def local_quality_kernel(queries: Array, points: Array, quality: Array, temperature: Any) -> Any:
    """The quality, and what its gradient needs."""
    columns, wide = quality.shape[1], pl.next_power_of_2(max(quality.shape[1], 16))

    def before() -> Any:
        zeros = jnp.zeros((ROWS, 1), jnp.float32)
        return zeros - np.inf, zeros, jnp.zeros((ROWS, wide), jnp.float32)

    def fold(state: Any, products: Array, first: Any, real: Array, more: Any) -> Any:
        inside = real[:, None] & (jnp.arange(wide) < columns)[None, :]
        across = pl.ds(0 * first, wide)  # of a start that is known JAX checks the end, mask or not
        known = load(more[0], (pl.ds(first, COLUMNS), across), inside)
        products = jnp.where(real[None, :], products, -np.inf)
        return tiles.weigh(jnp, state, products, known.astype(jnp.float32), more[1][0])

    parts, more = spans(len(queries), len(points)), (quality, temperature[None])
    top, mass, total = stream(queries, points, parts, before, fold, *more)
    best = top.max(axis=0)
    shrink = jnp.exp((top - jnp.where(best == -np.inf, 0, best)) / temperature)
    mass, total = (mass * shrink).sum(axis=0), (total * shrink).sum(axis=0)
    return total[:, :columns] / mass, [best, mass]
