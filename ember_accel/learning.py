"""Learning: the parts of a router that are found from data, by NumPy alone.

Each returns the same for the same arguments: what is drawn by chance is drawn from one seed.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any

# ── 1. Places ─── among clusters, and in domains


def shares(xp: Any, logits: Array) -> Array:
    """The softmax of each row."""
    powers = xp.exp(logits - logits.max(1, keepdims=True, initial=-math.inf))
    return powers / powers.sum(1, keepdims=True)


def centroids(rows: Array, count: int) -> Array:
    """Directions (d, count or fewer) that rows gather around: spherical k-means."""
    distinct = np.unique(rows, axis=0)  # equal rows would start, and then be, equal clusters
    count = max(1, min(count, len(distinct)))
    centres = _lengthened(distinct[np.random.default_rng(0).permutation(len(distinct))[:count]])
    for _ in range(12):
        nearest = np.eye(count, dtype=np.float32)[(rows @ centres.T).argmax(1)]
        sums = nearest.T @ rows
        if (empty := nearest.sum(0) == 0).any():  # they begin anew, where a row is far from all
            far = (distinct @ centres.T).max(1).argsort()
            sums[empty] = distinct[far[: empty.sum()]]
        centres = _lengthened(sums)
    return centres.T


def _lengthened(rows: Array) -> Array:
    """Rows at a length of 1; what has none stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def told_apart(rows: Array, domains: Sequence[Any], parts: int = 4) -> tuple[Array, Array]:
    """The classifier of domains (d + 1, k), and each row's domains as told without that row.

    Of more than 100 domains, the rarest count as one.
    """
    rows = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], 1)
    counts = Counter(domains).most_common()
    if len(counts) < 2:
        return np.zeros((rows.shape[1], 0), np.float32), np.zeros((len(rows), 0), np.float32)
    places = {label: min(at, 99) for at, (label, _) in enumerate(counts)}
    truth = np.eye(min(len(counts), 100), dtype=np.float32)[[places[label] for label in domains]]
    part, likely = np.random.default_rng(0).permutation(len(rows)) % parts, np.empty_like(truth)
    for held in range(parts):
        weights = _logistic(rows[part != held], truth[part != held])
        likely[part == held] = shares(np, rows[part == held] @ weights)
    return _logistic(rows, truth), likely


def _logistic(rows: Array, truth: Array, steps: int = 60) -> Array:
    """The weights (d, k) of a multinomial logistic regression, by Nesterov's accelerated steps."""
    n, decay = len(rows), 1 / len(rows)
    slope = 0.5 * np.linalg.norm(rows.T @ rows / n, 2) + decay
    weights = ahead = np.zeros((rows.shape[1], truth.shape[1]), np.float32)
    for step in range(steps):
        error = rows.T @ (shares(np, rows @ ahead) - truth) / n + decay * ahead
        before, weights = weights, ahead - error / slope
        ahead = weights + step / (step + 3) * (weights - before)
    return weights


# ── 2. Quality ─── weights, and calibration

Fit = tuple[Array, Array, Array, Array]


def logit(xp: Any, chance: Array) -> Array:
    """The log-odds of a chance, of one below 0.002 those of 0.002, and likewise above 0.998."""
    chance = xp.clip(chance, 0.002, 0.998)
    return xp.log(chance / (1 - chance))


def logistic(xp: Any, odds: Array) -> Array:
    """The chance of log-odds; tanh cannot overflow."""
    return 0.5 * xp.tanh(0.5 * odds) + 0.5


def ridge(features: Array, quality: Array, priors: Sequence[float]) -> Fit:
    """Weights (f, m), a bias (m,), and the slope and shift that calibrate them, (m,) each.

    From the outcomes that are known. Of the priors, that with the least error on rows held out.
    """
    found = tuple(np.zeros((*size, quality.shape[1])) for size in (features.shape[1:], (), (), ()))
    patterns, which = np.unique(np.isfinite(quality), axis=1, return_inverse=True)
    for at, known in enumerate(patterns.T):  # models known in the same rows share their sums
        models = np.flatnonzero(which.ravel() == at)
        fit = _ridge(features[known].astype(float), quality[known][:, models].astype(float), priors)
        for all_of_them, ours in zip(found, fit, strict=True):
            all_of_them[..., models] = ours
    return found[0], found[1], found[2], found[3]


def _ridge(rows: Array, truth: Array, priors: Sequence[float], parts: int = 5) -> Fit:
    """The same where all outcomes are known."""
    mean, base = rows.mean(0), truth.mean(0)
    rows, gaps = rows - mean, truth - base
    part = np.random.default_rng(0).permutation(len(rows)) % parts
    grams = [rows[part == one].T @ rows[part == one] for one in range(parts)]
    sums = [rows[part == one].T @ gaps[part == one] for one in range(parts)]
    gram, total, unit = sum(grams), sum(sums), np.eye(rows.shape[1])
    guesses = [np.empty_like(truth) for _ in priors]
    for one in range(parts):
        for prior, guess in zip(priors, guesses, strict=True):
            pull = prior * (1 - 1 / parts) * unit  # in proportion to the rows
            held = np.linalg.solve(gram - grams[one] + pull, total - sums[one])
            guess[part == one] = rows[part == one] @ held
    errors = [guess - gaps for guess in guesses]
    if truth.shape[1] > 1:  # it is the differences between models that are to be right
        errors = [error - error.mean(1, keepdims=True) for error in errors]
    best = int(np.argmin([(error**2).sum() for error in errors]))
    weights = np.linalg.solve(gram + priors[best] * unit, total)
    slope, shift = _platt(logit(np, guesses[best] + base), truth)
    return weights, base - mean @ weights, slope, shift


def _platt(odds: Array, truth: Array) -> tuple[Array, Array]:
    """The slope and the shift that make log-odds those of the truth, for each column.

    Platt (1999), by Newton's method; a prior as heavy as one outcome keeps both near 1 and 0. A
    slope below 0 is chance: guesses that are worth nothing get 0.
    """
    usual = np.stack([np.zeros(truth.shape[1]), np.ones(truth.shape[1])])
    found, inputs = usual.copy(), np.stack([np.ones_like(odds), odds])
    for _ in range(25):
        chance = logistic(np, (found[:, None] * inputs).sum(0))
        push = (inputs * (chance - truth)).sum(1) + found - usual
        bend = np.einsum("inm,jnm,nm->mij", inputs, inputs, chance * (1 - chance)) + np.eye(2)
        found = found - np.clip(np.linalg.solve(bend, push.T[..., None])[..., 0].T, -1, 1)
    return np.maximum(found[1], 0), found[0]
