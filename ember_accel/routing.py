"""Routing: which model to ask, learned from how good their answers to other prompts were.

    from ember_accel import fit_router, route, routed

    router = fit_router(embeddings, quality, cost, prompts=prompts)    # a log of calls
    route(router, embeddings, prompts, willingness=0.02)               # a model's index for each
    ask = routed(router, {"small": models.llama, "large": models.gpt4}, embed=embed)
    reply = await ask("What is the capital of France?")

A router is one logistic model of the quality of each model's answer. It sees a prompt's place
among soft clusters of the embeddings; its likely domains, where some were known; how the prompt is
written; and that again within each domain. It is found in closed form, by NumPy alone, and it is a
state: JAX differentiates all of it, to train it further, or with what stands around it.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import importlib
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np

import ember
from ember_accel.dispatch import measured, operation
from ember_accel.learning import centroids, ridge, shares, told_apart
from ember_accel.state import state, static_field

Array = Any  # of NumPy, or of JAX
R = TypeVar("R")

# ── 1. Style ─── how a prompt is written, in numbers


def style(prompts: Sequence[str]) -> Array:
    """How prompts are written, (n, 17) float32: their length and lines, words, signs and digits.

    >>> style(["What is 2 + 2?"]).shape
    (1, 17)
    """
    texts: list[Any] = [*prompts]
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"prompts={prompts!r:.80} is no list of texts. Give one text for each row")
    return np.array([_style(text) for text in texts], np.float32).reshape(-1, 17)


def _style(text: str) -> list[float]:
    """How one text is written."""
    words, size = text.split() or [""], max(len(text), 1)
    *others, _ = sorted(len(line) for line in text.split("\n") if line.strip()) or [0]
    digits, capitals, letters = (
        sum(map(kind, text)) for kind in (str.isdigit, str.isupper, str.isalpha)
    )
    groups = ("+-*/=^<>\\$|_", "()[]{}", ",;", ".", "\"'", "?")
    signs = [sum(map(text.count, group)) for group in groups]
    mean = sum(others) / max(len(others), 1)
    spread = sum((one - mean) ** 2 for one in others) / max(len(others), 1)
    return [
        math.log(size), math.log1p(len(others)), math.log1p(mean), math.log1p(math.sqrt(spread)),
        math.log1p(sum(map(len, words)) / len(words)), len({*map(str.lower, words)}) / len(words),
        math.log1p(max(map(len, words))), math.log1p(digits), math.sqrt(digits / size),
        math.sqrt(capitals / size), letters / size, *map(math.log1p, signs),
    ]  # fmt: skip


# ── 2. Router ─── the model, for NumPy and for JAX: xp is numpy, or jax.numpy


@state
class Router:
    """A learned model of what prompts are worth asking whom; see `fit_router`.

    Learnable, each a float32 array: of d dimensions, c clusters, k domains, f features, m models.
    """

    weights: Array  # (f, m): of clusters, then domains, style, and style within a domain
    bias: Array  # (m,)
    clusters: Array  # (d, c): a soft cluster's direction
    cluster_bias: Array  # (c,)
    domains: Array  # (d, k): a domain's classifier
    domain_bias: Array  # (k,)
    cost: tuple[float, ...] = static_field()  # of a call to each model
    names: tuple[str, ...] = static_field(default=())  # of the models
    usual: tuple[tuple[float, ...], ...] = static_field(default=())  # style: see `_usual`


def _usual(marks: Array) -> tuple[tuple[float, ...], ...]:
    """What is usual in the style of prompts: means, deviations, and means of products."""
    mean, deviation = marks.mean(0), marks.std(0)
    deviation = np.where(deviation > 1e-6, deviation, 1.0)
    products = _products(np, np.clip((marks - mean) / deviation, -3, 3)).mean(0)
    return tuple(tuple(map(float, one)) for one in (mean, deviation, products))


@lru_cache(64)
def _arrays(usual: tuple[tuple[float, ...], ...]) -> list[Array]:
    """The same as arrays."""
    return [np.array(one, np.float32) for one in usual]


@lru_cache
def _pairs(count: int) -> tuple[Array, Array]:
    """The places of any two marks, and of each with itself."""
    return np.triu_indices(count)


def _products(xp: Any, marks: Array) -> Array:
    """Marks, and half of the product of any two of them."""
    one, two = _pairs(marks.shape[1])
    return xp.concatenate([marks, marks[:, one] * marks[:, two] / 2], 1)


def _features(xp: Any, clusters: Array, domains: Array, marks: Any, usual: Any) -> Array:
    """The features of prompts (n, f), each block scaled by how far its weights may go."""
    blocks = [10 * clusters, 10 * domains]
    if marks is not None:  # the blocks that a call without prompts can do without are the last
        mean, deviation, products = _arrays(usual)
        marks = xp.clip((marks - mean) / deviation, -3, 3)
        within = 3 * domains[:, :, None] * marks[:, None, :]
        blocks += [_products(xp, marks) - products, within.reshape(len(marks), -1)]
    return xp.concatenate(blocks, 1)


def _quality(xp: Any, router: Router, rows: Array, marks: Array | None) -> Array:
    """The quality that is predicted for each row and model, in 0 to 1."""
    clusters = shares(xp, rows @ router.clusters + router.cluster_bias)
    domains = shares(xp, rows @ router.domains + router.domain_bias)
    features = _features(xp, clusters, domains, marks, router.usual)
    logits = features @ router.weights[: features.shape[1]] + router.bias
    return 0.5 * xp.tanh(0.5 * logits) + 0.5  # the logistic function: it cannot overflow


# ── 3. Learning ─── from a log of calls


def fit_router(
    embeddings: Array, quality: Array, cost: Array, *, prompts: Sequence[str] | None = None,
    domains: Sequence[Any] | None = None, names: Sequence[str] = (), clusters: int = 100,
    prior: float = 10_000.0,
) -> Router:  # fmt: skip
    """A router, learned from n prompts and how good m models' answers to them were.

    embeddings (n, d). quality (n, m) in 0 to 1; NaN where nobody asked. cost (n, m) or (m,), of
    calls, in any unit. prompts: their texts, worth giving. domains: a label for each, as a subject
    or a task, for learning to tell it. names: of the models. prior: the pull towards the mean, in
    prompts. The same arguments give the same router. ValueError for wrong shapes and values.

    Weights are a ridge regression's; Platt's scaling of predictions for prompts held out makes
    them probabilities. Domains are told by a multinomial logistic regression, clusters by k-means.

    >>> router = fit_router(np.eye(4), [[1, 0], [1, 0], [0, 1], [0, 1]], [1.0, 2.0], prior=0.1)
    >>> route(router, np.eye(4), willingness=10.0)
    array([0, 0, 1, 1])
    """
    rows, quality, costs = _checked(embeddings, quality, cost, prompts, domains, names)
    centre = rows.mean(0)
    scale = float(np.sqrt(((rows - centre) ** 2).sum(1).mean())) or 1.0
    near = (rows - centre) / scale
    marks, usual = (None, ()) if prompts is None else ((m := style(prompts)), _usual(m))
    cluster = 25 * centroids(near, min(clusters, max(1, len(rows) // 10)))
    domain, likely = told_apart(6 * near, domains)
    made = _features(np, shares(np, near @ cluster), likely, marks, usual)
    weights, bias = ridge(made, quality, prior)

    def head(directions: Array, shift: Array) -> tuple[Array, Array]:
        directions = directions / scale
        return directions, shift - centre @ directions

    heads = *head(cluster, np.zeros(cluster.shape[1])), *head(6 * domain[:-1], domain[-1])
    return Router(weights, bias, *heads, tuple(map(float, costs)), tuple(names), usual)


def _checked(
    embeddings: Array, quality: Array, cost: Array, prompts: Any, domains: Any, names: Any
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Rows, quality and mean costs, as float32 arrays whose shapes fit."""
    rows, quality = np.asarray(embeddings, np.float32), np.asarray(quality, np.float32)
    cost = np.asarray(cost, np.float64)
    n, m = (*quality.shape, 0, 0)[:2]
    if rows.ndim != 2 or quality.ndim != 2 or len(rows) != n or n < 2 or m < 1:
        shapes = f"embeddings {rows.shape} and quality {quality.shape}"
        raise ValueError(f"fit_router: {shapes} do not fit. Give (n, d) and (n, m), n of 2 or more")
    for name, value, sizes in (
        ("cost", cost, [(m,), (n, m)]), ("prompts", prompts, [n]), ("domains", domains, [n]),
        ("names", names or range(m), [m]),
    ):  # fmt: skip
        size = cost.shape if name == "cost" else n if value is None else len(value)
        if size not in sizes:
            raise ValueError(f"fit_router: {name} has the size {size}, not {sizes[-1]}")
    costs = cost if cost.ndim == 1 else np.nanmean(cost, 0)
    known = np.isfinite(quality)
    for name, wrong in (
        ("embeddings", ~np.isfinite(rows).all(1)), ("cost", ~(costs >= 0)),
        ("quality", ((quality < 0) | (quality > 1)).any(1) | np.isinf(quality).any(1)),
    ):  # fmt: skip
        if wrong.any():
            told = "Give finite numbers, costs of 0 or more, and a quality in 0 to 1 or NaN"
            raise ValueError(f"fit_router: {name}[{int(wrong.argmax())}] is wrong. {told}")
    if (lost := np.flatnonzero(known.sum(0) < 2)).size:
        raise ValueError(f"fit_router: the model {lost[0]} has fewer than 2 known outcomes")
    return rows, quality, costs


# ── 4. Use ─── predictions, choices, and the function that calls


def _known(router: Router, embeddings: Array, prompts: Any) -> Array | None:
    """The style of prompts, or None, after a look at the shapes."""
    width, shape = router.clusters.shape[0], np.shape(embeddings)
    if len(shape) != 2 or shape[1] != width:
        raise ValueError(f"embeddings have the shape {shape}, not (n, {width}): a row for a prompt")
    if prompts is None:
        return None
    if not router.usual:
        raise ValueError("this router was learned without prompts. Leave them out, or fit it anew")
    marks = prompts if hasattr(prompts, "shape") else style(prompts)
    if marks.shape != (shape[0], 17):
        raise ValueError(f"{len(marks)} prompts for {shape[0]} embeddings: give one for each")
    return marks


def _size(router: Router, embeddings: Array, _: Any = None) -> tuple[int, int, int]:
    """What the time of a prediction depends on."""
    return (len(embeddings), *router.weights.shape)


def _example() -> Router:
    """A router of a usual size, to measure."""
    one = np.ones
    heads = one((384, 100)), one(100), one((384, 0)), one(0)
    return Router(one((100, 4)), one(4), *heads, cost=(1.0,) * 4)


def _numpy_quality(
    router: Router, embeddings: Array, prompts: Sequence[str] | Array | None = None
) -> Array:
    """The quality (n, m) that can be expected of each model's answers to n prompts, calibrated.

    embeddings (n, d). prompts: their texts, or `style(texts)`, for a router that was learned with
    them; without, all of them count as usual. Differentiable in JAX, in the router as well.

    >>> router = fit_router(np.eye(4), [[1, 0], [1, 0], [0, 1], [0, 1]], [1.0, 2.0], prior=0.1)
    >>> predict_quality(router, np.eye(4)).argmax(1)
    array([0, 0, 1, 1])
    """
    marks, rows = _known(router, embeddings, prompts), np.asarray(embeddings, np.float32)
    parts = [slice(at, at + 4096) for at in range(0, max(1, len(rows)), 4096)]
    return np.concatenate([
        _quality(np, router, rows[part], None if marks is None else marks[part]) for part in parts
    ])  # fmt: skip


@lru_cache(1)
def _compiled() -> Any:
    """The same, as compiled by JAX, in parts that never hold the features of all prompts."""
    jax = importlib.import_module("jax")

    def quality(router: Router, rows: Array, marks: Array | None) -> Array:
        whole = partial(_quality, jax.numpy, router)
        if len(rows) <= 4096:
            return whole(rows, marks)

        def one(row: tuple[Array, Array]) -> Array:
            return whole(row[0][None], None if marks is None else row[1][None])[0]

        return jax.lax.map(jax.checkpoint(one), (rows, marks), batch_size=4096)

    return jax.jit(jax.default_matmul_precision("highest")(quality))


def _jax_quality(router: Router, embeddings: Array, prompts: Any = None) -> Array:
    """The same by JAX."""
    marks = _known(router, embeddings, prompts)
    rows = importlib.import_module("jax.numpy").asarray(embeddings, np.float32)
    return _compiled()(router, rows, marks)


predict_quality = operation(
    "predict_quality", {"numpy": _numpy_quality, "jax": _jax_quality},
    choose=measured("predict_quality", _size), recovers=(RuntimeError, MemoryError),
    cases=lambda: ((_example(), np.ones((n, 384), np.float32)) for n in (1, 32, 1024, 8192)),
)  # fmt: skip


def route(
    router: Router, embeddings: Array, prompts: Sequence[str] | Array | None = None, *,
    willingness: float,
) -> Array:  # fmt: skip
    """The index (n,) of the model to ask for each of n prompts: quality - cost / willingness.

    willingness: what an answer that is right, not wrong, is worth, in the unit of the router's
    costs; `math.inf` looks at quality alone. Of equals, the first. ValueError if it is not above 0.

    >>> router = fit_router(np.eye(4), [[1, 0], [1, 0], [0, 1], [0, 1]], [1.0, 2.0], prior=0.1)
    >>> route(router, np.eye(4), willingness=1e-3)
    array([0, 0, 0, 0])
    """
    value = predict_quality(router, embeddings, prompts) - _prices(router, willingness)
    return value.argmax(1)


def _prices(router: Router, willingness: float) -> Array:
    """The costs of a call to each model, in units of quality."""
    if not willingness > 0:
        raise ValueError(f"willingness={willingness!r} must be above 0: the worth of an answer")
    return (np.array(router.cost) / willingness).astype(np.float32)


def expected_utility(
    router: Router, embeddings: Array, quality: Array, prompts: Sequence[str] | Array | None = None,
    *, willingness: float, temperature: float = 0.1,
) -> Array:  # fmt: skip
    """The mean over prompts of quality - cost / willingness, were models drawn by a softmax.

    The softmax is of the predicted utility / temperature. quality (n, m) is what came of calls; an
    outcome that is not known (NaN) counts as predicted, with no gradient. `jax.grad` by the router
    is how it learns to choose, and not only to predict.

    >>> router = fit_router(np.eye(4), [[1, 0], [1, 0], [0, 1], [0, 1]], [1.0, 2.0], prior=0.1)
    >>> utility = expected_utility(router, np.eye(4), np.ones((4, 2)), willingness=10.0)
    >>> 0.8 < utility < 0.9
    True
    """
    predicted, prices = predict_quality(router, embeddings, prompts), _prices(router, willingness)
    xp, known = np, predicted
    if not isinstance(predicted, np.ndarray):
        jax = importlib.import_module("jax")
        xp, known = jax.numpy, jax.lax.stop_gradient(predicted)
    chosen = shares(xp, (predicted - prices) / temperature)
    worth = xp.where(xp.isnan(quality), known, quality) - prices
    return (chosen * worth).sum(1).mean()


def routed(
    router: Router, models: Mapping[str, Callable[..., Awaitable[R]]],
    embed: Callable[[list[str]], Any], *, willingness: float = math.inf,
) -> Callable[..., Coroutine[Any, Any, R]]:  # fmt: skip
    """An async function that asks, for each prompt, the model that the router chooses.

    models: an async function by each name of the router's, or in its order, where it has none.
    embed: an async or plain function of a list of texts that returns their vectors, those the
    router was learned with, such as `models.embedding.embed`. It is used wherever a model is, with
    the arguments of the first; a list of messages is routed by their text. Raises SetupError.

    >>> ask = routed(router, {"small": models.llama, "large": models.gpt4}, embed, willingness=0.01)
    """
    names = router.names or tuple(models)
    if {*names} != {*models} or len(names) != len(router.cost):
        told = f"{', '.join(models)}, and the router knows {', '.join(names)}"
        raise ember.SetupError(f"routed: {len(models)} models for {len(router.cost)}: {told}")
    _prices(router, willingness)
    functions = [models[name] for name in names]
    for fn in functions:
        ember._async_only(fn, "routed()")

    async def run(args: Any, kwargs: Any) -> R:
        prompt = args[0] if args else next(iter(kwargs.values()))
        parts = [one for one in ember._messages(prompt, None) if one["role"] != "system"]
        text = "\n".join(ember._text(one.get("content")) for one in parts)
        rows = np.asarray(await ember._awaited(embed([text])), np.float32)
        place = route(router, rows, [text] if router.usual else None, willingness=willingness)
        return await functions[int(place[0])](*args, **kwargs)

    return ember._combined("routed", functions[0], run)
