"""The retrieval operations on a GPU: Pallas, chunked XLA and plain XLA, beside the floor.

    python tests/bench/bench_kernels.py [SCALE]

All three have the same bfloat16 arguments and sum in float32. Plain XLA stores the scores. The
floor is that of an H200: what must be read at 4.3 TB/s, or multiplied at 790 TFLOP/s, whichever
takes longer; `temp` is what the compiled program asks for beside arguments and results. SCALE
divides the number of documents, for a smaller GPU.

Without a GPU it says so, runs the kernels on tiny arguments in Pallas's interpreter, and compares
NumPy with chunked JAX on the CPU.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
from jax import numpy as jnp

from ember_accel import kernels
from ember_accel.retrieval import local_quality, maxsim, topk

BYTES, FLOPS = 4.3e12, 790e12  # of an H200, a second


def plain(name: str) -> Callable[..., Any]:
    """The operation as one would write it, with the matrix of all scores."""

    def scores(a: Any, b: Any) -> Any:
        return jnp.matmul(a, b.T, precision="highest", preferred_element_type=jnp.float32)

    def late(query: Any, docs: Any, lengths: Any) -> Any:
        found = scores(query, docs.reshape(-1, docs.shape[2])).reshape(-1, *docs.shape[:2])
        real = jnp.arange(docs.shape[1]) < lengths[:, None]
        return jnp.where(real, found, -jnp.inf).max(axis=2).sum(axis=0)

    return {
        "topk": lambda queries, docs, k: jax.lax.top_k(scores(queries, docs), k),
        "maxsim": late,
        "local_quality": lambda queries, points, quality, temperature: jnp.matmul(
            jax.nn.softmax(scores(queries, points) / temperature), quality, precision="highest"
        ),
    }[name]


def arguments(name: str, shapes: tuple[tuple[int, ...], ...], kind: Any) -> list[Any]:
    """Random arguments of the shapes, made where they are used; unit rows, as embeddings are."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [jax.random.normal(k, s, kind) for k, s in zip(keys, shapes, strict=True)]
    arrays[:2] = [each / jnp.sqrt(jnp.asarray(each.shape[-1], kind)) for each in arrays[:2]]
    if name == "maxsim":
        count, longest, _ = shapes[1]
        arrays.append(jax.random.randint(keys[0], (count,), longest // 2, longest + 1))
    if name == "local_quality":
        arrays[2] = arrays[2].astype(jnp.float32)
        arrays.append(jnp.float32(0.05))
    return arrays


def milliseconds(fn: Callable[[], Any], runs: int) -> float:
    """The median time of a call whose result is waited for."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def difference(found: Any, expected: Any) -> str:
    """How far two results are from each other."""
    if isinstance(found, tuple):
        same = float((np.asarray(found[1]) == np.asarray(expected[1])).mean())
        return f"{100 * same:.2f}% the same indices"
    return f"largest difference {float(jnp.abs(found - expected).max()):.1e}"


def measure(name: str, shapes: Any, work: tuple[float, float], *, k: int = 0, grad: bool) -> None:
    """A table of one operation at one size. work: bytes and operations that cannot be saved."""
    floor = 1000 * max(work[0] / BYTES, work[1] / FLOPS)
    print(f"\n{name}{' gradient' * grad} {' x '.join(map(str, shapes))}: floor {floor:.3f} ms")
    args, first = arguments(name, shapes, jnp.bfloat16), None
    for by in ("pallas", "jax", "plain"):
        fn: Any = plain(name) if by == "plain" else kernels.compiled(name, by)
        call = (lambda *a, fn=fn: fn(*a, k)) if k else fn
        if grad:
            learned = (0, 1) if name == "maxsim" else (0, 1, 2, 3)
            call = jax.grad(lambda *a, fn=fn: fn(*a).sum(), argnums=learned)
        try:
            program = jax.jit(call).lower(*args).compile()
            took = milliseconds(lambda program=program: program(*args), 10)
            result = program(*args)
        except Exception as error:  # out of memory, or not to be compiled
            print(f"  {by:<7} {type(error).__name__}: {str(error).splitlines()[0]:.90}")
            continue
        result = result[0] if grad else result
        first = result if first is None else first
        memory = program.memory_analysis().temp_size_in_bytes / 1e6
        print(
            f"  {by:<7} {took:9.3f} ms  {took / floor:6.1f} x floor  {work[0] / took / 1e6:8.0f} "
            f"GB/s {work[1] / took / 1e9:7.1f} TFLOP/s  temp {memory:8.0f} MB  "
            f"{difference(result, first)}"
        )


def on_gpu(scale: int) -> None:
    """The sizes that the floors are known for."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, bfloat16, medians of 10 runs")
    n, m, d = 1_000_000 // scale, 8, 384
    for grad in (False, True):
        work = 2.0 * n * d * (1 + grad), 2.0 * 4096 * n * (d + m) * (1 + 2 * grad)
        measure("local_quality", ((4096, d), (n, d), (n, m)), work, grad=grad)
    n = 5_000_000 // scale  # the kernels take fewer than 2**31 numbers
    for q in (1, 1024):
        measure("topk", ((q, d), (n, d)), (2.0 * n * d, 2.0 * q * n * d), k=100, grad=False)
    for query, count, longest in ((32, 10_000, 300), (1024, 1000, 1024)):
        tokens = count // scale * longest
        shapes = ((query, 128), (count // scale, longest, 128))
        for grad in (False, True):
            work = 256.0 * tokens * (1 + grad), 256.0 * query * tokens
            measure("maxsim", shapes, work, grad=grad)


def on_cpu() -> None:
    """Whether the kernels are right, and how NumPy and chunked JAX compare."""
    print("No GPU here. Pallas in the interpreter, tiny, against plain XLA in float32:")
    sizes = {
        "topk": ((5, 40), (300, 40)),
        "maxsim": ((5, 40), (7, 30, 40)),
        "local_quality": ((5, 40), (300, 40), (300, 3)),
    }
    for name, shapes in sizes.items():
        args, rest = arguments(name, shapes, jnp.float32), (10,) * (name == "topk")
        found = kernels.compiled(name, "pallas")(*args, *rest)
        print(f"  {name:<14} {difference(found, plain(name)(*args, *rest))}")
    print("NumPy, and chunked JAX with the data on the device; float32, medians of 3 runs:")
    for rows, docs in ((1, 1000), (1, 50_000), (64, 10_000), (512, 10_000)):
        sizes = {
            "topk": ((rows, 384), (docs, 384)),
            "maxsim": ((max(8, rows // 8), 128), (docs // 50, 50, 128)),
            "local_quality": ((rows, 384), (docs, 384), (docs, 8)),
        }
        for name, shapes in sizes.items():
            args, rest = arguments(name, shapes, jnp.float32), (10,) * (name == "topk")
            host = [np.asarray(arg) for arg in args]
            operation: Any = {"topk": topk, "maxsim": maxsim, "local_quality": local_quality}[name]
            numpy, xla = (
                milliseconds(lambda o=operation, d=data, r=rest, b=by: o(*d, *r, prefer=b), 3)
                for data, by in ((host, "numpy"), (args, "jax"))
            )
            print(f"  {name:<14} {' x '.join(map(str, shapes[:2])):<28} numpy {numpy:8.2f} ms  "
                  f"jax {xla:8.2f} ms  numpy/jax {numpy / xla:5.2f}")


if __name__ == "__main__":
    if jax.default_backend() == "gpu":
        on_gpu(max(1, int(sys.argv[1])) if len(sys.argv) > 1 else 1)
    else:
        on_cpu()
