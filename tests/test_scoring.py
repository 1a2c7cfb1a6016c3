"""Scoring: votes, judges, pairs and temperatures, by NumPy, by JAX, and beside plain references."""

import doctest
import itertools
import math
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")

from ember_accel import scoring  # noqa: E402
from ember_accel.scoring import (  # noqa: E402
    bradley_terry,
    dawid_skene,
    fit_temperature,
    posterior,
    weighted_vote,
)

ROOT = Path(__file__).parents[1]
RANDOM = np.random.default_rng(0)
CONFUSION = np.array([
    [[0.9, 0.06, 0.04], [0.1, 0.8, 0.1], [0.05, 0.1, 0.85]],
    [[0.8, 0.1, 0.1], [0.15, 0.7, 0.15], [0.1, 0.2, 0.7]],
    [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]],
    [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.25, 0.15, 0.6]],
])  # fmt: skip
PRIOR = np.array([0.5, 0.3, 0.2])


def simulated(confusion: Any, prior: Any, n: int, seed: int, silent: float = 0.1) -> Any:
    """The truth, and the votes of judges who err as they are said to."""
    random = np.random.default_rng(seed)
    truth = random.choice(len(prior), size=n, p=prior)
    judges = np.arange(len(confusion))
    drawn = random.random((n, len(judges), 1)) > confusion[judges, truth[:, None]].cumsum(-1)
    votes = drawn[..., :-1].sum(-1)
    votes[random.random(votes.shape) < silent] = -1
    return truth, votes


VOTES = simulated(CONFUSION, PRIOR, 60, 1)[1]
PAIRS = np.array([pair for pair in RANDOM.integers(5, size=(80, 2)) if pair[0] != pair[1]])
LOGITS = RANDOM.normal(size=(60, 4)) * 3
LABELS = (LOGITS / 2.5 + RANDOM.gumbel(size=LOGITS.shape)).argmax(1)


# ── References: one item at a time, in float64 ───


def shares_by_hand(votes: Any, weights: Any, n_classes: int) -> Any:
    shares = np.zeros((len(votes), n_classes))
    for item, judge in np.ndindex(votes.shape):
        if (vote := votes[item, judge]) >= 0:
            shares[item, vote] += weights[judge] if np.ndim(weights) == 1 else weights[judge, vote]
    total = shares.sum(1, keepdims=True)
    return np.divide(shares, total, out=np.full_like(shares, 1 / n_classes), where=total > 0)


def posterior_by_hand(votes: Any, confusion: Any, prior: Any) -> Any:
    odds = np.tile(prior, (len(votes), 1)).astype(float)
    for item, judge in np.ndindex(votes.shape):
        if votes[item, judge] >= 0:
            odds[item] *= confusion[judge, :, votes[item, judge]]
    return odds / odds.sum(1, keepdims=True)


def judges_by_hand(votes: Any, n_classes: int, steps: int) -> Any:
    truth = shares_by_hand(votes, np.ones(votes.shape[1]), n_classes)
    for _ in range(steps):
        counts = np.tile(np.eye(n_classes) + 1 / n_classes, (votes.shape[1], 1, 1))
        for item, judge in np.ndindex(votes.shape):
            if votes[item, judge] >= 0:
                counts[judge, :, votes[item, judge]] += truth[item]
        prior = (truth.sum(0) + 1 / n_classes) / (len(votes) + 1)
        truth = posterior_by_hand(votes, counts / counts.sum(-1, keepdims=True), prior)
    return truth


def strengths_by_hand(pairs: Any, n: int) -> Any:
    """Hunter's minorisation and maximisation (2004), a thousand times."""
    wins = np.zeros((n, n))
    np.add.at(wins, tuple(pairs.T), 1)
    skill = np.ones(n)
    for _ in range(1000):
        skill = wins.sum(1) / ((wins + wins.T) / (skill[:, None] + skill)).sum(1)
    return np.log(skill) - np.log(skill).mean()


def loss(logits: Any, labels: Any, temperature: float) -> float:
    scaled = logits / temperature
    return float((np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(labels)), labels]).sum())


# ── What is right ───


@pytest.mark.parametrize("weights", [[3.0, 1.0, 0.5, 0.0], RANDOM.random((4, 3))])
def test_a_weighted_vote_is_the_sum_of_the_weights(weights: Any) -> None:
    votes = np.concatenate([VOTES, [[-1, -1, -1, -1], [-1, -1, -1, 2]]])
    expected = shares_by_hand(votes, np.array(weights), 3)
    np.testing.assert_allclose(weighted_vote(votes, weights, 3), expected, atol=1e-12)
    assert weighted_vote(votes[-2], weights, 3).tolist() == [1 / 3] * 3


def test_a_posterior_is_bayes_rule_and_may_be_of_judges_who_never_err() -> None:
    expected = posterior_by_hand(VOTES, CONFUSION, PRIOR)
    np.testing.assert_allclose(posterior(VOTES, CONFUSION, PRIOR), expected, atol=1e-12)
    sure = np.stack([np.eye(2), [[0.5, 0.5], [0.5, 0.5]]])
    np.testing.assert_allclose(posterior([[1, 0]], sure), [[0, 1]], atol=1e-12)
    np.testing.assert_allclose(posterior([[0, 1]], np.stack([np.eye(2)] * 2)), [[0.5, 0.5]])


def test_dawid_skene_takes_the_steps_that_it_says() -> None:
    found = dawid_skene(VOTES, 3, max_iterations=5)
    np.testing.assert_allclose(found.posterior, judges_by_hand(VOTES, 3, 6), atol=1e-12)
    assert not found.converged
    assert found.iterations == 5
    found = dawid_skene(VOTES, 3)
    assert found.converged
    assert 5 < found.iterations < 1000
    again = posterior(VOTES, found.confusion, found.prior)
    np.testing.assert_allclose(again, found.posterior, atol=1e-12)


def errors(confusion: Any, prior: Any, n: int) -> Any:
    """The standard errors of estimates from n votes without the truth, by Fisher's information."""
    judges = len(confusion)
    odds = np.concatenate([[prior[1]], confusion[:, :, 1].ravel()])

    def logs(values: Any) -> Any:
        said = np.stack([1 - values[1:], values[1:]], -1).reshape(judges, 2, 2)
        likely = [
            (1 - values[0], values[0])[c] * np.prod([said[j, c, v] for j, v in enumerate(votes)])
            for votes in itertools.product((0, 1), repeat=judges)
            for c in (0, 1)
        ]
        return np.log(np.reshape(likely, (-1, 2)).sum(1))

    moves = 1e-6 * np.eye(len(odds))
    scores = np.stack([(logs(odds + move) - logs(odds - move)) / 2e-6 for move in moves], -1)
    information = np.einsum("i,ia,ib->ab", np.exp(logs(odds)), scores, scores)
    return np.sqrt(np.diag(np.linalg.inv(information)) / n)


def test_dawid_skene_recovers_judges_within_their_standard_errors() -> None:
    confusion = np.array([
        [[0.9, 0.1], [0.2, 0.8]], [[0.8, 0.2], [0.3, 0.7]], [[0.7, 0.3], [0.1, 0.9]],
        [[0.6, 0.4], [0.4, 0.6]],
    ])  # fmt: skip
    prior = np.array([0.4, 0.6])
    bounds, off, sure, right = errors(confusion, prior, 2000), [], [], []
    for seed in range(12):
        truth, votes = simulated(confusion, prior, 2000, seed, silent=0)
        found = dawid_skene(votes, 2)
        estimates = np.concatenate([[found.prior[1]], found.confusion[:, :, 1].ravel()])
        off.append((estimates - [prior[1], *confusion[:, :, 1].ravel()]) / bounds)
        sure.append(found.posterior.max(1).mean())
        right.append((found.posterior.argmax(1) == truth).mean())
    z = np.abs(off)
    assert 0.90 < (z < 1.96).mean() < 0.99
    assert (z < 3).mean() > 0.98
    assert abs(np.mean(off)) < 0.2
    assert abs(np.mean(sure) - np.mean(right)) < 0.01  # calibrated


def test_bradley_terry_recovers_strengths_within_their_standard_errors() -> None:
    z = []
    for seed in range(30):
        random = np.random.default_rng(seed)
        true = random.normal(size=6)
        true -= true.mean()
        pairs = random.permuted(np.tile(np.arange(6), (900, 1)), axis=1)[:, :2]
        odds = 1 / (1 + np.exp(true - true[:, None]))
        lost = random.random(900) > odds[tuple(pairs.T)]
        pairs[lost] = pairs[lost, ::-1]
        curve = 900 / 15 * odds * odds.T
        bounds = np.sqrt(np.diag(np.linalg.pinv(np.diag(curve.sum(1)) - curve)))
        found = bradley_terry(pairs, 6)
        z.append((found - true) / bounds)
        assert abs(found - bradley_terry(pairs, 6, prior=1e-9)).max() < 0.05 * bounds.min()
    assert 0.90 < (np.abs(z) < 1.96).mean() < 0.99
    assert (np.abs(z) < 3).mean() > 0.98


def test_bradley_terry_is_the_highest_likelihood() -> None:
    found = bradley_terry(PAIRS, 5, prior=1e-9)
    np.testing.assert_allclose(found, strengths_by_hand(PAIRS, 5), atol=1e-6)
    twice = bradley_terry(PAIRS, 5, weights=2.0, prior=0.02)
    np.testing.assert_allclose(twice, bradley_terry(PAIRS, 5), atol=1e-9)
    assert bradley_terry([[0, 1], [1, 0]], 2).tolist() == [0, 0]


def test_a_temperature_has_the_highest_likelihood() -> None:
    found = float(fit_temperature(LOGITS, LABELS))
    for other in (0.99, 1.01):
        assert loss(LOGITS, LABELS, found) < loss(LOGITS, LABELS, found * other)
    assert math.isclose(fit_temperature(LOGITS * 1e5, LABELS), found * 1e5, rel_tol=1e-6)
    assert math.isclose(fit_temperature(LOGITS, np.eye(4)[LABELS]), found, rel_tol=1e-9)
    masked = np.concatenate([LOGITS, np.full((60, 1), -1e9)], 1)
    assert math.isclose(fit_temperature(masked, LABELS), found, rel_tol=1e-3)
    one, two = LOGITS[:, 0], np.stack([0 * LOGITS[:, 0], LOGITS[:, 0]], 1)
    soft = np.linspace(0, 1, 60)
    by_two = fit_temperature(two, np.stack([1 - soft, soft], 1))
    assert math.isclose(fit_temperature(one, soft), by_two, rel_tol=1e-9)


# ── Degenerate input ───


def test_votes_that_say_little_have_answers_all_the_same() -> None:
    alone = dawid_skene([[0], [1], [1], [2]], 3)
    assert alone.posterior.argmax(1).tolist() == [0, 1, 1, 2]
    assert 0.5 < alone.posterior.max(1).min() < alone.posterior.max() < 0.9
    same = dawid_skene(np.zeros((50, 4), int), 3)
    assert same.posterior[:, 0].min() > 0.999
    np.testing.assert_allclose(same.confusion[:, 2, 2], 2 / 3, atol=1e-3)  # nobody voted for it
    silent = np.concatenate([np.tile([[0, 0, -1], [1, 1, -1]], (9, 1)), [[-1, -1, -1]]])
    found = dawid_skene(silent, 2)
    assert found.confusion[2].tolist() == [[0.75, 0.25], [0.25, 0.75]]
    np.testing.assert_allclose(found.posterior[-1], found.prior)
    nothing = dawid_skene(np.zeros((0, 3), int), 2)
    assert nothing.posterior.shape == (0, 2)
    assert nothing.prior.tolist() == [0.5, 0.5]
    tied = dawid_skene([[0, 1]] * 9, 2)
    assert tied.posterior.argmax(1).tolist() == [0] * 9
    assert dawid_skene([[0, 0, 1], [1, 1, 1]], 3, pseudocounts=0).converged


def test_judges_who_were_counted_before_need_no_majority() -> None:
    liars = np.array([[[5.0, 95.0], [95.0, 5.0]]] * 2 + [[[95.0, 5.0], [5.0, 95.0]]])
    found = dawid_skene([[1, 1, 0], [0, 0, 1]], 2, pseudocounts=liars)
    assert found.posterior.argmax(1).tolist() == [0, 1]


def test_pairs_that_say_little_have_strengths_all_the_same() -> None:
    always = bradley_terry([[0, 1]] * 1000 + [[1, 2], [2, 1]], 3)
    assert always.argmax() == 0
    assert always[0] < 20
    apart = bradley_terry([[0, 1], [1, 0], [0, 1], [2, 3]], 5)
    np.testing.assert_allclose([apart[:2].mean(), apart[2:4].mean(), apart[4]], 0, atol=1e-9)
    assert bradley_terry([], 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ([[3.0, 1.0], [1.0, 0.0]], [0, 0], 2e-12),  # always right
        ([[3.0, 1.0], [1.0, 0.0]], [1, 1], 2e6),  # always wrong
        ([[1.0, 1.0], [5.0, 5.0]], [0, 1], 1.0),
        (np.zeros((0, 3)), np.zeros(0, int), 1.0),
    ],
)
def test_a_temperature_without_a_best_is_at_the_bound(
    logits: Any, labels: Any, expected: float
) -> None:
    assert math.isclose(fit_temperature(logits, labels), expected, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: weighted_vote([[0, 2]], [1, 1], 2), "votes[0, 1] is 2, not a whole number"),
        (lambda: weighted_vote([[0.5, 1]], [1, 1], 2), "votes[0, 0] is 0.5, not a whole"),
        (lambda: weighted_vote([[math.nan, 1]], [1, 1], 2), "votes[0, 0] is nan, not a whole"),
        (lambda: weighted_vote([[0, 1]], [1, -1], 2), "weights[1] is -1, not a finite"),
        (lambda: weighted_vote([[0, 1]], [1, 1, 1], 2), "shape (3,), not (2,) or (2, 2)"),
        (lambda: dawid_skene([[0, -2]], 2), "votes[0, 1] is -2"),
        (lambda: dawid_skene([0, 1], 2), "votes has shape (2,), not (items, judges)"),
        (lambda: dawid_skene([[0, 0]], 1), "n_classes is 1"),
        (lambda: dawid_skene([[0, 0]], 2, pseudocounts=-1), "pseudocounts is -1"),
        (lambda: posterior([[0]], np.ones((2, 2, 2))), "shape (2, 2, 2), not (1, 2, 2)"),
        (lambda: bradley_terry([[0, 3]], 3), "pairs[0, 1] is 3, not a whole number from 0 to 2"),
        (lambda: bradley_terry([[0, 1]], 3, weights=[math.inf]), "weights[0] is inf"),
        (lambda: bradley_terry([[0, 1]], 3, prior=0), "prior is 0, not a finite number from 1e-09"),
        (lambda: fit_temperature([[1.0, 2.0]], [2]), "labels[0] is 2, not a whole number"),
        (lambda: fit_temperature([[1.0, math.nan]], [0]), "logits[0, 1] is nan"),
        (lambda: weighted_vote([0, 1], np.array([1, math.inf], "f4"), 2), "weights[1] is inf, not"),
        (lambda: weighted_vote([0, 1], [1e300, 1], 2), "weights[0] is 1e+300, not a finite"),
        (lambda: bradley_terry([[0, 1]], 2, weights=np.array([math.inf], "f2")), "is inf, not"),
        (lambda: fit_temperature(np.array([[1, -math.inf]], "f4"), [0]), "[0, 1] is -inf, not"),
        (lambda: dawid_skene([[0, 1]], 2, pseudocounts=np.float32("inf")), "pseudocounts is inf"),
        (lambda: bradley_terry([], 0), "n is 0, not a whole number from 1"),
        (lambda: bradley_terry([[0, 1]], 2.0), "n is 2.0, not a whole number"),
        (lambda: bradley_terry(0, 2), "pairs has shape (), not"),
        (lambda: weighted_vote(0, [1], 2), "votes has shape ()"),
        (lambda: weighted_vote([0], [1], "2"), "n_classes is '2', not"),
        (lambda: posterior([[0]], 3), "confusion has shape (), not"),
        (lambda: fit_temperature(2.0, 1), "logits has shape ()"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_place(call: Any, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert told in str(caught.value)


@pytest.mark.parametrize("kind", ["f2", "f4"])
def test_narrow_floats_are_what_they_are_in_float64(kind: str) -> None:
    weights, logits = np.array([6e4, 6e4, 1], kind), np.array([[6e4, -6e4], [1, 2]], kind)
    found = weighted_vote([[0, 1, 1]], weights, 2)
    assert found.tolist() == weighted_vote([[0, 1, 1]], weights.astype(float), 2).tolist()
    expected = fit_temperature(logits.astype(float), [0, 0])
    assert fit_temperature(logits, [0, 0]) == expected


@pytest.mark.parametrize("partial", ["jax", "jax.core"])
def test_jax_that_another_thread_imports_is_not_there_yet(
    partial: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("jax")
    if partial == "jax.core":
        vars(module)["core"] = types.ModuleType("jax.core")
    monkeypatch.setitem(sys.modules, "jax", module)
    assert weighted_vote([0, 1], [3.0, 1.0], 2).tolist() == [0.75, 0.25]


def test_votes_that_are_no_numbers_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="votes takes numbers, got"):
        dawid_skene([["a", "b"]], 2)


# ── By JAX ───

CASES = {
    "weighted_vote": [(VOTES, [3.0, 1.0, 0.5, 0.0], 3), (0 * VOTES - 1, [1e30, 1e30, 0, 1], 3)],
    "posterior": [(VOTES, CONFUSION, PRIOR)],
    "dawid_skene": [(VOTES, 3), (0 * VOTES, 3), (0 * VOTES + np.arange(4) % 3, 3)],
    "bradley_terry": [(PAIRS, 5), (0 * PAIRS + [3, 1], 5)],
    "fit_temperature": [(LOGITS, LABELS), (LOGITS * 1e28, LABELS), (0 * LOGITS, LABELS)],
}


@pytest.fixture
def hasty() -> Iterator[None]:
    """A compiler in a hurry."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", CASES)
def test_numpy_and_jax_agree(name: str) -> None:
    jax = pytest.importorskip("jax")
    for case in CASES[name]:
        ours = getattr(scoring, name)(*case, prefer="numpy")
        theirs = getattr(scoring, name)(*case, prefer="jax")
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert isinstance(b, np.ndarray | np.generic)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    if name == "dawid_skene":  # compiled once, however many values it had
        assert scoring._jax(scoring._dawid_skene, 3, 1000)._cache_size() == 1


def test_huge_counts_of_groups_apart_are_finite_in_float32() -> None:
    pytest.importorskip("jax")
    pairs = np.resize([[0, 1], [0, 1], [0, 1], [1, 0], [2, 3], [3, 2]], PAIRS.shape)
    found = bradley_terry(pairs, 5, weights=1e6, prefer="jax")
    np.testing.assert_allclose(found, bradley_terry(pairs, 5, weights=1e6), atol=1e-3)


@pytest.mark.usefixtures("hasty")
def test_gradients_are_the_differences() -> None:
    jax = pytest.importorskip("jax")
    random = np.random.default_rng(2)
    weights, before = random.random(len(PAIRS)), np.eye(3) + 1 / 3
    by_item, by_rank = random.normal(size=(60, 3)), random.normal(size=5)

    def value(weights: Any, before: Any, logits: Any, shares: Any) -> Any:
        found = dawid_skene(VOTES, 3, pseudocounts=before)
        again = posterior(VOTES, found.confusion, found.prior)
        total = (by_item * (found.posterior + again)).sum() / 60
        total += (by_rank * bradley_terry(PAIRS, 5, weights=weights)).sum()
        total += (by_item * weighted_vote(VOTES, shares, 3)).sum() / 60
        return total + fit_temperature(logits, LABELS)

    given = weights, before, LOGITS, random.random((4, 3))
    slopes = jax.jit(jax.grad(value, argnums=(0, 1, 2, 3)))(*given)
    for at, slope in enumerate(slopes):
        move = random.normal(size=given[at].shape)
        more, less = (
            value(*given[:at], given[at] + step * move, *given[at + 1 :]) for step in (1e-3, -1e-3)
        )
        difference = (more - less) / 2e-3
        assert abs(difference) > 1e-3
        np.testing.assert_allclose((slope * move).sum(), difference, rtol=2e-3)


@pytest.mark.usefixtures("hasty")
def test_vmap_adds_a_batch() -> None:
    jax = pytest.importorskip("jax")
    votes = np.stack([VOTES, VOTES[::-1], np.roll(VOTES, 1, axis=1)])
    found = jax.jit(jax.vmap(lambda one: dawid_skene(one, 3)))(votes)
    for at, one in enumerate(votes):
        expected = dawid_skene(one, 3)
        np.testing.assert_allclose(found.posterior[at], expected.posterior, atol=1e-4)
        np.testing.assert_allclose(found.confusion[at], expected.confusion, atol=1e-4)


# ── Around it ───


@pytest.mark.parametrize("name", CASES)
def test_the_example_of_a_docstring_is_right(name: str) -> None:
    call = getattr(scoring, name)
    example = doctest.DocTestParser().get_doctest(call.__doc__, vars(scoring), name, None, 0)
    failed, tried = doctest.DocTestRunner().run(example)
    assert (failed, tried > 0) == (0, True)


def test_it_needs_no_jax() -> None:
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "from ember_accel.scoring import *\n"
        "print(dawid_skene([[0, 0, 1], [1, 1, 1]], 2).posterior.argmax(1), "
        "bradley_terry([[0, 1]], 2).argmax(), fit_temperature([1.0, -1.0], [1, 1]) > 1)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[0 1] 0 True\n", "")


def test_32_three_judges_weighs_better_than_the_majority() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "examples/32_three_judges.py"],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    *judges, majority, weighed = done.stdout.splitlines()
    assert [line.split()[0] for line in judges] == ["careful", "lenient", "hasty"]
    counts = [int(line.split()[1]) for line in (majority, weighed)]
    assert counts[0] + 10 < counts[1] < 480
