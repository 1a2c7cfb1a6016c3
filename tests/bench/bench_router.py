"""How well a learned router chooses, beside simpler ones: cross-validated, or on rows held back.

    python tests/bench/bench_router.py [DATA.npz] [--train-on DATA.npz --test-on DATA.npz]

Each router learns from the same rows and is scored inside each of the data's folds; the table has
means over folds. `routellm` is its MMLU: APGR, also with 1,500 labelled rows (three draws a fold);
other pools: AIQ, where a call's predicted cost is the mean of the training rows. In brackets: the
router minus that row, a 95% interval by a bootstrap of the queries in each fold, the same for all.
Metrics: `router_eval.py`. OMP_NUM_THREADS sets the threads.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from ember_accel.routing import fit_router, predict_quality, route

Array = Any
SHARED = Path(__file__).parents[3] / "shared"
Rows = dict[str, Any]  # emb, quality, cost, domains, prompts: of the same prompts
TASKS = ("routellm", "routellm 1500", "llmrouter", "routerbench")
KS, RESAMPLES, PERFECT = (5, 10, 20, 40, 80, 160, 320), 500, 200


def picked(pool: Rows, places: Array) -> Rows:
    """Some rows of a pool. Where it has no domains of its own, they are the prompts' sources."""
    labels = pool["domain"] if len(np.unique(pool["domain"])) > 2 else pool["dataset"]
    rows = {name: pool[name][places] for name in ("emb", "quality", "cost")}
    texts = [pool["prompts"][at] for at in places]
    return rows | {"domains": labels[places].tolist(), "prompts": texts}


def folds(task: str, train: Any, test: Any) -> Iterator[tuple[int, Rows, Rows]]:
    """The number of a fold, the rows to learn from, and the rows to test on."""
    name, _, labels = task.partition(" ")
    one, two = train[name], test[name]
    learn, ask = (np.ones(len(pool["quality"]), bool) for pool in (one, two))
    if name == "routellm":
        learn, ask = (p["dataset"] == p["meta"]["datasets"].index("mmlu") for p in (one, two))
    for fold in range(int(one["fold"].max()) + 1 if one is two else 1):
        known = np.flatnonzero(learn & (one["fold"] != fold) if one is two else learn)
        asked = np.flatnonzero(ask & (two["fold"] == fold) if one is two else ask)
        for draw in range(3 if labels else 1):
            chance, few = np.random.default_rng([draw, fold]), int(labels or len(known))
            some = np.sort(chance.choice(known, few, replace=False))
            yield fold, picked(one, some), picked(two, asked)


# ── 1. Routers ─── each predicts the quality (n, m) of each model's answers


def neighbours(train: Rows, emb: Array, *, others: bool = False) -> dict[int, Array]:
    """The mean quality of the k nearest training rows by cosine, for each k."""
    found = []
    for at in range(0, len(emb), 1024):
        near = emb[at : at + 1024] @ train["emb"].T
        if others:  # the rows are those of training: no row is its own neighbour
            np.fill_diagonal(near[:, at:], -np.inf)
        part = np.argpartition(-near, KS[-1], axis=1)[:, : KS[-1]]
        order = np.argsort(-np.take_along_axis(near, part, 1), axis=1)
        found.append(np.take_along_axis(part, order, 1))
    total = train["quality"][np.concatenate(found)].cumsum(1, dtype=float)
    return {k: total[:, k - 1] / k for k in KS}


def ridge(train: Rows, emb: Array) -> Array:
    """Ridge regression on the embedding; a tenth of the rows chooses the penalty."""
    mean, base = train["emb"].mean(0), train["quality"].mean(0)
    rows, truth = train["emb"] - mean, train["quality"] - base
    held = np.random.default_rng(0).permutation(len(rows)) < len(rows) // 10

    def fitted(penalty: float, kept: Array) -> Array:
        gram = rows[kept].T @ rows[kept] + penalty * np.eye(rows.shape[1])
        return np.linalg.solve(gram, rows[kept].T @ truth[kept])

    def error(penalty: float) -> float:
        return float(((rows[held] @ fitted(penalty, ~held) - truth[held]) ** 2).mean())

    return base + (emb - mean) @ fitted(min(np.geomspace(1, 300, 9), key=error), held | True)


def factors(train: Rows, emb: Array, rank: int = 64) -> Array:
    """RouteLLM's matrix factorisation: a projected embedding times each model's vector.

    By gradient descent of the logistic loss; a tenth of the rows chooses when to stop.
    """
    chance, mean, quality = np.random.default_rng(0), train["emb"].mean(0), train["quality"]
    scale = np.sqrt(((train["emb"] - mean) ** 2).sum(1).mean())
    (n, d), m, base = train["emb"].shape, quality.shape[1], quality.mean(0)
    rows, held = (train["emb"] - mean) / scale, chance.permutation(n) < n // 10
    start = [chance.normal(0, rank**-0.5, size) for size in ((d, rank), (rank, m))]
    now = [one.astype(np.float32) for one in (*start, np.log(base / (1 - base)))]
    motion, tried = [0 * one for one in now], []
    for step in range(200):
        inner = rows @ now[0]
        error = 0.5 * np.tanh(0.5 * (inner @ now[1] + now[2])) + 0.5 - quality
        tried.append(((error[held] ** 2).mean(), step, now))
        error[held] = 0
        slopes = rows.T @ (error @ now[1].T), inner.T @ error, error.sum(0)
        motion = [0.9 * one - two * 2 / n for one, two in zip(motion, slopes, strict=True)]
        now = [one + two for one, two in zip(now, motion, strict=True)]
    project, models, bias = min(tried)[2]
    return 0.5 * np.tanh(0.5 * ((emb - mean) / scale @ project @ models + bias)) + 0.5


def ours(train: Rows, test: Rows, *told: str) -> Array:
    """The router, told the prompts, the domains, or both."""
    known = {name: train[name] for name in told}
    router = fit_router(train["emb"], train["quality"], train["cost"], **known)
    asked = test["prompts"] if "prompts" in told else None
    return predict_quality(router, test["emb"], asked, prefer="numpy")


# ── 2. Scores ─── in a fold, for each of many ways to weigh its rows


def scores(metrics: Any, guess: Array, rows: Rows, prices: Array, weights: Array) -> Array:
    """APGR for two models, AIQ for more, for each of the weights (r, n) of the rows."""
    quality, cost = (rows[name].astype(float) for name in ("quality", "cost"))
    if len(prices) == 2:
        score = guess[:, 0] - guess[:, 1]
        order, gain = np.argsort(score, kind="stable"), quality[:, 1] - quality[:, 0]
        starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # equals move together
        both = (np.add.reduceat(one[:, order], starts, 1) for one in (weights, weights * gain))
        sums = (np.pad(one.cumsum(1), ((0, 0), (1, 0))) for one in both)
        calls, gains = (one / one[:, -1:] for one in sums)
        return np.trapezoid(gains, calls, axis=1)
    at, shares, found = np.arange(len(quality)), weights / weights.sum(1, keepdims=True), []
    chosen = [(guess - one * prices).argmax(1) for one in metrics.lambda_grid(prices[None], 60)]
    paid, good = (shares @ np.array([kind[at, j] for j in chosen]).T for kind in (cost, quality))
    for *points, price, worth in zip(paid, good, shares @ cost, shares @ quality, strict=True):
        ends = [price.argmin(), price.argmax()]  # these two settings need no router
        line = np.stack(points, 1), np.stack([price[ends], worth[ends]], 1)
        found.append(metrics.aiq(np.vstack(line), *price[ends]))
    return np.array(found)


def table(metrics: Any, task: str, train: Any, test: Any) -> list[tuple[Array, Array]]:
    """Prints the scores of one task; what the router predicted in each fold, and what came."""
    found: dict[str, list[Array]] = {}
    seen = []
    for fold, one, two in folds(task, train, test):
        prices, inner = one["cost"].astype(float).mean(0), neighbours(one, one["emb"], others=True)
        flat, near, n = np.ones((1, len(one["emb"]))), neighbours(one, two["emb"]), len(two["emb"])
        best = max(KS, key=lambda k: scores(metrics, inner[k], one, prices, flat)[0])
        guesses = {f"kNN, k = {k}": guess for k, guess in near.items()} | {
            "kNN, k by training rows": near[best],
            "the same model for all": np.tile(one["quality"].mean(0), (n, 1)),
            "ridge regression": ridge(one, two["emb"]),
            "matrix factorisation": factors(one, two["emb"]),
            "router, embeddings only": ours(one, two),
            "router without prompts": ours(one, two, "domains"),
            "router without domains": ours(one, two, "prompts"),
            "router": ours(one, two, "prompts", "domains"),
            "oracle": two["quality"],
        }  # fmt: skip
        seen.append((guesses["router"].astype(float), two["quality"].astype(float)))
        drawn = np.random.default_rng(fold).multinomial(n, np.full(n, 1 / n), RESAMPLES)
        weights = np.concatenate([np.ones((1, n)), drawn])
        for name, guess in guesses.items():
            found.setdefault(name, []).append(scores(metrics, guess, two, prices, weights))
    means = {name: np.mean(several, 0) for name, several in found.items()}
    top = max((name for name in means if "k =" in name), key=lambda name: means[name][0])
    print(f"\n{task}: {len(seen)} fits, {'APGR' if seen[0][0].shape[1] == 2 else 'AIQ'}")
    for name, mean in means.items():
        above = means["router"] - mean
        low, high = np.quantile(above[1:], [0.025, 0.975])
        note = f"  {above[0]:+.4f} [{low:+.4f}, {high:+.4f}]{'  best kNN' * (name == top)}"
        print(f"  {name:<24}{mean[0]:.4f}{note * (name not in ('router', 'oracle'))}")
    return seen


def calibration(metrics: Any, seen: list[tuple[Array, Array]]) -> None:
    """Prints the expected calibration error, the mean of folds, and what perfect models have.

    A perfect model's outcomes are drawn: right, with the predicted probability. Where the quality
    is a fraction, the draw is pulled towards the probability, to vary as much as outcomes do.
    """
    chance, drawn = np.random.default_rng(0), []
    for guess, truth in seen:
        between, usual = (truth > 0) & (truth < 1), guess * (1 - guess)
        share = ((guess - truth) ** 2)[between].sum() / max(usual[between].sum(), 1e-9)
        pull = np.where(between, min(1.0, share) ** 0.5, 1.0)
        draws = chance.random((PERFECT, *guess.shape)) < guess
        drawn.append([truth, *(guess + pull * (draws - guess))])
    found = []
    for model in range(-1, seen[0][0].shape[1]):
        part = slice(model, model + 1) if model >= 0 else slice(None)
        errors = np.mean([
            [metrics.ece(guess[:, part], came[:, part]) for came in several]
            for (guess, _), several in zip(seen, drawn, strict=True)
        ], 0)  # fmt: skip
        perfect = np.quantile(errors[1:], 0.95)
        found.append((errors[0] - perfect, model, errors[0], perfect))
    for above, model, error, perfect in (found[0], max(found[1:])):
        name = f"worst, model {model}" if model >= 0 else "all models"
        print(f"  calibration error, {name}: {error:.4f}, {above:+.4f} above ", end="")
        print(f"{perfect:.4f}, the 95% point of a perfect model's")


def speed(pool: Rows) -> None:
    """Prints the seconds of a fit, and of a query."""
    rows, now = picked(pool, np.arange(len(pool["quality"]))[:12_000]), time.perf_counter
    told, times, started = {name: rows[name] for name in ("prompts", "domains")}, [], now()
    router = fit_router(rows["emb"], rows["quality"], rows["cost"], **told)
    print(f"a fit of {len(rows['emb']):,} prompts: {now() - started:.1f} s by the clock")
    for at in range(200):
        started = now()
        route(router, rows["emb"][at : at + 1], rows["prompts"][at : at + 1], willingness=0.02)
        times.append(1e3 * (now() - started))
    jax = "JAX was imported" if "jax" in sys.modules else "JAX was not imported"
    print(f"a query: the first {times[0]:.2f} ms, then {statistics.median(times):.3f} ms; {jax}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Print how well a learned router chooses.")
    parser.add_argument("data", nargs="?", type=Path, default=SHARED / "data" / "router_dev.npz")
    parser.add_argument("--train-on", type=Path)
    parser.add_argument("--test-on", type=Path)
    given = parser.parse_args()
    tool, learn = SHARED / "tools" / "router_eval.py", given.train_on or given.data
    if absent := [p for p in (tool, learn, given.test_on or learn) if not p.exists()]:
        print(f"{absent[0]} is absent: nothing is measured")
        return
    spec: Any = importlib.util.spec_from_file_location("router_eval", tool)
    metrics = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(metrics)
    train = metrics.load(learn)
    test = metrics.load(given.test_on) if given.test_on else train
    speed(train["routellm"])
    for task in TASKS:
        calibration(metrics, table(metrics, task, train, test))


if __name__ == "__main__":
    main()
