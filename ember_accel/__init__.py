"""Ember accelerated: what is learned and computed from what the models answered."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a checker is told what is here; nothing of it is imported
    from ember_accel.curves import Curve as Curve, cost_quality_curve as cost_quality_curve
    from ember_accel.datasets import load as load
    from ember_accel.dispatch import (
        Choice as Choice, Operation as Operation, Parity as Parity,
        implementations as implementations, on_choice as on_choice, operation as operation,
        parity as parity, prefer as prefer,
    )  # fmt: skip
    from ember_accel.evidence import (
        Comparison as Comparison, Report as Report, Row as Row, evaluate as evaluate,
    )  # fmt: skip
    from ember_accel.metrics import (
        choice as choice, contains as contains, exact as exact, f1 as f1, graded as graded,
        numeric as numeric,
    )  # fmt: skip
    from ember_accel.retrieval import local_quality as local_quality, maxsim as maxsim, topk as topk
    from ember_accel.routing import (
        Router as Router, expected_utility as expected_utility, fit_router as fit_router,
        predict_quality as predict_quality, route as route, routed as routed, style as style,
    )  # fmt: skip
    from ember_accel.scoring import (
        DawidSkene as DawidSkene, bradley_terry as bradley_terry, dawid_skene as dawid_skene,
        fit_temperature as fit_temperature, weighted_vote as weighted_vote,
    )  # fmt: skip
    from ember_accel.state import (
        combine as combine, field as field, is_static as is_static, partition as partition,
        restore as restore, save as save, state as state, static_field as static_field,
    )  # fmt: skip
    from ember_accel.transforms import (
        compose as compose, pmap as pmap, sharded as sharded, vmap as vmap,
    )  # fmt: skip

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
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        return home if name == _HOMES[name] else getattr(home, name)  # state is both


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
