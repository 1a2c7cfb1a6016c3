"""Ember accelerated: what is learned and computed from what the models answered."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ember_accel.datasets import load
    from ember_accel.evidence import Comparison, Report, Row, evaluate
    from ember_accel.metrics import choice, contains, exact, f1, graded, numeric

__all__ = [
    "Comparison", "Report", "Row", "choice", "contains", "evaluate", "exact", "f1", "graded",
    "load", "numeric",
]  # fmt: skip

_HOMES = {
    "datasets": ["load"],
    "evidence": ["Comparison", "Report", "Row", "evaluate"],
    "metrics": ["choice", "contains", "exact", "f1", "graded", "numeric"],
}

if not TYPE_CHECKING:  # a checker takes a name that is not above for a mistake

    def __getattr__(name: str) -> Any:
        """What a file here defines: it is imported when first used, and NumPy with it."""
        for home, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"{__name__}.{home}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
