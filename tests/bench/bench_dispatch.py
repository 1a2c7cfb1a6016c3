"""How good the automatic choice of an implementation is, and what choosing costs.

    python tests/bench/bench_dispatch.py [OPERATION]
    python tests/bench/bench_dispatch.py --rebuild

For each operation that the table knows, over sizes that the table does not: the least time of each
implementation and of the automatic choice, which take turns, on host data and on JAX's own. The
last column is the choice's time by that of the best. Where a choice is off, rebuild the table on
this machine, while nothing else runs, by `--rebuild`.
"""

import functools
import json
import math
import os
import random
import sys
import timeit
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from ember_accel import dispatch
from ember_accel.dispatch import Choice, Measured, Operation, measured, on_choice, operation

SHARES = (0.18, 0.55)  # of the rows of what the table was measured with
TARGET = 1.3


def timed(operation: Operation[Any], args: Any, names: Iterable[Any]) -> dict[Any, float]:
    """The least µs of a call by each implementation; None: by the choice. They take turns."""
    ready, times = jax.block_until_ready, dict.fromkeys(names, math.inf)
    calls = {name: functools.partial(operation, *args, prefer=name) for name in times}
    timers = {name: timeit.Timer("ready(call())", globals={"ready": ready, "call": call})
              for name, call in calls.items()}  # fmt: skip
    counts = {name: int(2e-3 / min(timer.repeat(3, 1))) + 1 for name, timer in timers.items()}
    for name in random.sample([*times] * 7, 7 * len(times)):  # nobody is always behind another
        seconds = timers[name].timeit(counts[name]) / counts[name]
        times[name] = min(times[name], 1e6 * seconds)
    return times


def rebuild() -> None:
    """Rewrite the table by the operations' own cases, for data on the host and on JAX's device."""
    table, device = dict(dispatch._table()), jax.default_backend()
    kind = f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    table["machine"] = table.get("machine", {}) | {"host": kind, device: kind}
    for one in dispatch.library():
        if not one.cases or not isinstance(one.choose, Measured):
            continue
        rows: dict[str, list[Any]] = {"host": [], device: []}
        names = [name for name, cause in one.missing().items() if not cause]
        for args in one.cases():
            for at, given in (("host", args), (device, dispatch.moved(args, dispatch.DEVICE))):
                # Pallas is interpreted on a CPU.
                able = [name for name in names if name != "pallas" or at not in {"host", "cpu"}]
                times = {name: float(f"{us:.2g}") for name, us in timed(one, given, able).items()}
                rows[at].append([one.choose.of(*args), times])
        table[one.name] = table.get(one.name, {}) | rows
    dispatch._FILE.write_text(json.dumps(table) + "\n", encoding="utf-8")


def smaller(args: tuple[Any, ...], share: float) -> tuple[Any, ...]:
    """The arguments with so many of the rows of each array."""
    kinds = (np.ndarray, list)
    return tuple(a[: -int(-len(a) * share // 1)] if isinstance(a, kinds) else a for a in args)


def compared(one: Operation[Any], args: tuple[Any, ...], place: str) -> float:
    """The time of the choice by that of the best, printed."""
    backend = jax.default_backend()
    names = [name for name, missing in one.missing().items() if not missing]
    if "cpu" in {place, backend} or place == "host":
        names = [name for name in names if name != "pallas"]
    choices = list[Choice]()
    with on_choice(choices.append):
        one(*args)
    times = timed(one, args, [None, *names])
    automatic = times.pop(None)
    ratio = automatic / min(times.values())
    shown = "".join(f"{times[name]:>12,.0f}" for name in names)
    size = "x".join(map(str, choices[0].size))
    print(f"  {place:<5}{size:<28}{shown}   {choices[0].implementation:<8}{ratio:6.2f}")
    return ratio


def overhead() -> None:
    """What a call costs above the bare function, where its choice is remembered."""

    def bare(x: Any, y: Any, k: int) -> Any:
        return x

    op = operation(
        "bare", {"numpy": bare, "jax": bare},
        choose=measured("bare", lambda x, y, k: (x.shape[0], x.shape[1], y.shape[0])),
    )  # fmt: skip
    x, y = np.ones((1, 384), np.float32), np.ones((1000, 384), np.float32)
    calls = {"bare": lambda: bare(x, y, 10), "chosen": lambda: op(x, y, 10),
             "chosen, by names": lambda: op(x, y=y, k=10)}  # fmt: skip
    times = {name: min(timeit.repeat(call, number=5000, repeat=20)) for name, call in calls.items()}
    for name, seconds in times.items():
        above = 1e6 * (seconds - times["bare"]) / 5000
        target = "  target 3" if name == "chosen" else ""
        print(f"  {name:<18}{1e6 * seconds / 5000:6.2f} µs {above:+6.2f}{target}")


def main(wanted: list[str]) -> None:
    """Print the tables."""
    print("What a call costs above the function")
    overhead()
    ratios = list[float]()
    for one in dispatch.library():
        if not (one.cases and isinstance(one.choose, Measured) and wanted in ([], [one.name])):
            continue
        names = "".join(f"{name:>12}" for name in one.implementations if name != "pallas")
        print(f"{one.name}: µs by size\n{'':<35}{names}   chosen   ratio")
        cases = [smaller(args, share) for args in one.cases() for share in SHARES]
        for args in cases:
            moved = jax.tree_util.tree_map(
                lambda leaf: jax.numpy.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, args
            )
            places = (("host", args), (jax.default_backend(), moved))
            ratios += [compared(one, given, place) for place, given in places]
    worst = sorted(ratios)[-3:]
    off = sum(ratio > TARGET for ratio in ratios)
    print(f"{off} of {len(ratios)} choices above {TARGET} times the best; the worst: "
          + ", ".join(f"{ratio:.2f}" for ratio in worst))  # fmt: skip


if __name__ == "__main__":
    rebuild() if sys.argv[1:] == ["--rebuild"] else main(sys.argv[1:])
