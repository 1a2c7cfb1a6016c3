"""Learning: the parts of a router that are found from data, by NumPy alone.

Each returns the same for the same arguments: what is drawn by chance is drawn from one seed.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import math
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
    """Directions (d, count) that rows gather around: spherical k-means."""
    start = np.random.default_rng(0).choice(len(rows), count, replace=False)
    centres = rows[start] / np.maximum(np.linalg.norm(rows[start], axis=1, keepdims=True), 1e-9)
    for _ in range(12):
        likeness = rows @ centres.T
        nearest = np.eye(count, dtype=np.float32)[likeness.argmax(1)]
        sums = nearest.T @ rows
        if (empty := nearest.sum(0) == 0).any():  # they begin anew, where a row is far from all
            sums[empty] = rows[likeness.max(1).argsort()[: empty.sum()]]
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 1e-9, sums / np.maximum(norms, 1e-9), centres)
    return centres.T


def told_apart(rows: Array, domains: Sequence[Any] | None, parts: int = 4) -> tuple[Array, Array]:
    """The classifier of domains (d + 1, k), and each row's domains as told without that row."""
    rows = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], 1)
    given: Any = () if domains is None else domains
    labels: list[Any] = given.tolist() if hasattr(given, "tolist") else [*given]
    found = {label: at for at, label in enumerate(dict.fromkeys(labels))}
    if len(found) < 2:
        return np.zeros((rows.shape[1], 0), np.float32), np.zeros((len(rows), 0), np.float32)
    places = np.array([found[label] for label in labels])
    truth = np.eye(len(found), dtype=np.float32)[places]
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


def ridge(features: Array, quality: Array, prior: float, parts: int = 5) -> tuple[Array, Array]:
    """Weights (f, m) and a bias (m,) of logits of the quality, from the outcomes that are known."""
    weights, bias = np.zeros((features.shape[1], quality.shape[1])), np.zeros(quality.shape[1])
    patterns, which = np.unique(np.isfinite(quality), axis=1, return_inverse=True)
    for at, known in enumerate(patterns.T):  # models known in the same rows share their sums
        models = np.flatnonzero(which.ravel() == at)
        rows, truth = features[known].astype(np.float64), quality[known][:, models].astype(float)
        mean, base = rows.mean(0), truth.mean(0)
        rows, gaps = rows - mean, truth - base
        part = np.random.default_rng(0).permutation(len(rows)) % parts
        grams = [rows[part == one].T @ rows[part == one] for one in range(parts)]
        sums = [rows[part == one].T @ gaps[part == one] for one in range(parts)]
        pull = prior * np.eye(rows.shape[1])
        guess = np.empty_like(truth)
        for one in range(parts):
            rest = [other for other in range(parts) if other != one]
            held = np.linalg.solve(sum(grams[i] for i in rest) + pull, sum(sums[i] for i in rest))
            guess[part == one] = rows[part == one] @ held
        found = np.linalg.solve(sum(grams) + pull, sum(sums))
        slope, shift = _platt(guess, truth)
        weights[:, models] = found * slope
        bias[models] = shift - mean @ weights[:, models]
    return weights, bias


def _platt(guess: Array, truth: Array) -> tuple[Array, Array]:
    """The slope and the shift by which guesses become logits of the truth, for each column.

    Platt (1999), by Newton's method; a prior as heavy as one outcome keeps both finite. A slope
    below 0 is chance: guesses that are worth nothing get 0.
    """
    base = np.clip(truth.mean(0), 0.5 / len(truth), 1 - 0.5 / len(truth))
    spread = guess.std(0)
    unit = 1 / np.where(spread > 0, spread, 1.0)
    usual = np.stack([np.log(base / (1 - base)), np.zeros_like(base)])
    found, inputs = usual.copy(), np.stack([np.ones_like(guess), guess * unit])
    for _ in range(25):
        chance = 0.5 * np.tanh(0.5 * (found[:, None] * inputs).sum(0)) + 0.5
        push = (inputs * (chance - truth)).sum(1) + found - usual
        bend = np.einsum("inm,jnm,nm->mij", inputs, inputs, chance * (1 - chance)) + np.eye(2)
        found = found - np.clip(np.linalg.solve(bend, push.T[..., None])[..., 0].T, -1, 1)
    return np.maximum(found[1], 0) * unit, found[0]
