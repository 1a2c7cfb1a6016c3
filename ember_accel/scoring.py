"""Scoring: what is true, and how far to trust each judge, from what the judges said.

    from ember_accel import dawid_skene

    found = dawid_skene(votes, 2)       # votes (items, judges) of classes 0 and 1; -1 abstains
    found.posterior.argmax(1)           # what is true; of a tie, the lowest class
    found.confusion[0]                  # by what is true, how often the first judge says what

Each function is an operation, written once: NumPy runs it in float64; JAX compiles it, in float32
unless x64 is enabled, takes its gradient by `jax.grad` (not `jax.jvp`), and a batch by `jax.vmap`.
Values are checked where they are known: inside of `jax.jit` only shapes are.
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable
from functools import cache, partial, update_wrapper
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ember_accel.dispatch import Operation, measured, operation

Array = Any  # of NumPy, or of JAX
R = TypeVar("R")

# ── 1. Twice ─── one text for NumPy and JAX


def _numpy(core: Callable[..., Any], *static: int) -> Callable[..., Any]:
    """A core run by NumPy, as a function of its arrays."""
    return lambda *arrays: core(np, *static, *(np.asarray(array, float) for array in arrays))


@cache
def _jax(core: Callable[..., Any], *static: int) -> Any:
    """A core compiled by JAX, once for all arrays of the same shapes; in all digits on a GPU."""
    jax = importlib.import_module("jax")
    return jax.jit(jax.default_matmul_precision("highest")(partial(core, jax.numpy, *static)))


def _both(fn: Callable[..., R]) -> Operation[R]:
    """A function as an operation: it is handed `_numpy` or `_jax`, to run its core by."""
    ways = {"numpy": partial(fn, _numpy), "jax": partial(fn, _jax)}
    update_wrapper(ways["numpy"], fn)
    vars(ways["numpy"]).pop("__wrapped__")  # whose signature has `run` in it

    def size(first: Any, *_: Any) -> tuple[int]:
        return (np.size(first),)

    choose = measured(fn.__name__, size)
    return operation(fn.__name__, ways, choose=choose, recovers=(RuntimeError, MemoryError))


def _rest(xp: Any, step: Callable[..., Any], start: Any, most: Any, unit: Any = 1) -> Any:
    """Where `step` takes some arrays until none moves by 1e-6 units; the steps, the last move."""

    def goes_on(state: Any) -> Any:
        return (state[1] < most) & (state[2] > 1e-6 * unit)

    def moved(state: Any) -> Any:
        new = step(state[0])
        moves = [abs(a - b).max(initial=0) for a, b in zip(new, state[0], strict=True)]
        return new, state[1] + 1, xp.stack(moves).max()

    state = (start, xp.asarray(0), xp.asarray(xp.inf))
    if xp is not np:
        return sys.modules["jax"].lax.while_loop(goes_on, moved, state)
    while goes_on(state):
        state = moved(state)
    return state


def _solved(xp: Any, step: Callable[..., Any], fixed: Any, start: Any, most: Any) -> Any:
    """As `_rest` of `step(fixed, …)`; in JAX with the gradient to what is fixed.

    By the implicit function theorem: nothing is kept of the steps.
    """

    def forward(fixed: Any, start: Any) -> Any:
        found = _rest(xp, partial(step, fixed), start, most)
        return found, (fixed, found[0])

    if xp is np:
        return forward(fixed, start)[0]

    def backward(kept: Any, slopes: Any) -> Any:
        slope, (_, pull) = slopes[0], sys.modules["jax"].vjp(step, *kept)
        size = xp.stack([abs(each).max(initial=0) for each in slope]).max()

        def more(flow: Any) -> Any:  # what the steps before the last one add
            return tuple(map(operator.add, slope, pull(flow)[1]))

        return pull(_rest(xp, more, slope, most, size)[0])[0], None

    def ahead(fixed: Any, start: Any) -> Any:
        return forward(fixed, start)[0]

    solved = sys.modules["jax"].custom_vjp(ahead)
    solved.defvjp(forward, backward)
    return solved(fixed, start)


# ── 2. Checks ─── of what is known before it is compiled


def _checked(
    name: str, value: Any, *shapes: tuple[int, ...], low: float = 0, high: float = 1e30,
    whole: bool = False,
) -> Array:
    """The value as an array; a ValueError says which entry is wrong. Of a tracer: the shape."""
    jax: Any = sys.modules.get("jax")
    if not isinstance(value, getattr(getattr(jax, "core", None), "Tracer", ())):
        value = value if isinstance(value, getattr(jax, "Array", ())) else np.asarray(value)
        if value.dtype.kind in "OSUTcMm":
            raise TypeError(f"{name} takes numbers, got {value!r:.80}")
        known = np.asarray(value, float)  # in float32, any bound may be infinite
        bad = np.argwhere(~((known >= low) & (known <= high)) | whole & (known != np.floor(known)))
        if len(bad):
            right = f"a {'whole' if whole else 'finite'} number from {low} to {high}"
            raise ValueError(f"{name}{bad[0].tolist() or ''} is {value[*bad[0]]}, not {right}")
    if value.shape not in shapes if shapes else not value.shape:
        right = " or ".join(map(str, shapes)) or "(…, n)"
        raise ValueError(f"{name} has shape {value.shape}, not {right}")
    return value


def _count(name: str, value: Any, least: int) -> int:
    """How many there are, a whole number."""
    if not hasattr(value, "__index__") or operator.index(value) < least:
        raise ValueError(f"{name} is {value!r:.40}, not a whole number from {least} up")
    return operator.index(value)


def _votes(votes: Any, n_classes: int) -> Array:
    """Votes as an array of whole numbers from -1 up."""
    return _checked("votes", votes, low=-1, high=_count("n_classes", n_classes, 2) - 1, whole=True)


# ── 3. Votes ─── shares of them, and what is true by Bayes' rule


@_both
def weighted_vote(run: Any, votes: Array, weights: Array, n_classes: int) -> Array:
    """The share (…, n_classes) of each class in the weights of the votes.

    votes: (…, judges) of whole numbers; -1 abstains. weights: (judges,), or (judges, n_classes)
    by the class that is voted for. The shares are equal where nobody votes, or only weights of 0.
    `argmax` takes the lowest class of a tie. The gradient reaches the weights.

    >>> weighted_vote([[0, 1, 1], [-1, 0, -1]], [3.0, 1.0, 1.0], 2)
    array([[0.6, 0.4],
           [1. , 0. ]])
    """
    votes = _votes(votes, n_classes)
    weights = _checked("weights", weights, votes.shape[-1:], (votes.shape[-1], n_classes))
    return run(_weighted_vote, n_classes)(votes, weights)


def _weighted_vote(xp: Any, n_classes: int, votes: Array, weights: Array) -> Array:
    """The shares of classes in votes."""
    return _shares(xp, (_one_hot(xp, votes, n_classes).swapaxes(-1, -2) * weights.T).sum(-1))


def _one_hot(xp: Any, votes: Array, n_classes: int) -> Array:
    """Votes (…, judges) as (…, judges, classes) of 0 and 1; all are 0 for -1."""
    return (votes[..., None] == xp.arange(n_classes)).astype(float)


def _shares(xp: Any, amounts: Array) -> Array:
    """Amounts as shares of their sum; equal ones where it is 0."""
    total = amounts.sum(-1, keepdims=True)
    return xp.where(total > 0, amounts / xp.where(total > 0, total, 1), 1 / amounts.shape[-1])


@_both
def posterior(run: Any, votes: Array, confusion: Array, prior: Array | float = 1.0) -> Array:
    """The probability (…, classes) that each class is true, by the votes of judges that are known.

    votes: (…, judges); -1 abstains. confusion: (judges, classes, classes), how probably a judge
    says the class of the last axis where that of the axis before is true. prior: (classes,), or
    a number for equal. By Bayes' rule, for judges who err independently of each other:

        posterior[c] ∝ prior[c] · Π_j confusion[j, c, votes[j]]

    The gradient reaches confusion and prior.

    >>> sure, unsure = [[0.9, 0.1], [0.1, 0.9]], [[0.6, 0.4], [0.4, 0.6]]
    >>> posterior([[0, 1, 1]], [sure, unsure, unsure])
    array([[0.8, 0.2]])
    """
    classes = (2, *np.shape(confusion))[-1]
    votes = _votes(votes, classes)
    confusion = _checked("confusion", confusion, (votes.shape[-1], classes, classes))
    return run(_posterior)(votes, confusion, _checked("prior", prior, (), (classes,)))


def _posterior(xp: Any, votes: Array, confusion: Array, prior: Array) -> Array:
    """Bayes' rule on votes."""
    return _bayes(xp, _one_hot(xp, votes, confusion.shape[-1]), confusion, prior)


def _bayes(xp: Any, said: Array, confusion: Array, prior: Array) -> Array:
    """Bayes' rule on votes as (…, judges, classes) of 0 and 1."""
    least = xp.finfo(said.dtype).tiny  # what never happens has a logarithm too
    likely = xp.tensordot(said, xp.log(xp.maximum(confusion, least)), ((-2, -1), (0, 2)))
    likely = likely + xp.log(xp.maximum(prior, least))
    return _shares(xp, xp.exp(likely - likely.max(-1, keepdims=True)))


# ── 4. Judges ─── how each errs, when nobody knows the truth


class DawidSkene(NamedTuple):
    """What votes say about the truth and about the judges: see `dawid_skene`."""

    posterior: Array  # (items, classes): how probable it is that each is true
    confusion: Array  # (judges, classes, classes): what a judge says, by what is true
    prior: Array  # (classes,): how frequent each is
    iterations: Array
    converged: Array  # whether the last step moved nothing by more than 1e-6


@_both
def dawid_skene(
    run: Callable[..., Callable[..., DawidSkene]], votes: Array, n_classes: int, *,
    pseudocounts: Array | float = 1.0, max_iterations: int = 1000,
) -> DawidSkene:
    """How each judge errs, and what is true, from votes alone.

    votes: (items, judges) of whole numbers; -1 abstains. Expectation maximisation as of Dawid and
    Skene, Applied Statistics 28 (1979), from the shares of the votes. A step is

        posterior[i, c] ∝ prior[c] · Π_j confusion[j, c, votes[i, j]]
        confusion[j, c, l] ∝ pseudocounts[j, c, l] + Σ_i posterior[i, c] · (votes[i, j] = l)
        prior[c] ∝ 1/n_classes + Σ_i posterior[i, c]

    pseudocounts: votes that each judge is imagined to have cast before, (n_classes, n_classes) or
    (judges, n_classes, n_classes) by what is true and what is said; those that were counted where
    the truth is known have their place here. A number k stands for 2k votes on each class, k of
    them right and k spread evenly: a judge counts as better than chance until others disagree. So
    classes keep their names as long as most judges are, and a judge who is alone, or never votes,
    about the accuracy that was imagined. Among a hundred votes it does not matter. Where two judges
    disagree, and nobody else votes, nothing says who is right. Takes some arrays of items x judges
    x classes.

    The gradient reaches pseudocounts, where it converged; for that to confusion, see `posterior`.

    >>> dawid_skene([[0, 0, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]], 2).posterior.argmax(1)
    array([0, 1, 0, 1])
    """
    votes = _votes(votes, n_classes)
    if votes.ndim != 2:
        raise ValueError(f"votes has shape {votes.shape}, not (items, judges)")
    square = (n_classes, n_classes)
    before = _checked("pseudocounts", pseudocounts, (), square, (votes.shape[1], *square))
    return run(_dawid_skene, n_classes, max_iterations)(votes, before)


def _dawid_skene(xp: Any, n_classes: int, most: int, votes: Array, before: Array) -> DawidSkene:
    """Dawid and Skene's estimates."""
    said = _one_hot(xp, votes, n_classes)
    before = before if before.ndim else before * (xp.eye(n_classes) + 1 / n_classes)

    def estimates(fixed: Any, truth: Array) -> tuple[Array, Array]:
        counts = xp.tensordot(truth, fixed[0], (0, 0)).swapaxes(0, 1) + fixed[1]
        return _shares(xp, counts), _shares(xp, truth.sum(0) + 1 / n_classes)

    def step(fixed: Any, state: Any) -> tuple[Array, Array]:
        return estimates(fixed, _bayes(xp, fixed[0], *state))

    start = estimates((said, before), _shares(xp, said.sum(-2)))
    (confusion, prior), steps, moved = _solved(xp, step, (said, before), start, most)
    return DawidSkene(_bayes(xp, said, confusion, prior), confusion, prior, steps, moved <= 1e-6)


# ── 5. Pairs ─── strengths, by who wins


@_both
def bradley_terry(
    run: Any, pairs: Array, n: int, *, weights: Array | float = 1.0, prior: float = 0.01
) -> Array:
    """The strengths (n,) of items, of mean 0: the odds that i beats j are exp(s[i] - s[j]).

    pairs: (k, 2) of a winner and a loser, from 0 to n - 1. weights: (k,), how often each was seen,
    or one number for all; a tie is two pairs, each by half. The maximum, as of Bradley and Terry,
    Biometrika 39 (1952), found by Newton's method, of

        Σ_pairs weight · log sigmoid(s[winner] - s[loser]) - prior/2 · Σ_i s[i]²

    The prior, of deviation 10 when it is 0.01, moves strengths by about a hundredth of what chance
    does. By it items have finite strengths that always win, and groups that were never compared
    with each other the same mean. 1e-9 is the likelihood alone, wherever that has a maximum.
    The gradient reaches weights and prior. Time grows with n³, memory with n².

    >>> bradley_terry([[0, 1], [0, 1], [0, 1], [1, 0]], 2, prior=1e-9).round(4)
    array([ 0.5493, -0.5493])
    """
    n, k = _count("n", n, 1), len(pairs) if np.ndim(pairs) else 0
    pairs = _checked("pairs", pairs, (k, 2), (0,), high=n - 1, whole=True)
    weights = _checked("weights", weights, (), pairs.shape[:1])
    return run(_bradley_terry, n)(pairs, weights, _checked("prior", prior, (), low=1e-9))


def _bradley_terry(xp: Any, n: int, pairs: Array, weights: Array, prior: Array) -> Array:
    """Strengths by Newton's method."""
    cells = (pairs.reshape(-1, 2) @ xp.asarray([n, 1])).astype(int)
    weights, size = weights + xp.zeros(cells.shape), {} if xp is np else {"length": n * n}
    wins = xp.bincount(cells, weights, n * n, **size).reshape(n, n)

    def step(fixed: Any, state: Any) -> tuple[Array]:
        (wins, prior), (s,) = fixed, state
        odds = xp.exp(-xp.logaddexp(0.0, s - s[:, None]))  # of row to beat column, to all digits
        flow = wins * odds.T - wins.T * odds
        slope = (flow - flow.T).sum(1) / 2 - prior * s  # so rounding moves no group as a whole
        curve = (wins + wins.T) * odds * odds.T
        # A little on the diagonal, where rounding would hide the prior; shorter steps where far.
        sums = curve.sum(1) * (1 + 1000 * xp.finfo(curve.dtype).eps) + prior
        change = xp.linalg.solve(xp.diag(sums) - curve, slope)
        return (s + (change - change.mean()) * 2 / (2 + xp.ptp(change)),)

    (strengths,), *_ = _solved(xp, step, (wins, prior), (xp.zeros(n),), 1000)
    return strengths - strengths.mean()


# ── 6. Calibration ─── how sure a judge should have been


@_both
def fit_temperature(run: Any, logits: Array, labels: Array) -> Array:
    """The temperature to divide logits by, so that probabilities are as sure as they are right.

    logits: (items, classes) and labels (items,) of classes, or (items, classes) of their shares;
    or logits (items,) of yes against no, and labels (items,) from 0 to 1. Shares are divided by
    their sum; equal ones stand for a row of 0. The temperature has the highest likelihood (Guo et
    al., 2017), between 1e-12 and 1e6 times the largest difference within a row of logits: the first
    where the highest logit is always right, the other where logits say nothing, or the contrary.
    It is 1 where all are equal, or none are there.
    The gradient reaches logits and labels that are shares.

    >>> fit_temperature([2.0, 2.0, 2.0, -2.0], [1, 1, 0, 0]).round(4)
    np.float64(1.8205)
    """
    logits = _checked("logits", logits, low=-1e30)
    is_class = np.ndim(labels) < logits.ndim
    high = logits.shape[-1] - 1 if is_class else 1
    shapes = (logits.shape, logits.shape[:-1])[: logits.ndim]
    labels = _checked("labels", labels, *shapes, high=high, whole=is_class)
    return run(_fit_temperature)(logits, labels)


def _fit_temperature(xp: Any, logits: Array, labels: Array) -> Array:
    """The temperature, by halving where its logarithm is."""
    logits = logits.astype(float)  # in 16 bits, a difference may be infinite
    if logits.ndim == 1:
        logits, labels = xp.stack([0 * logits, logits], -1), xp.stack([1 - labels, labels], -1)
    labels = labels if labels.ndim == logits.ndim else _one_hot(xp, labels, logits.shape[-1])
    gaps = logits - logits.max(-1, keepdims=True)
    largest, ends = abs(gaps).max(initial=0), np.log([1e-12, 1e6])
    parts = gaps / xp.where(largest > 0, largest, 1), _shares(xp, labels)
    known = parts if xp is np else sys.modules["jax"].lax.stop_gradient(parts)

    def slopes(parts: Any, log_t: Array) -> tuple[Array, Array]:
        """Of the negative log-likelihood by 1/t, and of that by -log t."""
        (gaps, shares), cold = parts, xp.exp(-log_t)
        p = _shares(xp, xp.exp(gaps * cold))
        off = gaps - (p * gaps).sum(-1, keepdims=True)
        return ((p - shares) * gaps).sum(), (p * off**2).sum() * cold

    def halved(ends: Any) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        is_below = slopes(known, middle)[0] > 0
        return xp.where(is_below, middle, ends[0]), xp.where(is_below, ends[1], middle)

    found, *_ = _rest(xp, halved, tuple(xp.asarray(end) for end in ends), 100)
    slope, curve = slopes(parts, sum(found) / 2)  # a last step, by Newton, has the gradient
    log_t = xp.clip(sum(found) / 2 + slope / xp.where(curve > 0, curve, 1), *ends)
    return xp.where(largest > 0, largest * xp.exp(log_t), 1.0)
