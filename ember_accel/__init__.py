"""Ember accelerated: what is learned and computed from what the models answered."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ember_accel.evidence import *  # noqa: F403

_HOMES = {
    "Comparison": "evidence", "Report": "evidence", "Row": "evidence", "choice": "metrics",
    "contains": "metrics", "evaluate": "evidence", "exact": "metrics", "f1": "metrics",
    "graded": "metrics", "load": "datasets", "numeric": "metrics",
}  # fmt: skip

if not TYPE_CHECKING:  # a checker takes a name that is not above for a mistake
    __all__ = list(_HOMES)

    def __getattr__(name: str) -> Any:
        """What a file here defines: it is imported when first used, and NumPy with it."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
