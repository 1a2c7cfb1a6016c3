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
import inspect
import math
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np

import ember
from ember_accel.dispatch import measured, operation
from ember_accel.learning import centroids, logistic, logit, ridge, shares, told_apart
from ember_accel.places import DEVICE, place_of
from ember_accel.state import field, state, static_field

Array = Any  # of NumPy, or of JAX
PRIORS = (3.0, 10.0, 30.0, 100.0, 300.0)
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
    """A learned model of how good each model's answers will be; see `fit_router`.

    Learnable, each a float32 array: of d dimensions, c clusters, k domains, f features, m models.
    """

    weights: Array = field(repr=False)  # (f, m): of clusters, domains, style, style in a domain
    bias: Array = field(repr=False)  # (m,)
    slope: Array = field(repr=False)  # (m,): what makes probabilities of predictions
    shift: Array = field(repr=False)  # (m,)
    clusters: Array = field(repr=False)  # (d, c): a soft cluster's direction
    cluster_bias: Array = field(repr=False)  # (c,)
    domains: Array = field(repr=False)  # (d, k): a domain's classifier
    domain_bias: Array = field(repr=False)  # (k,)
    style_mean: Array = field(repr=False)  # (17,), or None: learned without prompts
    style_scale: Array = field(repr=False)  # (17,)
    style_usual: Array = field(repr=False)  # (170,): what counts as no style of its own
    cost: tuple[float, ...] = static_field()  # of a call to each model
    names: tuple[str, ...] = static_field(default=())  # of the models


@lru_cache
def _pairs(count: int) -> tuple[Array, Array]:
    """The places of any two marks, and of each with itself."""
    return np.triu_indices(count)


def _products(xp: Any, marks: Array) -> Array:
    """Marks, and half of the product of any two of them."""
    one, two = _pairs(marks.shape[1])
    return xp.concatenate([marks, marks[:, one] * marks[:, two] / 2], 1)


def _standard(xp: Any, marks: Array, mean: Array, scale: Array) -> Array:
    """Marks, each with a mean of 0 and a deviation of 1 where the router was learned."""
    return xp.clip((marks - mean) * scale, -3, 3)


def _features(
    xp: Any, clusters: Array, domains: Array, marks: Array | None, usual: Array | None
) -> Array:  # fmt: skip
    """The features of prompts (n, f), each block scaled by how far its weights may go."""
    blocks = [clusters, domains]
    if marks is not None:  # the blocks that a call without prompts can do without are the last
        within = 0.3 * domains[:, :, None] * marks[:, None, :]
        within = within.reshape(len(marks), domains.shape[1] * marks.shape[1])
        blocks += [0.1 * (_products(xp, marks) - usual), within]
    return xp.concatenate(blocks, 1)


def _quality(xp: Any, router: Router, rows: Array, marks: Array | None) -> Array:
    """The quality that is predicted for each row and model, in 0 to 1."""
    clusters = shares(xp, rows @ router.clusters + router.cluster_bias)
    domains = shares(xp, rows @ router.domains + router.domain_bias)
    if marks is not None:
        marks = _standard(xp, marks, router.style_mean, router.style_scale)
    features = _features(xp, clusters, domains, marks, router.style_usual)
    chance = features @ router.weights[: features.shape[1]] + router.bias
    return logistic(xp, router.slope * logit(xp, chance) + router.shift)


# ── 3. Learning ─── from a log of calls


def fit_router(
    embeddings: Array, quality: Array, cost: Array, *, prompts: Sequence[str] | None = None,
    domains: Sequence[Any] | None = None, names: Sequence[str] = (), clusters: int = 100,
    prior: float | None = None,
) -> Router:  # fmt: skip
    """A router, learned from n prompts and how good m models' answers to them were.

    embeddings (n, d). quality (n, m) in 0 to 1, and cost (n, m) or (m,) of calls, in any unit; NaN
    where nobody asked. prompts: their texts, worth giving. domains: a label for each, as a subject
    or a task, for learning to tell it; without, up to 20 groups of like prompts stand for them.
    names: of the models. prior: how many prompts a cluster or domain has before its own outcomes
    count for half; without, of 3 to 300 that which predicts rows held out best. The same arguments
    give the same router. ValueError for shapes that do not fit, and for wrong values.

    Weights are a ridge regression's; Platt's scaling of predictions for prompts held out makes
    them probabilities. Domains are told by a multinomial logistic regression, clusters by k-means.

    >>> kinds = np.repeat(np.eye(2), 20, 0)  # 20 prompts of each of either kind, and who is good
    >>> router = fit_router(kinds, kinds, [1.0, 2.0], prior=1.0)
    >>> route(router, np.eye(2), willingness=10.0)
    array([0, 1])
    """
    rows, quality, costs = _checked(embeddings, quality, cost, prompts, domains, names)
    if clusters < 1 or (prior is not None and not 0 < prior < math.inf):
        raise ValueError(f"fit_router: clusters={clusters} must be above 0, and prior={prior}, too")
    centre = rows.mean(0, dtype=float)
    scale = float(np.sqrt(((rows - centre) ** 2).sum(1).mean())) or 1.0
    near = ((rows - centre) / scale).astype(np.float32)
    cluster = 25 * centroids(near, min(clusters, len(rows) // 2))
    labels: Any = domains
    if domains is None:  # groups that are found are better than none
        labels = (near @ centroids(near, min(20, max(1, len(rows) // 25)))).argmax(1)
    domain, likely = told_apart(6 * near, [*labels])
    marks, styles = (None, (None, None, None)) if prompts is None else _styles(style(prompts))
    made = _features(np, shares(np, near @ cluster), likely, marks, styles[2])
    found = ridge(made, quality, [prior] if prior else PRIORS)

    def head(directions: Array, shift: Array) -> tuple[Array, Array]:
        directions = directions / scale
        return directions, shift - centre @ directions

    parts = head(cluster, np.zeros(cluster.shape[1])), head(6 * domain[:-1], domain[-1])
    return Router(
        *found, *parts[0], *parts[1], styles[0], styles[1], styles[2],
        tuple(costs.tolist()), tuple(map(str, names)),
    )  # fmt: skip


def _styles(marks: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """Marks in standard form, and what makes them so: means, scale, and means of products."""
    mean, deviation = marks.mean(0, dtype=float), marks.std(0, dtype=float)
    scale = 1 / np.where(deviation > 1e-3, deviation, 1.0)  # below that, all are alike
    marks = _standard(np, marks, mean, scale).astype(np.float32)
    return marks, (mean, scale, _products(np, marks).mean(0))


def _checked(
    embeddings: Array, quality: Array, cost: Array, prompts: Any, domains: Any, names: Any
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Rows, quality and mean costs, as arrays whose shapes fit."""
    rows, quality = np.asarray(embeddings, np.float32), np.asarray(quality, np.float32)
    cost, (n, m) = np.asarray(cost, float), (*quality.shape, 0, 0)[:2]
    if rows.ndim != 2 or quality.ndim != 2 or len(rows) != n or n < 2 or m < 1:
        shapes = f"embeddings {rows.shape} and quality {quality.shape}"
        raise ValueError(f"fit_router: {shapes} do not fit. Give (n, d) and (n, m), n of 2 or more")
    if cost.shape not in {(m,), (n, m)}:
        raise ValueError(f"fit_router: cost has the shape {cost.shape}. Give ({m},) or ({n}, {m})")
    for name, value in (("prompts", prompts), ("domains", domains)):
        if isinstance(value, str):
            raise TypeError(f"fit_router: {name}={value!r:.80} is a text. Give a list of {n}")
        if value is not None and len(value) != n:
            raise ValueError(f"fit_router: {name} are {len(value)} for {n} rows: give one for each")
    labels: list[Any] = [] if domains is None else [*domains]
    for at, label in enumerate(labels):
        if label is None or (isinstance(label, float) and math.isnan(label)):
            raise ValueError(f"fit_router: domains[{at}] is {label}. Give it a label")
    if isinstance(names, str) or (len(names) and not len({*names}) == len(names) == m):
        raise ValueError(f"fit_router: names={names!r:.80} must be {m} different names")
    known, paid = ~np.isnan(quality), ~np.isnan(cost)
    checks: list[tuple[str, Array]] = [
        ("embeddings", np.isfinite(rows)), ("cost", ~paid | (np.isfinite(cost) & (cost >= 0))),
        ("quality", ~known | ((quality >= 0) & (quality <= 1))),
    ]  # fmt: skip
    for name, right in checks:
        if not right.all():
            told = "Give finite numbers, costs of 0 or more, and a quality in 0 to 1 or NaN"
            where = int(right.reshape(len(right), -1).all(1).argmin())
            raise ValueError(f"fit_router: {name}[{where}] is wrong. {told}")
    if (few := (known.sum(0) < 2) | ~(paid if paid.ndim == 1 else paid.any(0))).any():
        told = f"of model {int(few.argmax())}, fewer than 2 outcomes are known, or no cost"
        raise ValueError(f"fit_router: {told}. Log more calls of it, or leave it out")
    return rows, quality, cost if cost.ndim == 1 else np.nanmean(cost, 0)


# ── 4. Use ─── predictions, choices, and the function that calls


def _known(router: Router, embeddings: Array, prompts: Any) -> Array | None:
    """The style of prompts, or None, after a look at the shapes."""
    width, shape = router.clusters.shape[0], np.shape(embeddings)
    if len(shape) != 2 or shape[1] != width:
        raise ValueError(f"embeddings have the shape {shape}, not (n, {width}): a row for a prompt")
    if prompts is None:
        return None
    if router.style_mean is None:
        raise ValueError("this router was learned without prompts. Leave them out, or fit it anew")
    marks = prompts if getattr(prompts, "ndim", 1) == 2 else style(prompts)
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
    return Router(one((100, 4)), one(4), one(4), one(4), *heads, None, None, None, cost=(1.0,) * 4)


def _numpy_quality(
    router: Router, embeddings: Array, prompts: Sequence[str] | Array | None = None
) -> Array:
    """The quality (n, m) that can be expected of each model's answers to n prompts, calibrated.

    embeddings (n, d). prompts: their texts, or `style(texts)`, for a router that was learned with
    them; without, all of them count as usual. Differentiable in JAX, in the router as well.

    >>> kinds = np.repeat(np.eye(2), 20, 0)  # 20 prompts of each of either kind, and who is good
    >>> router = fit_router(kinds, kinds, [1.0, 2.0], prior=1.0)
    >>> predict_quality(router, np.eye(2)).argmax(1)
    array([0, 1])
    """
    marks, rows = _known(router, embeddings, prompts), np.asarray(embeddings, np.float32)
    if not np.isfinite(rows).all():
        row = int(np.isfinite(rows).all(1).argmin())
        raise ValueError(f"embeddings[{row}] is not finite: nothing can be told from it")
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
    costs; `math.inf` looks at quality alone. Of equals, the cheapest. ValueError if not above 0.

    >>> kinds = np.repeat(np.eye(2), 20, 0)  # 20 prompts of each of either kind, and who is good
    >>> router = fit_router(kinds, kinds, [1.0, 2.0], prior=1.0)
    >>> route(router, np.eye(2), willingness=1e-3)
    array([0, 0])
    """
    return chosen(router, predict_quality(router, embeddings, prompts), willingness)


def chosen(router: Router, predicted: Array, willingness: float) -> Array:
    """The index of the best model for each row of predicted quality."""
    costs = np.array(router.cost)
    order = np.argsort(costs, kind="stable")  # argmax takes the first of equals
    value = predicted - priced(costs - costs.min(), willingness)
    at = value[:, order].argmax(1)
    return order[at] if isinstance(at, np.ndarray) else sys.modules["jax"].numpy.asarray(order)[at]


def priced(costs: Array, willingness: float) -> Array:
    """Costs in units of quality."""
    if not willingness > 0:
        raise ValueError(f"willingness={willingness!r} must be above 0: the worth of an answer")
    with np.errstate(over="ignore"):
        return np.minimum(costs / willingness, 1e30).astype(np.float32)


def expected_utility(
    router: Router, embeddings: Array, quality: Array, prompts: Sequence[str] | Array | None = None,
    *, willingness: float, temperature: float = 0.1,
) -> Array:  # fmt: skip
    """The mean over prompts of quality - cost / willingness, were models drawn by a softmax.

    The softmax is of the predicted utility / temperature. quality (n, m) is what came of calls; an
    outcome that is not known (NaN) counts as predicted, with no gradient. `jax.grad` by the router
    is how it learns to choose, and not only to predict.

    >>> kinds = np.repeat(np.eye(2), 20, 0)  # 20 prompts of each of either kind, and who is good
    >>> router = fit_router(kinds, kinds, [1.0, 2.0], prior=1.0)
    >>> utility = expected_utility(router, np.eye(2), np.eye(2), willingness=10.0)
    >>> round(float(utility), 2)
    0.85
    """
    predicted = predict_quality(router, embeddings, prompts)
    prices, xp, known = priced(np.array(router.cost), willingness), np, predicted
    if np.shape(quality) != predicted.shape:
        shapes = f"{np.shape(quality)}, not {predicted.shape}"
        raise ValueError(f"quality has the shape {shapes}: give a number for each row and model")
    if place_of((predicted, quality)) >= DEVICE:
        jax = importlib.import_module("jax")
        xp, known = jax.numpy, jax.lax.stop_gradient(predicted)
    likely, outcome = shares(xp, (predicted - prices) / temperature), xp.asarray(quality)
    worth = xp.where(xp.isnan(outcome), known, outcome) - prices
    return (likely * worth).sum(1).mean()


def routed(
    router: Router, models: Mapping[str, Callable[..., Awaitable[R]]],
    embed: Callable[[list[str]], Any], *, willingness: float = math.inf,
) -> Callable[..., Coroutine[Any, Any, R]]:  # fmt: skip
    """An async function that asks, for each prompt, the model that the router chooses.

    models: an async function by each name of the router's, or in its order, where it has none.
    embed: an async or plain function of a list of texts that returns their vectors, those the
    router was learned with, such as `models.embedding.embed`. It is used wherever a model is, with
    the arguments of the first; a list of messages is routed by their text. willingness: as for
    `route`; without it the best is asked at any price. Raises SetupError.

    >>> ask = routed(router, {"small": models.llama, "large": models.gpt4}, embed, willingness=0.01)
    """
    if not hasattr(models, "keys"):
        raise TypeError(f"routed: models={models!r:.80} must be {{name: async function}}")
    names = router.names or tuple(models)
    if {*names} != {*models} or len(names) != len(router.cost):
        told = f"{', '.join(models)}, and the router knows {len(router.cost)}"
        told += f": {', '.join(router.names)}" * bool(router.names)
        raise ember.SetupError(f"routed: the models are {told}. Give a function for each of those")
    priced(np.array(router.cost), willingness)
    functions = [models[name] for name in names]
    for fn in functions:
        ember._async_only(fn, "routed()")
    signature = inspect.signature(functions[0])
    if not callable(embed) or not signature.parameters:
        raise TypeError(f"routed: embed={embed!r:.80} must be a function, and models take a prompt")

    async def run(args: Any, kwargs: Any) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        first = args[0] if args else next(iter(bound.arguments.values()))
        parts = ember._messages(first, None)
        said = [ember._text(one.get("content")) for one in parts if one["role"] != "system"]
        texts = ["\n".join(said)]
        rows = np.asarray(await ember._awaited(embed(texts)), np.float32)
        if rows.ndim != 2 or len(rows) != 1:
            raise ValueError(f"routed: embed gave {rows.shape} for a list of one text, not (1, d)")
        marks = None if router.style_mean is None else texts
        [place] = route(router, rows, marks, willingness=willingness)
        return await functions[int(place)](*args, **kwargs)

    return ember._combined("routed", functions[0], run)
