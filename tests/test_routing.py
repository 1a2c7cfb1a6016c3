"""Routing: what is predicted, chosen and called, beside a float64 reference, and by JAX."""

import dataclasses
import doctest
import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from conftest import Connect
from hypothesis import given, settings
from hypothesis import strategies as st
from server import WIRES, Answer, Seen, Server, openai_answer
from test_concurrency import on_both

np = pytest.importorskip("numpy")

import ember  # noqa: E402
from ember_accel import curves, routing  # noqa: E402
from ember_accel.curves import cost_quality_curve  # noqa: E402
from ember_accel.routing import (  # noqa: E402
    Router,
    expected_utility,
    fit_router,
    predict_quality,
    route,
    routed,
    style,
)
from ember_accel.state import combine, is_static, partition, restore, save  # noqa: E402

ROOT = Path(__file__).parents[1]
RANDOM = np.random.default_rng(0)
N = 60
ROWS = RANDOM.normal(size=(N, 5))
QUALITY = (RANDOM.random((N, 3)) < 1 / (1 + np.exp(-2 * ROWS[:, :3]))).astype(float)
COST = [1.0, 2.0, 3.0]
PROMPTS = [f"What is {n}? " * (n % 5 + 1) + "\nSay why." * (n % 3) for n in range(N)]
DOMAINS = ["ab"[n % 2] for n in range(N)]
ONE_EACH = np.where(np.arange(N)[:, None] % 3 == np.arange(3), QUALITY, np.nan)
ROUTER = fit_router(
    ROWS, QUALITY, COST, prompts=PROMPTS, domains=DOMAINS, names=["a", "b", "c"], prior=1.0
)
PLAIN = fit_router(ROWS, QUALITY, COST, prior=1.0)
MARKS = style(PROMPTS)
LEAVES = [each.name for each in dataclasses.fields(Router) if not is_static(Router, each.name)]
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def hasty_compiler() -> Iterator[None]:
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    if jax:
        jax.config.update("jax_disable_most_optimizations", False)


def learned(rows: Any = ROWS, quality: Any = QUALITY, cost: Any = COST, **given: Any) -> Router:
    return fit_router(rows, quality, cost, **{"prior": 1.0, **given})


# ── Reference: one prompt at a time, in float64 ───


def softmax(logits: Any) -> Any:
    powers = np.exp(logits - logits.max(initial=-np.inf))
    return powers / powers.sum()


def numbers(router: Router) -> SimpleNamespace:
    """The leaves in float64."""
    found = {name: getattr(router, name) for name in LEAVES}
    return SimpleNamespace(**{k: v if v is None else np.array(v, float) for k, v in found.items()})


def by_hand(leaves: Any, rows: Any, marks: Any = None) -> Any:
    """Clusters, domains, marks with their products, marks within domains; then a logistic model."""
    found = []
    for at, row in enumerate(np.asarray(rows, float)):
        domains = softmax(row @ leaves.domains + leaves.domain_bias)
        features = [*softmax(row @ leaves.clusters + leaves.cluster_bias), *domains]
        if marks is not None:
            z = np.clip((marks[at] - leaves.style_mean) * leaves.style_scale, -3, 3)
            pairs = (np.outer(z, z) / 2)[np.triu_indices(17)]
            features += [*0.1 * (np.array([*z, *pairs]) - leaves.style_usual)]
            features += [*0.3 * np.outer(domains, z).ravel()]
        chance = np.array(features) @ leaves.weights[: len(features)] + leaves.bias
        chance = np.clip(chance, 0.002, 0.998)
        logits = leaves.slope * np.log(chance / (1 - chance)) + leaves.shift
        found.append(1 / (1 + np.exp(-logits)))
    return np.array(found)


def utility_by_hand(leaves: Any, quality: Any, willingness: float) -> float:
    """The mean of what is chosen softly; what is not known is as it was predicted."""
    total, prices = 0.0, np.array(COST) / willingness
    for predicted, known, held in zip(by_hand(leaves, ROWS, MARKS), quality, HELD, strict=True):
        worth = np.where(np.isnan(known), held, known) - prices
        total += softmax((predicted - prices) / 0.1) @ worth
    return total / N


HELD = by_hand(numbers(ROUTER), ROWS, MARKS)


@pytest.mark.parametrize("by", ["numpy", "jax"])
def test_the_prediction_is_that_of_the_reference(by: str) -> None:
    if by == "jax":
        pytest.importorskip("jax")
    for router, prompts, marks in (
        (ROUTER, PROMPTS, MARKS), (ROUTER, None, None), (PLAIN, None, None),
    ):  # fmt: skip
        found = predict_quality(router, ROWS, prompts, prefer=by, fallback=False)
        assert (type(found), found.dtype, found.shape) == (np.ndarray, np.float32, (N, 3))
        np.testing.assert_allclose(found, by_hand(numbers(router), ROWS, marks), atol=2e-6)
    assert predict_quality(ROUTER, ROWS[:0], [], prefer=by).shape == (0, 3)
    assert predict_quality(PLAIN, ROWS[:0]).shape == (0, 3)


def test_parts_of_many_rows_are_predicted_as_few_are() -> None:
    pytest.importorskip("jax")
    rows, marks = np.tile(ROWS, (69, 1))[:4100], np.tile(MARKS, (69, 1))[:4100]
    expected = np.tile(HELD, (69, 1))[:4100]
    for by in ("numpy", "jax"):
        found = predict_quality(ROUTER, rows, marks, prefer=by)
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_rows_may_be_of_any_type_of_number() -> None:
    rows = ROWS.round(2)
    expected = predict_quality(PLAIN, rows)
    for same in (rows.tolist(), rows.astype(np.float32), np.asfortranarray(rows)):
        np.testing.assert_array_equal(predict_quality(PLAIN, same), expected)
        np.testing.assert_allclose(
            predict_quality(learned(same), rows), predict_quality(learned(rows), rows), atol=1e-5
        )
    half = rows.astype(np.float16)
    np.testing.assert_allclose(predict_quality(PLAIN, half), expected, atol=0.02)
    assert predict_quality(PLAIN, half).dtype == np.float32
    whole = predict_quality(PLAIN, np.ones((2, 5), int))
    np.testing.assert_array_equal(whole, predict_quality(PLAIN, np.ones((2, 5))))


def test_prompts_may_be_texts_of_any_kind_or_their_style() -> None:
    expected = predict_quality(ROUTER, ROWS, PROMPTS)
    for same in (tuple(PROMPTS), np.array(PROMPTS), MARKS):
        np.testing.assert_array_equal(predict_quality(ROUTER, ROWS, same), expected)
    assert learned(prompts=np.array(PROMPTS)) == learned(prompts=PROMPTS)


def test_a_mark_that_never_differed_says_nothing() -> None:
    same = MARKS.std(0) < 1e-5
    assert 0 < same.sum() < 17
    expected = predict_quality(ROUTER, ROWS, MARKS)
    np.testing.assert_allclose(predict_quality(ROUTER, ROWS, MARKS + same), expected, atol=1e-5)


ODD = ["", " ", "\n\n", "é你好🎉", "\ud800", "²½Ⅷ", "x" * 50_000, "a b\n" * 9_000, "(((;,.?\"'$\\"]


def test_any_text_has_a_style() -> None:
    marks = style(ODD)
    assert (marks.shape, marks.dtype) == ((len(ODD), 17), np.float32)
    assert np.isfinite(marks).all()
    assert style([]).shape == (0, 17)
    assert (style(["What is 2 + 2?"]) != style(["What is it?"])).any()
    router = learned(prompts=(ODD * N)[:N])
    assert np.isfinite(predict_quality(router, ROWS[: len(ODD)], ODD)).all()


@few
@given(st.lists(st.text(), max_size=4))
def test_the_style_of_a_text_does_not_depend_on_others(texts: list[str]) -> None:
    marks = style(texts)
    assert np.isfinite(marks).all()
    np.testing.assert_array_equal(marks, np.concatenate([style([]), *(style([t]) for t in texts)]))


# ── Logs that say little ───


@pytest.mark.parametrize(
    "given",
    [
        {"quality": ONE_EACH},
        {"quality": np.where(np.arange(N)[:, None] < 10, np.nan, QUALITY)},
        {"quality": ONE_EACH, "prompts": PROMPTS, "domains": DOMAINS},
        {"quality": QUALITY[:, :1], "cost": [1.0]},
        {"rows": ROWS[:, :1]},
        {"rows": ROWS[:, :0]},
        {"rows": ROWS[:2], "quality": QUALITY[:2]},
        {"rows": ROWS[:3], "quality": QUALITY[:3], "domains": [1, 2, 3], "prompts": PROMPTS[:3]},
        {"rows": 0 * ROWS + 7},
        {"rows": ROWS + 1e6},
        {"rows": ROWS * 1e18},
        {"rows": ROWS * 1e-12},
        {"rows": np.repeat(ROWS[:2], 30, 0)},
        {"prompts": ["same"] * N},
        {"prompts": [""] * N},
        {"domains": ["one"] * N},
        {"domains": range(N)},
        {"domains": np.arange(N) % 3},
        {"clusters": 1},
        {"clusters": 10**9},
        {"prior": 1e-9},
        {"prior": 1e30},
        {"cost": [0, 0, 0]},
    ],
    ids="-".join,
)
def test_a_log_that_says_little_gives_a_router_all_the_same(given: dict[str, Any]) -> None:
    router, again = learned(**given), learned(**given)
    rows, prompts = given.get("rows", ROWS), given.get("prompts")
    found = predict_quality(router, rows, prompts)
    assert found.shape == (len(rows), len(given.get("cost", COST)))
    assert ((found > 0) & (found < 1)).all()
    np.testing.assert_array_equal(found, predict_quality(again, rows, prompts))
    known = given.get("quality", QUALITY)
    near = 0.03 if np.isfinite(known).sum() == known.size >= N else 0.35
    np.testing.assert_allclose(found.mean(0), np.nanmean(known, 0), atol=near)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_quality_that_never_differs_is_what_is_predicted(value: float) -> None:
    found = predict_quality(learned(quality=np.full((N, 3), value)), ROWS)
    np.testing.assert_allclose(found, value, atol=0.02)


def test_rows_far_from_all_that_was_seen_are_predicted_in_bounds() -> None:
    for scale in (1e10, 1e30):
        found = predict_quality(PLAIN, scale * ROWS)
        assert ((found > 0) & (found < 1)).all()


@pytest.mark.parametrize("seed", range(4))
def test_one_dimension_is_enough_to_tell_two_sides_apart(seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(N, 1))
    router = learned(rows, np.hstack([rows > 0, rows < 0]), [1, 1], prior=0.1)
    assert route(router, [[1.0], [-1.0]], willingness=1).tolist() == [0, 1]


# ── Wrong values ───


def holed(value: float, at: int = 7) -> Any:
    return np.where(np.arange(N)[:, None] == at, value, ROWS)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: learned(ROWS[0]), "embeddings (5,) and quality (60, 3) do not fit"),
        (lambda: learned(quality=QUALITY[:, 0]), "embeddings (60, 5) and quality (60,) do not"),
        (lambda: learned(quality=QUALITY[:4]), "quality (4, 3) do not fit. Give (n, d) and (n, m)"),
        (lambda: learned(ROWS[:1], QUALITY[:1]), "n of 2 or more"),
        (lambda: learned(ROWS[:0], QUALITY[:0]), "n of 2 or more"),
        (lambda: learned(quality=QUALITY[:, :0]), "do not fit"),
        (lambda: learned(holed(math.nan)), "embeddings[7] is wrong"),
        (lambda: learned(holed(-math.inf)), "embeddings[7] is wrong"),
        (lambda: learned(quality=QUALITY * 1.5 * (np.arange(N)[:, None] > 50)), "quality[5"),
        (lambda: learned(quality=QUALITY - (np.arange(N)[:, None] == 4)), "quality[4] is wrong"),
        (lambda: learned(quality=QUALITY + math.inf), "quality[0] is wrong"),
        (lambda: learned(quality=QUALITY * [1, np.nan, 1]), "of model 1, fewer than 2 outcomes"),
        (lambda: learned(cost=[1, -1, 2]), "cost[1] is wrong. Give finite numbers, costs of 0 or"),
        (lambda: learned(cost=[1, 2, math.nan]), "of model 2, fewer than 2"),
        (lambda: learned(cost=[math.inf, 2, 2]), "cost[0] is wrong"),
        (lambda: learned(cost=np.full((N, 3), -1)), "cost[0] is wrong"),
        (lambda: learned(cost=1.0), "cost has the shape (). Give (3,) or (60, 3)"),
        (lambda: learned(cost=[1.0, 2.0]), "cost has the shape (2,). Give (3,) or (60, 3)"),
        (lambda: learned(prompts=PROMPTS[:3]), "prompts are 3 for 60 rows"),
        (lambda: learned(domains=DOMAINS[:3]), "domains are 3 for 60 rows"),
        (lambda: learned(names=["a"]), "names=['a'] must be 3 different names"),
        (lambda: learned(names="abc"), "names='abc' must be 3 different names"),
        (lambda: learned(names=["a", "a", "b"]), "must be 3 different names"),
        (lambda: learned(clusters=0), "clusters=0"),
        (lambda: learned(prior=0), "prior=0"),
        (lambda: learned(prior=math.nan), "prior=nan"),
        (lambda: predict_quality(PLAIN, ROWS[0]), "shape (5,), not (n, 5): a row for a prompt"),
        (lambda: predict_quality(PLAIN, ROWS[:, :4]), "shape (60, 4), not (n, 5)"),
        (lambda: predict_quality(PLAIN, holed(math.nan)), "embeddings[7] is not finite"),
        (lambda: predict_quality(PLAIN, ROWS, PROMPTS), "was learned without prompts"),
        (lambda: predict_quality(ROUTER, ROWS, PROMPTS[:4]), "4 prompts for 60 embeddings"),
        (lambda: predict_quality(ROUTER, ROWS, MARKS[:, :3]), "60 prompts for 60 embeddings"),
        (lambda: predict_quality(ROUTER, ROWS, MARKS[:3]), "3 prompts for 60 embeddings"),
        (lambda: route(PLAIN, ROWS, willingness=0), "willingness=0 must be above 0"),
        (lambda: route(PLAIN, ROWS, willingness=-1), "willingness=-1 must be above 0"),
        (lambda: route(PLAIN, ROWS, willingness=math.nan), "willingness=nan must be above 0"),
        (lambda: expected_utility(PLAIN, ROWS, QUALITY[:1], willingness=1), "quality has the"),
        (lambda: expected_utility(PLAIN, ROWS, QUALITY[:, :1], willingness=1), "(60, 1), not (60,"),
        (lambda: expected_utility(PLAIN, ROWS, QUALITY, willingness=0), "willingness=0"),
        (lambda: cost_quality_curve(PLAIN, ROWS, ONE_EACH), "row 0 is not known. Give rows in"),
        (lambda: cost_quality_curve(PLAIN, ROWS, ONE_EACH[[0]]), "quality"),
        (lambda: cost_quality_curve(PLAIN, ROWS[:1], QUALITY), "quality"),
        (lambda: cost_quality_curve(PLAIN, ROWS, QUALITY, willingness=[1, 0]), "willingness"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(call: Any, told: str) -> None:
    with pytest.raises(ValueError) as caught, np.errstate(all="ignore"):
        call()
    assert told in str(caught.value)


@pytest.mark.parametrize("prompts", ["a" * N, [None] * N, [1] * N, [b"a"] * N])
def test_prompts_that_are_no_list_of_texts_are_a_type_error(prompts: Any) -> None:
    for call in (lambda: predict_quality(ROUTER, ROWS, prompts), lambda: style(prompts)):
        with pytest.raises(TypeError, match="is no list of texts"):
            call()
    with pytest.raises(TypeError, match=r"prompts=.*list of"):
        learned(prompts=prompts)


def test_a_text_is_no_list_of_domains() -> None:
    with pytest.raises(TypeError, match=r"domains='aa.* is a text"):
        learned(domains="a" * N)


# ── What is learned ───

CENTRES, MODELS = 3 * RANDOM.normal(size=(6, 8)), 3
CHANCES = RANDOM.uniform(0.1, 0.9, size=(6, MODELS))


def log(n: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """Which of six subjects prompts are of, their rows, how likely answers are right, and which."""
    random = np.random.default_rng(seed)
    subject = random.integers(6, size=n)
    rows = CENTRES[subject] + random.normal(size=(n, 8))
    return subject, rows, CHANCES[subject], (random.random((n, MODELS)) < CHANCES[subject]) * 1.0


SUBJECTS, SEEN, _, OUTCOMES = log(1500, 1)
_, NEW, LIKELY, _ = log(1500, 2)


@pytest.mark.parametrize("domains", [None, SUBJECTS.tolist()], ids=["clusters", "domains"])
def test_predictions_are_calibrated_and_find_what_prompts_have_in_common(domains: Any) -> None:
    found = predict_quality(fit_router(SEEN, OUTCOMES, COST, domains=domains), NEW)
    np.testing.assert_allclose(found.mean(0), LIKELY.mean(0), atol=0.04)
    gaps = [
        abs((found - LIKELY)[chosen].sum())
        for model in range(MODELS)
        for low in np.arange(0, 1, 0.1)
        if (chosen := (found[:, model] // 0.1 == low // 0.1, model))
    ]
    assert sum(gaps) / found.size < 0.05  # the expected calibration error
    assert np.abs(found - LIKELY).mean() < 0.3 * np.abs(LIKELY - LIKELY.mean(0)).mean()


def test_where_each_prompt_was_asked_of_one_model_the_same_is_learned() -> None:
    shown = np.arange(1500)[:, None] % 3 == np.arange(3)
    router = fit_router(SEEN, np.where(shown, OUTCOMES, np.nan), COST, domains=SUBJECTS)
    found = predict_quality(router, NEW)
    assert np.abs(found - LIKELY).mean() < 0.5 * np.abs(LIKELY - LIKELY.mean(0)).mean()


def test_domains_that_no_prompt_tells_are_not_believed() -> None:
    random = np.random.default_rng(5)
    rows, domains = random.normal(size=(400, 60)), random.integers(2, size=200)
    router = fit_router(rows[:200], np.eye(2)[domains], [1, 1], domains=domains, prior=10)
    assert np.abs(predict_quality(router, rows[200:]) - 0.5).mean() < 0.15


def test_the_router_is_worth_more_than_any_single_model() -> None:
    router = fit_router(SEEN, OUTCOMES, [0.1, 0.2, 0.3])
    for willingness in (0.5, 2.0, math.inf):
        value = LIKELY - np.array([0.1, 0.2, 0.3]) / willingness
        chosen = value[np.arange(1500), route(router, NEW, willingness=willingness)].mean()
        alone, best = value.mean(0).max(), value.max(1).mean()
        assert chosen > alone + 0.7 * (best - alone) > alone + 0.01


@pytest.mark.parametrize("seed", range(3))
def test_prompts_that_come_again_and_again_are_learned_whatever_their_chances(seed: int) -> None:
    random, chances = np.random.default_rng(seed), np.linspace(0.02, 0.98, 10)
    kinds = np.arange(3000) % 10
    right = random.random((3000, 1)) < chances[kinds][:, None]
    router = fit_router(np.eye(10)[kinds], right * 1.0, [1.0])
    seen = np.array([right[kinds == kind].mean() for kind in range(10)])
    np.testing.assert_allclose(predict_quality(router, np.eye(10))[:, 0], seen, atol=0.03)


def test_the_rarest_of_very_many_domains_count_as_one() -> None:
    random = np.random.default_rng(0)
    rows, labels = random.normal(size=(400, 4)), [*range(200), *[0, 1] * 100]
    router = fit_router(rows, random.random((400, 2)), [1, 2], domains=labels)
    assert router.domains.shape == (4, 100)


@pytest.mark.parametrize("hole", [None, math.nan])
def test_a_domain_that_is_unknown_is_named(hole: Any) -> None:
    labels = ["a", "b", hole, *["a"] * (N - 3)]
    with pytest.raises(ValueError, match=f"domains.2. is {hole}. Give it a label"):
        learned(domains=labels)


def test_domains_may_be_any_labels_also_texts_that_look_like_holes() -> None:
    for pair in (("None", "nan"), ((1, "a"), (2, "b")), (1, "1"), (np.str_("a"), "b")):
        labels = [pair[at % 2] for at in range(N)]
        assert learned(domains=labels).domains.shape[1] == 2
    assert learned(domains=np.arange(N) % 2) == learned(domains=(np.arange(N) % 2).tolist())


def test_a_router_is_loaded_by_its_class_in_a_process_that_has_none(tmp_path: Path) -> None:
    save(ROUTER, tmp_path / "router.npz")
    assert restore(Router, tmp_path / "router.npz") == ROUTER


def test_how_a_prompt_is_written_is_used_where_only_that_tells() -> None:
    random = np.random.default_rng(3)
    rows, is_long = random.normal(size=(600, 4)), np.arange(600) % 2
    texts = [f"What is {n}?" + " It matters (a lot); so think." * (n % 2) for n in range(600)]
    right = random.random((600, 2)) < np.where(is_long[:, None], [0.2, 0.8], [0.8, 0.2])
    router = fit_router(rows, right * 1.0, [1, 1], prompts=texts)
    assert (route(router, rows, texts, willingness=1) == is_long).all()
    found = predict_quality(router, rows, texts)
    assert np.abs(found - np.where(is_long[:, None], [0.2, 0.8], [0.8, 0.2])).mean() < 0.1
    usual = predict_quality(router, rows)
    assert np.abs(usual - 0.5).mean() < 0.1


def test_within_a_domain_the_way_of_writing_may_tell_the_opposite() -> None:
    random = np.random.default_rng(4)
    domain, is_long = np.arange(800) // 400, np.arange(800) % 2
    rows = random.normal(size=(800, 4)) * 0.3 + np.where(domain, 1, -1)[:, None]
    texts = [f"What is {n}?" + " Think of it (twice)." * (n % 2) for n in range(800)]
    right = random.random((800, 1)) < np.where(domain == is_long, 0.9, 0.1)[:, None]
    router = fit_router(rows, right * 1.0, [1], prompts=texts, domains=domain)
    found = predict_quality(router, rows, texts)[:, 0]
    assert found[domain == is_long].min() > 0.6
    assert found[domain != is_long].max() < 0.4


# ── It is a state ───


def test_the_same_arguments_give_the_same_router() -> None:
    again = fit_router(
        ROWS, QUALITY, COST, prompts=PROMPTS, domains=DOMAINS, names=["a", "b", "c"], prior=1.0
    )
    assert again == ROUTER
    assert again != dataclasses.replace(ROUTER, bias=ROUTER.bias + 1)
    assert learned(cost=np.tile(COST, (N, 1))) == PLAIN


def test_a_router_is_taken_apart_and_written_and_comes_back(tmp_path: Path) -> None:
    dynamic, static = partition(ROUTER)
    assert combine(dynamic, static) == ROUTER
    assert {name for name in LEAVES if getattr(dynamic, name) is None} == set()
    assert {each.name for each in dataclasses.fields(Router)} - {*LEAVES} == {"cost", "names"}
    assert (static.names, static.cost) == (("a", "b", "c"), (1.0, 2.0, 3.0))
    for router in (ROUTER, PLAIN):
        save(router, tmp_path / "router.npz")
        like = dataclasses.replace(router, bias=0 * router.bias)
        assert restore(like, tmp_path / "router.npz") == router != like


# ── Route ───


def test_a_route_is_the_best_of_quality_less_cost() -> None:
    predicted = predict_quality(ROUTER, ROWS, PROMPTS)
    for willingness in (0.5, 5.0, 8.0, 30.0, math.inf):
        chosen = route(ROUTER, ROWS, PROMPTS, willingness=willingness)
        assert (chosen.shape, chosen.dtype.kind) == ((N,), "i")
        value = predicted - np.array(COST) / willingness
        np.testing.assert_array_equal(chosen, value.argmax(1))
    assert len({*chosen.tolist()}) == 3
    assert route(ROUTER, ROWS[:0], willingness=1).shape == (0,)


@pytest.mark.parametrize("willingness", [1e-3, 1e-42, 1e-300, 5e-324])
@pytest.mark.parametrize("cost", [[3.0, 2.0, 1.0], [2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
def test_who_would_pay_nothing_gets_the_cheapest(cost: list[float], willingness: float) -> None:
    router = dataclasses.replace(PLAIN, cost=cost)
    chosen = route(router, ROWS, willingness=willingness)
    if any(cost):
        assert set(chosen.tolist()) == {cost.index(min(cost))}
    else:
        np.testing.assert_array_equal(chosen, predict_quality(router, ROWS).argmax(1))
    assert np.isfinite(expected_utility(router, ROWS, QUALITY, willingness=willingness))


@pytest.mark.parametrize("cost", [(1.0, 2.0, 3.0), (3.0, 1.0, 1.0), (2.0, 2.0, 0.0)])
def test_of_equals_the_cheapest_is_asked_and_of_these_the_first(cost: Any) -> None:
    same = dataclasses.replace(PLAIN, slope=0 * PLAIN.slope, shift=0 * PLAIN.shift, cost=cost)
    for willingness in (math.inf, 1e9, 1):
        found = route(same, ROWS, willingness=willingness)
        assert set(found.tolist()) == {cost.index(min(cost))}


def test_the_utility_is_the_mean_of_soft_choices() -> None:
    for quality in (QUALITY, ONE_EACH, np.full((N, 3), np.nan)):
        found = expected_utility(ROUTER, ROWS, quality, PROMPTS, willingness=8.0)
        expected = utility_by_hand(numbers(ROUTER), quality, 8.0)
        assert abs(float(found) - expected) < 1e-5
    listed = expected_utility(ROUTER, ROWS, QUALITY.tolist(), PROMPTS, willingness=8.0)
    assert listed == expected_utility(ROUTER, ROWS, QUALITY, PROMPTS, willingness=8.0)
    sharp = expected_utility(ROUTER, ROWS, QUALITY, PROMPTS, willingness=8.0, temperature=1e-6)
    chosen = route(ROUTER, ROWS, PROMPTS, willingness=8.0)
    value = QUALITY - np.array(COST) / 8.0
    assert abs(float(sharp) - value[np.arange(N), chosen].mean()) < 1e-4


# ── By JAX ───

traces = list[float]()


@pytest.fixture(scope="module")
def slopes() -> Any:
    """The value and the gradient of the utility, compiled once for each willingness."""
    jax = pytest.importorskip("jax")

    def utility(router: Any, quality: Any, marks: Any, willingness: float) -> Any:
        traces.append(willingness)
        return expected_utility(router, ROWS, quality, marks, willingness=willingness)

    return jax.jit(jax.value_and_grad(utility), static_argnums=3)


def test_the_gradient_reaches_all_that_is_learned_and_is_the_difference(slopes: Any) -> None:
    for quality, names in ((QUALITY, LEAVES), (ONE_EACH, LEAVES[:3])):
        value, slope = slopes(ROUTER, quality, MARKS, 8.0)
        assert abs(float(value) - utility_by_hand(numbers(ROUTER), quality, 8.0)) < 1e-5
        assert (slope.cost, slope.names) == (ROUTER.cost, ROUTER.names)
        for name in names:
            found = np.asarray(getattr(slope, name))
            assert np.isfinite(found).all()
            assert np.abs(found).max() > 0
            at = np.unravel_index(np.abs(found).argmax(), found.shape)
            both = []
            for move in (1e-5, -1e-5):
                leaves = numbers(ROUTER)
                getattr(leaves, name)[at] += move
                both.append(utility_by_hand(leaves, quality, 8.0))
            np.testing.assert_allclose(found[at], (both[0] - both[1]) / 2e-5, rtol=0.01, atol=2e-6)


def test_steps_along_the_gradient_raise_the_utility_and_compile_once(slopes: Any) -> None:
    router, values = ROUTER, list[float]()
    slopes(router, QUALITY, MARKS, 8.0)
    before = len(traces)
    for _ in range(10):
        value, slope = slopes(router, QUALITY, MARKS, 8.0)
        steps = {name: 0.1 * np.asarray(getattr(slope, name)) for name in LEAVES}
        moved = {name: getattr(router, name) + step for name, step in steps.items()}
        router = dataclasses.replace(router, **moved)
        values.append(float(value))
    assert values == sorted(values)
    assert values[-1] > values[0] + 1e-3
    assert len(traces) == before


def test_what_nobody_knows_gives_no_gradient_by_itself(slopes: Any) -> None:
    value, slope = slopes(ROUTER, np.full((N, 3), np.nan), MARKS, 8.0)
    assert math.isfinite(value)
    assert all(np.isfinite(getattr(slope, name)).all() for name in LEAVES)


def test_a_router_without_domains_and_prompts_has_a_gradient_too(slopes: Any) -> None:
    _, slope = slopes(PLAIN, QUALITY, None, 8.0)
    found = {name: getattr(slope, name) for name in LEAVES}
    reached = {name for name, leaf in found.items() if leaf is not None and leaf.size}
    assert reached == {name for name in LEAVES if not name.startswith("style")}
    assert all(0 < np.abs(found[name]).max() < math.inf for name in reached)


def test_results_lie_where_the_arguments_do() -> None:
    jax = pytest.importorskip("jax")
    there = jax.numpy.asarray(ROWS)
    found = predict_quality(ROUTER, there, PROMPTS)
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(found, predict_quality(ROUTER, ROWS, PROMPTS), atol=2e-6)
    chosen = route(ROUTER, there, PROMPTS, willingness=8.0)
    assert isinstance(chosen, jax.Array)
    assert isinstance(expected_utility(ROUTER, there, QUALITY.tolist(), willingness=8.0), jax.Array)
    assert isinstance(predict_quality(ROUTER, ROWS, PROMPTS), np.ndarray)


# ── Routed ───

WHERE = [int(route(PLAIN, ROWS, willingness=math.inf).tolist().index(model)) for model in range(3)]


def vectors(texts: list[str]) -> Any:
    """Rows that lead to the model whose number stands last in the text."""
    return ROWS[[WHERE[int(text[-1])] for text in texts]]


async def later(texts: list[str]) -> list[list[float]]:
    """The same, as an embedding model gives them."""
    await anyio.lowlevel.checkpoint()
    rows: list[list[float]] = vectors(texts).tolist()
    return rows


def three(calls: list[Any], **more: Any) -> dict[str, Any]:
    """Three functions that note how they are called."""

    def make(name: str) -> Any:
        async def ask(prompt: Any, *, system: str | None = None) -> str:
            calls.append((name, prompt, system))
            await anyio.lowlevel.checkpoint()
            return f"{name}: {prompt}"

        return ask

    return {name: make(name) for name in "abc"} | more


NAMED = dataclasses.replace(PLAIN, names=("a", "b", "c"))


@on_both
async def test_the_model_that_is_chosen_is_called_once_with_what_was_given() -> None:
    for embed in (vectors, later):
        calls = list[Any]()
        models = dict(reversed(three(calls).items()))  # names count, not their order
        ask = routed(NAMED, models, embed)
        for number, name in enumerate("abc"):
            assert await ask(f"to {number}", system="short") == f"{name}: to {number}"
            assert await ask(prompt=f"to {number}") == f"{name}: to {number}"
            assert await ask(system="of 9", prompt=f"to {number}") == f"{name}: to {number}"
            assert [call[0] for call in calls] == [name] * 3
            assert [call[2] for call in calls] == ["short", None, "of 9"]
            calls.clear()


async def test_without_names_the_order_counts_and_the_worth_of_an_answer_does() -> None:
    calls = list[Any]()
    assert await routed(PLAIN, three(calls), vectors)("to 2") == "c: to 2"
    assert await routed(PLAIN, three(calls), vectors, willingness=1e-3)("to 2") == "a: to 2"


async def test_messages_and_replies_are_routed_by_their_text() -> None:
    texts, calls = list[list[str]](), list[Any]()

    def embed(given: list[str]) -> Any:
        texts.append(given)
        return ROWS[:1]

    ask = routed(NAMED, three(calls), embed)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "Two"}, {"type": "image_url"}]},
    ]
    given = [messages, tuple(messages), "Three", 4, messages[:1]]
    for one in given:
        await ask(one)
    assert texts == [["One\n\nTwo"], ["One\n\nTwo"], ["Three"], ["4"], [""]]
    assert [call[1] for call in calls] == given


async def test_prompts_are_judged_by_their_style_where_that_was_learned() -> None:
    is_long = np.arange(N) % 2
    texts = ["Why? " * (1 + 9 * (n % 2)) for n in range(N)]
    router = learned(0 * ROWS, np.stack([1 - is_long, is_long], 1), [1, 1], prompts=texts)
    calls = list[Any]()
    models = {name: fn for name, fn in three(calls).items() if name != "c"}
    ask = routed(router, models, lambda texts: [[0.0] * 5])
    await ask("Why?")
    await ask("Why? " * 10)
    assert [call[0] for call in calls] == ["a", "b"]


@on_both
async def test_the_failure_of_a_model_or_of_the_embedding_is_the_callers() -> None:
    async def fails(prompt: str) -> str:
        raise OSError(f"no line for {prompt}")

    async def no_vectors(texts: list[str]) -> Any:
        raise LookupError("no vectors")

    calls = list[Any]()
    with pytest.raises(OSError, match="no line for to 1"):
        await routed(NAMED, three(calls, b=fails), vectors)("to 1")
    with pytest.raises(LookupError, match="no vectors"):
        await routed(NAMED, three(calls), no_vectors)("to 1")
    for wrong in ([0.0] * 5, [[0.0] * 4], ROWS[:2], ROWS[:0], [[math.nan] * 5]):
        with pytest.raises(ValueError):
            await routed(NAMED, three(calls), lambda texts, wrong=wrong: wrong)("to 1")
    assert calls == []


async def test_a_wrong_call_is_a_type_error_and_asks_nobody() -> None:
    calls = list[Any]()
    ask = routed(NAMED, three(calls), lambda texts: calls.append(texts) or ROWS[:1])
    for wrong in (ask, lambda: ask("a", "b"), lambda: ask("a", colour=1)):
        with pytest.raises(TypeError):
            await wrong()
    with pytest.raises(TypeError, match="the prompt is None"):
        await ask(None)
    assert calls == []


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: routed(NAMED, {"a": later, "b": later}, later), ember.SetupError, "a, b, c"),
        (lambda: routed(NAMED, dict.fromkeys("abd", later), later), ember.SetupError, "a, b, d"),
        (lambda: routed(PLAIN, dict.fromkeys("ab", later), later), ember.SetupError, "knows 3"),
        (lambda: routed(NAMED, dict.fromkeys("abc", print), later), TypeError, "async function"),
        (lambda: routed(NAMED, dict.fromkeys("abc", later), None), TypeError, "embed=None"),
        (lambda: routed(NAMED, dict.fromkeys("abc", later), later, willingness=0), ValueError, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_routed_is_told_at_once(make: Any, error: Any, told: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert told in str(caught.value)


OPENAI = WIRES["openai"]


def served(seen: Seen) -> Answer:
    """Vectors, a verdict by a schema, or else the name of the model that is asked."""
    body = seen.json
    if seen.path.endswith("/embeddings"):
        rows = [[*map(float, row)] for row in vectors(body["input"])]
        data = [{"index": n, "embedding": row} for n, row in enumerate(rows)]
        return Answer({"data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}})
    if "response_format" in body:
        scores = {"answer_1": 3, "answer_2": 8}
        return Answer(openai_answer(json.dumps({"reason": body["model"], "scores": scores})))
    return Answer(openai_answer(body["model"]))


@on_both
async def test_models_are_routed_by_the_vectors_of_an_embedding_model(
    server: Server, connect: Connect
) -> None:
    base = connect(OPENAI)
    models = {name: dataclasses.replace(base, id=f"model-{n}") for n, name in enumerate("abc")}
    server.play(served)
    ask = routed(NAMED, models, base.embed)
    with ember.track() as ledger:
        reply = await ask("to 1", temperature=0.5)
    assert isinstance(reply, ember.Reply)
    assert (reply.text, ledger.requests) == ("model-1", 2)
    paths = [seen.path.rpartition("/")[2] for seen in server.requests]
    assert paths == ["embeddings", "completions"]
    assert server.requests[1].json["temperature"] == 0.5
    again = await ask(reply)  # a reply is a prompt
    assert again.text == "model-1"
    assert server.requests[2].json["input"] == ["model-1"]
    judge = ember.judge(routed(NAMED, models, lambda texts: vectors(["2"])))
    verdict = await judge("Who?", ["x", "y"])
    assert (sorted(verdict.scores), verdict.reason) == ([3, 8], "model-2")
    server.play(Answer({"error": {"message": "no"}}, status=401))
    with pytest.raises(ember.CallError):
        await ask("to 1")
    assert len(server.requests) == 1  # the embedding has failed, and nobody was asked


async def test_it_stands_wherever_a_model_does(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))
    calls = list[Any]()
    ask = routed(NAMED, three(calls), vectors)
    assert await ember.ensemble(ask, n=2)("to 0") == ["a: to 0"] * 2
    assert await ember.fallback(ask, ask)("to 1") == "b: to 1"
    limited = ember.limit(concurrency=1)(ask)
    assert await ember.parallel(limited, ["to 0", "to 2"]) == ["a: to 0", "c: to 2"]
    assert await ember.retry(ask)("to 2") == "c: to 2"
    assert len(calls) == 6
    kept = ember.cache(ask)
    assert [await kept("to 1"), await kept("to 1")] == ["b: to 1"] * 2
    assert len(calls) == 7
    broken = list[int]()

    async def breaks_once(prompt: str, *, system: str | None = None) -> str:
        broken.append(1)
        if len(broken) == 1:
            raise ConnectionError("once")
        return "well"

    sturdy = ember.retry(routed(NAMED, three(calls, a=breaks_once), vectors), wait=0)
    assert (await sturdy("to 0"), len(broken)) == ("well", 2)


# ── Curves ───


@few
@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=5), st.booleans())
def test_a_curve_is_the_mean_of_what_is_chosen(tried: list[float], is_own: bool) -> None:
    paid = RANDOM.random((N, 3)) if is_own else np.tile(COST, (N, 1))
    curve = cost_quality_curve(
        ROUTER, ROWS, QUALITY, paid if is_own else None, prompts=PROMPTS, willingness=tried
    )
    for at, willingness in enumerate(sorted(tried)):
        chosen = route(ROUTER, ROWS, PROMPTS, willingness=willingness).tolist()
        assert curve.willingness[at] == willingness
        assert math.isclose(curve.cost[at], sum(paid[n, m] for n, m in enumerate(chosen)) / N)
        assert math.isclose(curve.quality[at], sum(QUALITY[n, m] for n, m in enumerate(chosen)) / N)
    for at, name in enumerate("abc"):
        np.testing.assert_allclose(curve.alone[name], [paid[:, at].mean(), QUALITY[:, at].mean()])


def test_a_curve_goes_from_the_cheapest_to_the_best() -> None:
    curve = cost_quality_curve(ROUTER, ROWS, QUALITY, prompts=PROMPTS)
    assert len(curve.willingness) == len(curve.cost) == len(curve.quality) == 40
    assert curve.cost[0] == 1.0
    best = predict_quality(ROUTER, ROWS, PROMPTS).argmax(1)
    assert curve.quality[-1] == QUALITY[np.arange(N), best].mean()
    assert (np.diff(curve.cost) >= 0).all()
    assert len(cost_quality_curve(learned(cost=[2, 2, 2]), ROWS, QUALITY).cost) == 40
    lines = str(cost_quality_curve(ROUTER, ROWS, QUALITY, willingness=[1e-3, 2.5])).splitlines()
    assert lines[0].split() == ["willingness", "cost", "quality"]
    assert lines[1].split() == ["0.001", "1", f"{QUALITY[:, 0].mean():.3f}"]
    assert [line.split()[0] for line in lines[3:]] == ["a", "b", "c"]
    assert lines[4].split()[1:] == ["2", f"{QUALITY[:, 1].mean():.3f}"]
    assert len({len(line) for line in lines}) == 1


@few
@given(
    st.lists(st.text(min_size=1), min_size=3, max_size=3, unique=True),
    st.lists(st.floats(0, 1e6), min_size=3, max_size=3),
)
def test_a_picture_is_well_formed_and_has_each_model(names: list[str], cost: list[float]) -> None:
    router = dataclasses.replace(PLAIN, names=names, cost=cost)
    curve = cost_quality_curve(router, ROWS, QUALITY, willingness=[0.1, 1, 10])
    root = ET.fromstring(curve.svg(300, 200).encode("utf-8", "replace"))
    tags = [each.tag.rpartition("}")[2] for each in root.iter()]
    assert tags.count("circle") == 3
    assert tags.count("polyline") == 1
    places = [(float(each.get("cx")), float(each.get("cy")))  # type: ignore[arg-type]
              for each in root.iter() if "cx" in each.attrib]  # fmt: skip
    assert all(0 <= x <= 300 and 0 <= y <= 200 for x, y in places)
    if all(name.isalnum() for name in names):
        assert {*names} <= {each.text for each in root.iter()}


def test_names_in_a_picture_are_texts_whatever_is_in_them() -> None:
    names = ['<b>"&\'', "x]]>", "é你"]
    picture = cost_quality_curve(dataclasses.replace(PLAIN, names=names), ROWS, QUALITY).svg()
    assert {*names} < {each.text for each in ET.fromstring(picture).iter()}


# ── Around it ───

NAMES = ["style", "fit_router", "_numpy_quality", "route", "expected_utility", "cost_quality_curve"]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_docstring_is_right(name: str) -> None:
    names = {**vars(routing), **vars(curves)}
    example = doctest.DocTestParser().get_doctest(names[name].__doc__, names, name, None, 0)
    failed, tried = doctest.DocTestRunner().run(example)
    assert (failed, tried > 0) == (0, True)


PROGRAM = """
import asyncio, sys
{before}
import numpy as np
from ember_accel.curves import cost_quality_curve
from ember_accel.routing import expected_utility, fit_router, predict_quality, route, routed
from ember_accel.state import partition

rows, good = np.eye(40), np.eye(2)[np.arange(40) % 2]
texts = ["Why? " * (1 + n % 2) for n in range(40)]
router = fit_router(rows, good, [1, 2], prompts=texts, domains=["a", "b"] * 20, prior=0.1)
async def one(prompt): return "one"
async def two(prompt): return "two"
ask = routed(router, {{"one": one, "two": two}}, lambda texts: rows[:1])
print(asyncio.run(ask("Why? ")), predict_quality(router, rows, texts).shape,
      route(router, rows[:2], texts[:2], willingness=10.0),
      expected_utility(router, rows, good, willingness=10.0) < 1,
      len(cost_quality_curve(router, rows, good).svg()) > 500, partition(router)[1].cost)
print({after})
"""


@pytest.mark.parametrize(
    ("before", "after"), [("", "'jax' in sys.modules"), ("sys.modules['jax'] = None", "False")],
    ids=["cold", "absent"],
)  # fmt: skip
def test_it_neither_needs_jax_nor_imports_it(before: str, after: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(before=before, after=after)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == "one (40, 2) [0 1] True True (1.0, 2.0)\nFalse\n"
