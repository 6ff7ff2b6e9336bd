"""Intervals that hold the truth as often as they say, on questions that hang together."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq

from toolpost.bench.bfcl import CATEGORIES, GROUPS, cluster, questions, sample_ids
from toolpost.core import stats
from toolpost.core.stats import (
    Group,
    Recovery,
    difference,
    holm,
    interval,
    mcnemar,
    recovery,
    share,
    wilson,
)

Floats = NDArray[np.float64]
Sizes = NDArray[np.int64]

# Simulated clusters: each has a chance of its own, drawn around p with an intra-cluster correlation


def beta_binomial(rng: np.random.Generator, p: float, icc: float, shape: tuple[int, ...]) -> Floats:
    if not icc:
        return np.full(shape, p)
    return rng.beta(p * (1 / icc - 1), (1 - p) * (1 / icc - 1), shape)


@functools.cache
def _intercept(p: float, icc: float) -> tuple[float, float]:
    """Find mean and deviation of a normal intercept that gives p and this correlation."""
    x = np.linspace(-6, 6, 241)
    w = np.exp(-x * x / 2) / np.exp(-x * x / 2).sum()

    def logistic(mean: float, deviation: float) -> Floats:
        return np.asarray(1 / (1 + np.exp(-mean - deviation * x)))

    def mean_for(deviation: float) -> float:
        return float(brentq(lambda m: float(w @ logistic(m, deviation)) - p, -60, 60))

    def excess(deviation: float) -> float:
        spread = (logistic(mean_for(deviation), deviation) - p) ** 2
        return float(w @ spread) / (p * (1 - p)) - icc

    found = float(brentq(excess, 0.01, 15))
    return mean_for(found), found


def random_intercept(
    rng: np.random.Generator, p: float, icc: float, shape: tuple[int, ...]
) -> Floats:
    mean, deviation = _intercept(p, icc)
    return np.asarray(1 / (1 + np.exp(-mean - deviation * rng.standard_normal(shape))))


@functools.cache
def names(category: str) -> tuple[str, ...]:
    return tuple(cluster(question["id"]) for question in questions(category))


def skewed(clusters: int) -> Sizes:
    """Take clusters of live_multiple, from the largest (29 questions) to the smallest (1)."""
    sizes = np.array(sorted(Counter(names("live_multiple")).values(), reverse=True))
    assert len(sizes) == 280
    return np.asarray(sizes[np.linspace(0, 279, clusters).round().astype(int)])


def percent_held(
    chances: Callable[[np.random.Generator, float, float, tuple[int, ...]], Floats],
    sizes: Sizes,
    p: float,
    icc: float,
    runs: int = 700,
) -> float:
    """Give how many of 100 intervals hold the true p."""
    rng = np.random.default_rng(11)
    drawn = rng.binomial(sizes, chances(rng, p, icc, (runs, len(sizes))))
    found = [share(hits, sizes) for hits in drawn]
    return 100 * sum(i.low <= p <= i.high for i in found) / runs


P = (0.1, 0.5, 0.8, 0.95)


@pytest.mark.parametrize("icc", [0.1, 0.3, 0.5])
def test_intervals_hold_the_truth_with_few_clusters(icc: float) -> None:
    held = {p: percent_held(beta_binomial, skewed(30), p, icc, 1500) for p in P}
    assert {p: h for p, h in held.items() if not 93 <= h <= 97} == {}


@pytest.mark.parametrize("icc", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("clusters", [100, 280])
def test_intervals_hold_the_truth(clusters: int, icc: float) -> None:
    held = [percent_held(beta_binomial, skewed(clusters), p, icc, 400) for p in P]
    assert 93 <= sum(held) / len(held) <= 97


@pytest.mark.parametrize(("clusters", "least", "most"), [(30, 93, 99), (100, 93, 97.5)])
def test_clusters_that_mean_nothing_cost_little(clusters: int, least: int, most: float) -> None:
    # Thirty clusters cannot prove that they mean nothing: the interval stays on the safe side.
    sizes = skewed(clusters)
    held = {p: percent_held(beta_binomial, sizes, p, 0) for p in P}
    assert {p: h for p, h in held.items() if not least <= h <= most} == {}


@pytest.mark.parametrize("clusters", [30, 280])
def test_intervals_hold_the_truth_of_another_model(clusters: int) -> None:
    # A normal intercept on the logit scale is not the model of the estimate: a little less holds.
    sizes = skewed(clusters)
    held = {p: percent_held(random_intercept, sizes, p, 0.3) for p in P}
    assert {p: h for p, h in held.items() if not 91.5 <= h <= 98} == {}


def answers(
    rng: np.random.Generator, group: Group, p: Sequence[float], icc: float
) -> list[dict[str, list[bool]]]:
    """Simulate models with scores p on a group: clusters and questions are hard for all alike."""
    where = {name: i for i, name in enumerate(group.names)}
    one, two = 1 / icc - 1, len(where)
    common = rng.random(two)
    found = []
    for score in p:
        own = np.where(rng.random(two) < 0.5, common, rng.random(two))
        chance = np.quantile(rng.beta(score * one, (1 - score) * one, 4000), own)
        found.append(
            {
                c: list(rng.random(len(group.clusters[c])) < chance[[where[n] for n in in_c]])
                for c, in_c in group.clusters.items()
            }
        )
    return found


def official(name: str, per_category: int | None = None) -> Group:
    weights = GROUPS.get(name, {name: 1.0})
    ids = sample_ids(per_category, 0, CATEGORIES)
    return Group(weights, {c: [cluster(i) for i in ids[c]] for c in weights})


@pytest.mark.parametrize(
    ("name", "p", "icc"),
    [
        ("live_multiple", 0.8, 0.3),
        ("live", 0.8, 0.3),
        ("multi_turn", 0.5, 0.6),
    ],
)
def test_intervals_of_bfcls_own_groups_hold_the_truth(name: str, p: float, icc: float) -> None:
    group, rng, runs = official(name), np.random.default_rng(3), 500
    found = [interval(group, answers(rng, group, [p], icc)[0]) for _ in range(runs)]
    assert 93 <= 100 * sum(i.low <= p <= i.high for i in found) / runs <= 97


def near(rng: np.random.Generator, p: float, runs: int) -> Floats:
    """Draw shares from a narrow band around p.

    Few questions allow few shares, so at p alone the coverage depends on which of them lies just
    inside the bounds.
    """
    return np.asarray(p + 0.2 * min(p, 1 - p) * rng.uniform(-1, 1, runs))


def group_held(group: Group, p: float, icc: float, runs: int) -> float:
    """Give how many of 100 intervals of a weighted mean hold the truth."""
    rng = np.random.default_rng(12)
    weights, truth = np.array(list(group.weights.values())), near(rng, p, runs)
    _, sizes = stats._counts(group, {c: [False] * len(group.clusters[c]) for c in group.weights})
    spread = 1 / icc - 1
    chance = rng.beta(truth[:, None] * spread, (1 - truth[:, None]) * spread, (runs, len(sizes[0])))
    hits = rng.binomial(sizes, chance[:, None, :])
    found = [stats._mean(weights, some, sizes) for some in hits]
    held = [f.low <= t <= f.high for f, t in zip(found, truth.tolist(), strict=True)]
    return 100 * float(np.mean(held))


@pytest.mark.parametrize("pair", [(0.02, 0.98), (0.05, 0.95), (0.2, 0.8), (0.5, 0.5)])
@pytest.mark.parametrize("name", ["non_live", "live", "irrelevance", "multi_turn"])
def test_intervals_of_groups_hold_the_truth_in_the_pocket_sample(
    name: str, pair: tuple[float, float]
) -> None:
    group = official(name, 20)
    assert 93 <= sum(group_held(group, p, 0.3, 500) for p in pair) / 2 <= 98


@pytest.mark.parametrize("name", ["non_live", "live", "irrelevance", "multi_turn"])
def test_intervals_of_groups_hold_the_truth_where_nearly_all_fail_or_pass(name: str) -> None:
    group = official(name)
    assert 93 <= sum(group_held(group, p, 0.3, 250) for p in (0.02, 0.98)) / 2 <= 98


def test_intervals_of_groups_hold_the_truth_of_unlike_categories() -> None:
    group, rng, runs = official("non_live", 20), np.random.default_rng(8), 1000
    by = np.array(list(group.weights.values()))
    _, sizes = stats._counts(group, {c: [False] * 20 for c in group.weights})
    for p in ([0.02, 0.5, 0.1, 0.9, 0.9, 0.98], [0.0, 0.0, 0.0, 0.3, 0.1, 0.0]):
        truth, chance = float(by @ p), np.array(p)[:, None]
        found = [stats._mean(by, rng.binomial(sizes, chance), sizes) for _ in range(runs)]
        assert 93 <= 100 * sum(f.low <= truth <= f.high for f in found) / runs <= 99


@pytest.mark.parametrize(
    ("name", "per_category", "before", "after"),
    [
        ("live_simple", None, 0.5, 0.6),
        ("live_irrelevance", None, 0.8, 0.7),
        ("multi_turn", 20, 0.2, 0.3),
        ("non_live", 20, 0.5, 0.6),
    ],
)
def test_differences_hold_the_truth(
    name: str, per_category: int | None, before: float, after: float
) -> None:
    group, rng, runs = official(name, per_category), np.random.default_rng(4), 300
    found = [
        stats._subtract(group, *answers(rng, group, [before, after], 0.3)) for _ in range(runs)
    ]
    held = sum(d.low <= after - before <= d.high for d in found)
    assert 93 <= 100 * held / runs <= 97


@pytest.mark.parametrize(
    ("name", "p"), [("live_simple", (0.2, 0.5, 0.8)), ("multi_turn", (0.1, 0.3, 0.5))]
)
def test_recoveries_hold_the_truth(name: str, p: tuple[float, float, float]) -> None:
    group, rng, runs = official(name), np.random.default_rng(5), 200
    truth = (p[1] - p[0]) / (p[2] - p[0])
    found: list[Recovery] = []
    for _ in range(runs):  # the gap is large: its test, which takes time, would find it each time
        found.append(stats._recovered(group, *answers(rng, group, p, 0.3)))
    held = [r.low <= truth <= r.high for r in found if r.low is not None and r.high is not None]
    assert len(held) == runs
    assert 93 <= 100 * sum(held) / runs <= 98


def test_equal_models_differ_in_one_of_twenty_trials() -> None:
    some = [name for name in names("live_simple") if int(name.rpartition("_")[2]) < 40]
    group, rng, runs = Group({"c": 1.0}, {"c": some}), np.random.default_rng(6), 250
    pairs = [answers(rng, group, [0.5, 0.5], 0.4) for _ in range(runs)]
    found = [difference(group, a, b).p for a, b in pairs]
    assert 2 <= 100 * sum(p < 0.05 for p in found) / runs <= 7


# What holds for all answers

Questions = list[tuple[str, bool, bool, bool]]  # cluster, three models' answers
asked = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.booleans(), st.booleans(), st.booleans()),
    min_size=1,
    max_size=40,
)
categories = st.lists(asked, min_size=1, max_size=3)


def laid_out(some: list[Questions]) -> tuple[Group, list[dict[str, list[bool]]]]:
    by = {f"c{i}": part for i, part in enumerate(some)}
    group = Group(
        {c: (i + 1) / sum(range(len(by) + 1)) for i, c in enumerate(by)},
        {c: [q[0] for q in part] for c, part in by.items()},
    )
    return group, [{c: [bool(q[k]) for q in part] for c, part in by.items()} for k in (1, 2, 3)]


@settings(deadline=None)
@given(categories, st.randoms())
def test_an_interval_holds_its_mean_in_any_order(some: list[Questions], order: object) -> None:
    group, (passed, _, _) = laid_out(some)
    found = interval(group, passed)
    by_hand = sum(w * sum(passed[c]) / len(passed[c]) for c, w in group.weights.items())
    assert found.mean == pytest.approx(by_hand)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.high - found.low > 0.01
    for part in some:
        order.shuffle(part)  # type: ignore[attr-defined]
    group, (passed, _, _) = laid_out(some)
    assert interval(group, passed).model_dump() == pytest.approx(found.model_dump())


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=3, max_size=40), st.integers(2, 6))
def test_asking_the_same_again_says_little_more(bits: list[bool], times: int) -> None:
    again = [b for b in bits for _ in range(times)]
    group = Group({"c": 1.0}, {"c": [f"q{i}" for i in range(len(bits)) for _ in range(times)]})
    found, naive = interval(group, {"c": again}), wilson(sum(again), len(again))
    assert (found.n, found.clusters) == (len(again), len(bits))
    assert found.high - found.low > naive.high - naive.low


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_independent_questions_get_wilson_and_mcnemar(pairs: list[tuple[bool, bool]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    group = Group({"c": 1.0}, {"c": [f"q{i}" for i in range(len(a))]})
    score = interval(group, {"c": a}).model_dump()
    assert score == pytest.approx(wilson(sum(a), len(a)).model_dump())
    found = difference(group, {"c": a}, {"c": b})
    assert found.p == mcnemar(a, b)
    assert (found.won - found.lost) / len(a) == pytest.approx(found.mean)
    weights, questions = {"c": len(a) / (len(a) + 7), "d": 7 / (len(a) + 7)}, group.clusters["c"]
    pooled = Group(weights, {"c": questions, "d": list("abcdefg")})
    more = difference(pooled, {"c": a, "d": [False] * 7}, {"c": b, "d": [True] * 7})
    assert more.p == mcnemar([*a, *[False] * 7], [*b, *[True] * 7])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_sign_flips_of_single_questions_are_mcnemars(pairs: list[tuple[bool, bool]]) -> None:
    # Unequal weights take the way of the clusters, but only one category has anything to tell.
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    group = Group({"c": 0.9, "d": 0.1}, {"c": [f"q{i}" for i in range(len(a))], "d": ["other"]})
    found = difference(group, {"c": a, "d": [True]}, {"c": b, "d": [True]})
    assert found.p == pytest.approx(mcnemar(a, b))


@settings(deadline=None, max_examples=30)
@given(categories)
def test_a_difference_turns_around(some: list[Questions]) -> None:
    group, (a, b, _) = laid_out(some)
    there, back = difference(group, a, b), difference(group, b, a)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))
    assert (there.won, there.lost, there.before) == (back.lost, back.won, back.after)
    assert there.p == pytest.approx(back.p)
    assert -1 <= there.low <= there.mean <= there.high <= 1
    assert there.high - there.low > 0.01
    same = difference(group, a, a)
    assert same.low < same.mean == 0 < same.high
    assert same.p == 1


def test_a_cluster_is_one_witness() -> None:
    a, b = {"c": [False] * 20}, {"c": [True] * 10 + [False] * 10}
    alone = Group({"c": 1.0}, {"c": [f"q{i}" for i in range(20)]})
    crowd = Group({"c": 1.0}, {"c": ["crowd"] * 10 + [f"q{i}" for i in range(10)]})
    assert difference(alone, a, b).p == pytest.approx(2 / 2**10)
    assert difference(crowd, a, b).p == 1
    assert difference(alone, a, b).low > 0 > difference(crowd, a, b).low


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_keeps_the_order(values: list[float]) -> None:
    found = holm(values)
    assert [p >= v for p, v in zip(found, values, strict=True)] == [True] * len(values)
    assert all(p <= min(1, len(values) * v) + 1e-12 for p, v in zip(found, values, strict=True))
    ordered = sorted(zip(values, found, strict=True))
    assert [p for _, p in ordered] == sorted(found)


@settings(deadline=None)
@given(categories)
def test_a_recovery_holds_itself_or_says_why_there_is_none(some: list[Questions]) -> None:
    group, (floor, ours, ceiling) = laid_out(some)
    found, gap = recovery(group, floor, ours, ceiling), difference(group, floor, ceiling)
    if found.share is None:
        assert gap.low <= 0 or gap.p >= stats.LEVEL
        assert "ceiling" in found.reason
        return
    assert gap.low > 0
    assert gap.p < stats.LEVEL
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.share < found.high
    assert found.share == pytest.approx(difference(group, floor, ours).mean / gap.mean)
    for end, model in ((0, floor), (1, ceiling)):
        at = recovery(group, floor, model, ceiling)
        assert at.share == pytest.approx(end)
        assert at.low is not None
        assert at.high is not None
        assert at.low < end < at.high


def test_a_gap_that_may_be_chance_is_no_gap() -> None:
    group = Group({"c": 1.0}, {"c": [f"q{i}" for i in range(20)]})
    none, few, five, six = ({"c": [i < hits for i in range(20)]} for hits in (0, 3, 5, 6))
    assert difference(group, none, five).low > 0  # the interval alone would see a gap
    assert difference(group, none, five).p == pytest.approx(2 / 2**5)
    assert recovery(group, none, few, five).reason == "floor and ceiling cannot be told apart"
    assert recovery(group, none, few, six).share == pytest.approx(0.5)


def test_a_published_ceiling_is_a_fixed_number() -> None:
    group = Group({"c": 1.0}, {"c": [f"q{i}" for i in range(200)]})
    floor, ours, best = ({"c": [i < hits for i in range(200)]} for hits in (20, 100, 180))
    measured, fixed = recovery(group, floor, ours, best), recovery(group, floor, ours, 0.9)
    assert measured.share == fixed.share == pytest.approx(0.5)
    assert recovery(group, floor, ours, 0.12).reason == "floor and ceiling cannot be told apart"
    assert recovery(group, floor, ours, 0.02).reason == "the ceiling is lower than the floor"
    assert recovery(group, floor, best, 0.9).share == pytest.approx(1)


def test_a_bootstrap_of_clusters_is_seeded_and_empty_where_all_pass() -> None:
    clusters = ["a", "a", "b", "c", "c", "c"]
    some = [True, False, True, True, True, False]
    assert stats.bootstrap(some, clusters, seed=1) == stats.bootstrap(some, clusters, seed=1)
    every = stats.bootstrap([True] * 6, clusters)
    assert (every.low, every.high) == (1, 1)
    assert interval(Group({"c": 1.0}, {"c": clusters}), {"c": [True] * 6}).low < 0.9


@settings(deadline=None)
@given(categories)
def test_counts_of_clusters_are_enough_for_a_share(some: list[Questions]) -> None:
    asked = [(f"{i}{q[0]}", bool(q[1])) for i, part in enumerate(some) for q in part]
    sizes = Counter(name for name, _ in asked)
    hits = Counter(name for name, bit in asked if bit)
    group = Group({"c": 1.0}, {"c": [name for name, _ in asked]})
    whole = interval(group, {"c": [bit for _, bit in asked]})
    alone = share([hits[name] for name in sizes], list(sizes.values()))
    assert alone.model_dump() == pytest.approx(whole.model_dump())


def test_only_linked_categories_have_a_correlation_in_common() -> None:
    # Scenarios that pass as a whole in two categories; independent questions in a third.
    scenarios, others = [f"s{i}" for i in range(20)], [f"q{i}" for i in range(20)]
    half = [i < 10 for i in range(20)]
    linked = Group({"a": 0.5, "b": 0.5}, {"a": scenarios, "b": scenarios})
    apart = Group({"a": 0.5, "b": 0.5}, {"a": scenarios, "b": others})
    wide, narrow = (interval(g, {"a": half, "b": half}) for g in (linked, apart))
    assert narrow.low == pytest.approx(wilson(20, 40).low, abs=0.001)
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)
    third = {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}
    pair = Group(third, {"a": scenarios, "b": scenarios, "c": others})
    none = Group(third, {"a": scenarios, "b": others, "c": [f"r{i}" for i in range(20)]})
    some, all_apart = (interval(g, dict.fromkeys("abc", half)) for g in (pair, none))
    assert some.low < all_apart.low


def test_weights_need_not_add_up_to_one() -> None:
    group = Group({"a": 0.1, "b": 0.3}, {"a": ["x", "y"], "b": ["z"]})
    found = interval(group, {"a": [True, True], "b": [True]})
    assert found.mean == pytest.approx(0.4)
    assert found.high == pytest.approx(0.4)
    assert 0 < found.low < 0.3


def test_answers_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="c: 2 answers to 3 questions"):
        interval(Group({"c": 1.0}, {"c": "abc"}), {"c": [True, False]})
    with pytest.raises(ValueError, match="c: 0 answers to 0 questions"):
        interval(Group({"c": 1.0}, {"c": ""}), {"c": []})
    with pytest.raises(ValueError, match="0 of 0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match=r"\[3\] of \[2\] are not hits and sizes"):
        share([3], [2])
