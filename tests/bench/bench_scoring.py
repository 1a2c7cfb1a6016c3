"""What scoring costs: milliseconds of each operation by NumPy and by JAX, once it is compiled.

    python tests/bench/bench_scoring.py [ROUNDS]

Both take turns in each round. For `dawid_skene` the accuracy of its answers stands beside that of
the majority, on the same votes of judges who err as simulated.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from ember_accel.scoring import bradley_terry, dawid_skene, fit_temperature, weighted_vote

RANDOM = np.random.default_rng(0)
TRUTH = RANDOM.integers(4, size=100_000)
RIGHT = RANDOM.random((len(TRUTH), 8)) < np.linspace(0.2, 0.8, 8)
VOTES = np.where(RIGHT, TRUTH[:, None], RANDOM.integers(4, size=RIGHT.shape))
PAIRS = RANDOM.permuted(np.tile(np.arange(50), (20_000, 1)), axis=1)[:, :2]
LOGITS = RANDOM.normal(size=(100_000, 4)) * 3
LABELS = (LOGITS / 2 + RANDOM.gumbel(size=LOGITS.shape)).argmax(1)

RUNS: dict[str, Callable[[str, int], Any]] = {
    "weighted_vote": lambda way, n: weighted_vote(VOTES[:n], np.ones(8), 4, prefer=way),
    "dawid_skene": lambda way, n: dawid_skene(VOTES[:n], 4, prefer=way),
    "bradley_terry": lambda way, n: bradley_terry(PAIRS[:n], 50, prefer=way),
    "fit_temperature": lambda way, n: fit_temperature(LOGITS[:n], LABELS[:n], prefer=way),
}


def milliseconds(run: Callable[[str, int], Any], way: str, n: int) -> float:
    """The time of a run, until its result is there."""
    started = time.perf_counter()
    run(way, n)
    return 1e3 * (time.perf_counter() - started)


def main(rounds: int) -> None:
    """Print a line for each operation and size."""
    print(f"{'':16}{'items':>8}{'numpy ms':>10}{'jax ms':>10}{'ratio':>7}")
    for name, run in RUNS.items():
        for n in (100, 10_000, 100_000):
            run("jax", n)
            times = [[milliseconds(run, way, n) for way in ("numpy", "jax")] for _ in range(rounds)]
            ours, theirs = map(statistics.median, zip(*times, strict=True))
            print(f"{name:16}{n:8,}{ours:10.2f}{theirs:10.2f}{ours / theirs:7.2f}")
    for name, shares in (
        ("dawid_skene", dawid_skene(VOTES, 4).posterior),
        ("majority", weighted_vote(VOTES, np.ones(8), 4)),
    ):
        print(f"{name:16} right {(shares.argmax(1) == TRUTH).mean():.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 5)
