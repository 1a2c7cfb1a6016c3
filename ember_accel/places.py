"""Places: where the data of a call lies, with NumPy or with JAX, which is not imported to tell."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

COLD, HOST, DEVICE, TRACED = range(4)  # cold: on the host, and JAX is not imported


@functools.cache
def _wide() -> Any:
    """NumPy's float64."""
    return importlib.import_module("numpy").dtype(float)


def place_of(values: Iterable[Any]) -> int:
    """Where values lie, and what is in them: the highest of their places."""
    if not hasattr(sys.modules.get("jax"), "jit"):
        return COLD
    leaves = [*values]
    place, nested = _of_types(frozenset(map(type, leaves)))
    if nested:
        leaves = leaves_of(leaves)
        place = max(place, _of_types(frozenset(map(type, leaves)))[0])
    if place == HOST and any(getattr(one, "dtype", None) is _wide() for one in leaves):
        return COLD  # JAX has half of the digits: it is for those who ask for it
    return place


@functools.lru_cache(1024)
def _of_types(kinds: frozenset[type]) -> tuple[int, bool]:
    """Where the values of types lie, and whether there may be others in them."""
    jax: Any = sys.modules["jax"]
    bases = {TRACED: jax.core.Tracer, DEVICE: jax.Array, HOST: object}
    places = [at for at, base in bases.items() if any(issubclass(kind, base) for kind in kinds)]
    return max(places, default=HOST), any(_is_nested(kind) for kind in kinds)


@functools.lru_cache(1024)
def _is_nested(kind: Any) -> bool:
    """Whether there are other values in those of a type."""
    return issubclass(kind, list | tuple | Mapping) or dataclasses.is_dataclass(kind)


def leaves_of(value: Any, depth: int = 4) -> list[Any]:
    """What is in lists, tuples, mappings and dataclasses down to a depth, or the value itself."""
    if not depth or not _is_nested(cast("Any", type(value))):
        return [value]
    parts: Iterable[Any] = value
    if isinstance(value, Mapping):
        parts = sorted(cast("Any", value).items(), key=str)
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, each.name, None) for each in dataclasses.fields(value)]
    return [leaf for each in parts for leaf in leaves_of(each, depth - 1)]


def moved(result: Any, place: int) -> Any:
    """A result with its arrays where the arguments lie."""
    jax: Any = sys.modules.get("jax")
    if place == TRACED or (place != DEVICE and place_of([result]) != DEVICE):
        return result
    np: Any = importlib.import_module("numpy")
    kind, made = (np.ndarray, jax.numpy.asarray) if place == DEVICE else (jax.Array, np.array)

    def move(leaf: Any) -> Any:
        return made(leaf) if isinstance(leaf, kind) else leaf

    return jax.tree_util.tree_map(move, result)
