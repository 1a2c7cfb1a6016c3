"""Curves: what a router's choices would have cost, and how good they would have been.

    from ember_accel import cost_quality_curve

    curve = cost_quality_curve(router, embeddings, quality, prompts=prompts)
    print(curve)                                   # a table
    Path("curve.svg").write_text(curve.svg())      # a picture, for any browser

Give prompts that the router did not learn from: of its own, it knows the outcomes.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ember_accel.routing import Router, chosen, predict_quality

Array = Any


@dataclass(frozen=True, eq=False)
class Curve:
    """Mean cost and mean quality of a router's choices, by willingness, and of each model alone."""

    willingness: Array  # (w,)
    cost: Array  # (w,)
    quality: Array  # (w,)
    alone: dict[str, tuple[float, float]]  # model → its mean cost and quality

    def __str__(self) -> str:
        lines = [f"{'willingness':>12} {'cost':>12} {'quality':>8}"]
        rows = [*zip(self.willingness, self.cost, self.quality, strict=True)]
        lines += ["{:>12.4g} {:>12.4g} {:>8.3f}".format(*row) for row in rows]
        lines += [f"{name:>12.12} {a:>12.4g} {b:>8.3f}" for name, (a, b) in self.alone.items()]
        return "\n".join(lines)

    def svg(self, width: int = 480, height: int = 300) -> str:
        """A picture: the router's line, and a point for each model alone; the cost is to the right.

        Costs stand on a logarithmic scale where the dearest is more than 20 times the cheapest.
        """
        single = np.array([*self.alone.values()], float)
        costs, qualities = np.r_[self.cost, single[:, 0]], np.r_[self.quality, single[:, 1]]
        scale = np.log if 0 < 20 * costs.min() < costs.max() else np.asarray
        unit = "cost, logarithmic" if scale is np.log else "cost"
        places = np.stack([scale(costs), -qualities], 1)
        low, high = places.min(0), places.max(0)
        share = (places - low) / np.where(high > low, high - low, 1)
        x, y = (np.array([60, 30]) + share * [width - 160, height - 80]).round(1).T
        line = " ".join(f"{a},{b}" for a, b in zip(x[: len(self.cost)], y, strict=False))
        points = zip(x[len(self.cost) :], y[len(self.cost) :], self.alone, strict=True)
        texts = [(60, height - 10, f"{unit}: {costs.min():.3g} to {costs.max():.3g}")]
        texts += [(60, 16, f"quality: {qualities.min():.3f} to {qualities.max():.3f}")]
        circles = ""
        for a, b, name in points:
            circles += f'<circle cx="{a}" cy="{b}" r="4" fill="#d33"/>'
            texts.append((a + 8, b + 4, name))
        words = "".join(f'<text x="{a}" y="{b}">{_escaped(text)}</text>' for a, b, text in texts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" '
            f'fill="#fff"/><polyline points="{line}" fill="none" stroke="#26c" '
            f'stroke-width="2"/>{circles}{words}</svg>\n'
        )


def _escaped(text: str) -> str:
    """A text, as XML has it."""
    return html.escape("".join(one if one.isprintable() else " " for one in text))


def cost_quality_curve(
    router: Router, embeddings: Array, quality: Array, cost: Array | None = None, *,
    prompts: Sequence[str] | Array | None = None, willingness: Sequence[float] | None = None,
) -> Curve:  # fmt: skip
    """The Curve of a router over n prompts whose outcomes are known: give others than it learned.

    embeddings (n, d), quality (n, m). cost (n, m) or (m,): what calls cost; without it, the
    router's own costs. willingness: those to try; by default 40, from "cost is everything" to
    "quality is everything". ValueError for an outcome that is not known (NaN).

    >>> kinds = np.repeat(np.eye(2), 20, 0)  # 20 prompts of each of either kind, and who is good
    >>> router = fit_router(kinds, kinds, [1.0, 2.0], prior=1.0)
    >>> curve = cost_quality_curve(router, kinds, kinds)
    >>> curve.cost[[0, -1]], curve.quality[[0, -1]]
    (array([1. , 1.5]), array([0.5, 1. ]))
    """
    predicted = np.asarray(predict_quality(router, embeddings, prompts))
    quality, own = np.asarray(quality, float), np.array(router.cost)
    paid = own if cost is None else np.asarray(cost, float)
    if quality.shape != predicted.shape or paid.shape not in {own.shape, quality.shape}:
        shapes = f"quality {quality.shape} and cost {paid.shape}"
        raise ValueError(f"{shapes} do not fit. Give a number for each of {predicted.shape}")
    paid = np.broadcast_to(paid, quality.shape)
    known = (np.isfinite(quality) & np.isfinite(paid)).all(1)
    if not len(known) or not known.all():
        told = f"row {known.argmin()} is not known" if len(known) else "there are no rows"
        told += ". Give rows in which every model was asked, or fill the gaps, as by"
        raise ValueError(f"{told} np.where(np.isnan(quality), predict_quality(…), quality)")
    gaps = np.diff(np.unique(own))
    low, high = (gaps.min(), gaps.max()) if len(gaps) else (1.0, 1.0)
    tried = np.geomspace(0.5 * low, 1e3 * high, 40) if willingness is None else willingness
    tried = np.sort(np.ravel(tried))
    rows = np.arange(len(quality))
    asked = [chosen(router, predicted, one) for one in tried]
    names = router.names or tuple(map(str, range(len(own))))
    return Curve(
        tried,
        np.array([paid[rows, one].mean() for one in asked]),
        np.array([quality[rows, one].mean() for one in asked]),
        dict(zip(names, zip(paid.mean(0), quality.mean(0), strict=True), strict=True)),
    )
