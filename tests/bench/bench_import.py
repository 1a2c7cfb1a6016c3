"""What `import ember` costs in CPU time, beside `import httpx, anyio` and a bare interpreter.

    python tests/bench/bench_import.py [RUNS]

Each run is a fresh interpreter; the three take turns, so that all meet the same machine. The
ratio is that of the medians, each less the bare interpreter's. All modules are measured twice:
from cached bytecode, and compiled at each import, as under PYTHONDONTWRITEBYTECODE.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("pass", "import httpx, anyio", "import ember")


def cpu_seconds(program: str, environment: dict[str, str]) -> float:
    """User and system time of a fresh interpreter that runs `program`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def compare(title: str, runs: int, environment: dict[str, str]) -> None:
    """Print the medians, their ratio and their difference."""
    for program in PROGRAMS:
        cpu_seconds(program, environment)  # fills the cache
    rounds = [[cpu_seconds(program, environment) for program in PROGRAMS] for _ in range(runs)]
    bare, base, ours = (1000 * statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"{title}: CPU time, median of {runs} interleaved runs each")
    for program, milliseconds in zip(PROGRAMS, (bare, base, ours), strict=True):
        print(f"  {program:<20} {milliseconds:6.1f} ms")
    print(f"  ratio {(ours - bare) / (base - bare):.2f}, difference {ours - base:+.1f} ms")


def main(runs: int) -> None:
    """Both tables."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        compare("no bytecode", runs, {**environment, "PYTHONDONTWRITEBYTECODE": "1"})
        compare("bytecode", runs, {**environment, "PYTHONDONTWRITEBYTECODE": ""})


if __name__ == "__main__":
    main(max(15, int(sys.argv[1]) if len(sys.argv) > 1 else 25))
