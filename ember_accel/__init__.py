"""Ember accelerated: what is learned and computed from what the models answered."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ember_accel.curves import *  # noqa: F403
    from ember_accel.datasets import *  # noqa: F403
    from ember_accel.dispatch import *  # noqa: F403
    from ember_accel.evidence import *  # noqa: F403
    from ember_accel.metrics import *  # noqa: F403
    from ember_accel.retrieval import *  # noqa: F403
    from ember_accel.routing import *  # noqa: F403
    from ember_accel.scoring import *  # noqa: F403
    from ember_accel.state import *  # noqa: F403
    from ember_accel.transforms import *  # noqa: F403

_FILES = {
    "evidence": "Comparison Report Row evaluate",
    "metrics": "choice contains exact f1 graded numeric",
    "datasets": "load",
    "dispatch": "Choice Operation Parity implementations on_choice operation parity prefer",
    "state": "combine field is_static partition restore save state static_field",
    "routing": "Router expected_utility fit_router predict_quality route routed style",
    "curves": "Curve cost_quality_curve",
    "scoring": "DawidSkene bradley_terry dawid_skene fit_temperature weighted_vote",
    "retrieval": "local_quality maxsim topk",
    "transforms": "compose pmap sharded vmap",
}
_HOMES = {name: home for home, names in _FILES.items() for name in names.split()}

if not TYPE_CHECKING:  # a checker takes a name that is not above for a mistake
    __all__ = list(_HOMES)

    def __getattr__(name: str) -> Any:
        """What a file here defines: it is imported when first used, and NumPy with it."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
