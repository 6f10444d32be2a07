# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Selectors of units against published arrays and hand-computed cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lib.selectors.badge import kmeans_plus_plus
from lib.selectors.class_stratified import ALL, allot, image_limits, merge_streams
from lib.selectors.core_set import k_center
from lib.selectors.peaks import ranked_slices, slice_peaks
from lib.selectors.representative import (
    farthest_on_average,
    farthest_on_average_steps,
    mean_shift_clusters,
    reduced_features,
    stratified,
)
from lib.selectors.stochastic import stochastic_batch
from lib.selectors.strided import strided_blocks
from lib.selectors.submodular import flqmi
from lib.selectors.typiclust import typiclust
from lib.selectors.usim import class_weights, cosine_similarity, elbow, fisher_diagonal, kneedle, query_set_size, usim

# --- class-stratified -----------------------------------------------------------------------------------------------


def test_limits_and_quotas_by_hand() -> None:
    assert image_limits(20, 0.66, [1, 2]) == {1: 4, 2: 4, ALL: 6}
    assert image_limits(1, 0.66, [1, 2]) == {1: 1, 2: 1, ALL: 1}
    quotas = allot(20, 0.66, [1, 2], np.random.default_rng(0))
    assert sorted((quotas[1], quotas[2])) == [6, 7]
    assert quotas[ALL] == 7
    assert allot(7, 0.66, [], np.random.default_rng(0)) == {ALL: 7}


def test_a_class_that_runs_short_is_filled_from_the_stream_of_all() -> None:
    streams = {1: [(0.9, "a")], 2: [(0.8, "b"), (0.7, "c"), (0.1, "d")], ALL: [(0.6, "e"), (0.5, "f"), (0.4, "g")]}
    chosen, lacking = merge_streams(streams, {1: 3, 2: 2, ALL: 1})
    assert chosen == [(1, "a"), (2, "b"), (2, "c"), (ALL, "e"), (ALL, "f"), (ALL, "g")]
    assert lacking == {1: 2}
    chosen, _ = merge_streams(streams, {1: 4, 2: 2, ALL: 1})
    assert chosen[-1] == (2, "d")


# --- stochastic batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [107, 100])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_published_stochastic_batches(reference: Path, units: int, seed: int) -> None:
    arrays = np.load(reference / "stochastic_batches/selection.npz")
    scores = arrays[f"n{units}_scores"]
    for keys, name in (({}, "noresample"), ({"groups": 25, "resample": True}, "resample25")):
        legacy = np.random.RandomState(seed)
        picked = stochastic_batch(scores, 10, legacy, **keys)
        np.testing.assert_array_equal(picked, arrays[f"n{units}_{name}_seed{seed}_sel"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_published_sums_with_the_last_group(reference: Path, seed: int) -> None:
    arrays = np.load(reference / "alunet/stochastic_batch.npz")
    legacy = np.random.RandomState(seed)
    picked = stochastic_batch(arrays["scores"], int(arrays["batch"]), legacy, statistic="sum", keep_last=True)
    np.testing.assert_array_equal(picked, arrays[f"sel_seed{seed}"])


def test_batches_at_the_edges() -> None:
    rng = np.random.default_rng(0)
    assert sorted(stochastic_batch([1, 2, 3], 5, rng)) == [0, 1, 2]
    assert len(set(stochastic_batch(np.arange(20), 6, rng, resample=True))) == 6
    best = stochastic_batch([0, 0, 0, 0, 9, 9], 2, np.random.default_rng(1), statistic="max")
    assert {4, 5} & set(best.tolist())
    for bad, sentence in (({"k": 0}, "at least one unit"), ({"k": 2, "statistic": "median"}, "must be one of")):
        with pytest.raises(ValueError, match=sentence):
            stochastic_batch([1, 2, 3], rng=rng, **bad)
    with pytest.raises(ValueError, match="finite score"):
        stochastic_batch([1, np.nan], 1, rng)


# --- peaks ------------------------------------------------------------------------------------------------------------


def test_published_peaks(reference: Path) -> None:
    for case in json.loads((reference / "formulas/peaks.json").read_text()).values():
        peaks = slice_peaks(case["u"], distance=5)
        assert sorted(peaks.tolist()) == case["peaks_distance5"]
        heights = np.array(case["u"])[peaks]
        assert (np.diff(heights) <= 0).all()


def test_slices_after_the_peaks() -> None:
    scores = np.array([9.0, 1, 5, 1, 1, 1, 1, 1, 3, 1, 8])
    order, tiers = ranked_slices(scores, np.zeros(11, bool), distance=3)
    assert order[:4].tolist() == [2, 8, 5, 0]
    assert tiers.tolist() == [0, 0, 1, *[2] * 8]
    taken = np.zeros(11, bool)
    taken[2] = True
    order, tiers = ranked_slices(scores, taken, distance=3)
    assert 2 not in order
    assert (order[0], tiers[0]) == (8, 0)
    assert sorted(order) == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]


# --- core-set and BADGE -----------------------------------------------------------------------------------------------


def test_published_core_sets(reference: Path) -> None:
    arrays = np.load(reference / "alunet/core_set.npz")
    np.testing.assert_array_equal(k_center(arrays["X_ul"], arrays["X_l"], 20), arrays["order_with_labelled"])
    np.testing.assert_array_equal(k_center(arrays["X_ul"], None, 20), arrays["order_no_labelled"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(0, 5), st.integers(1, 35))
def test_k_center_is_farthest_first(seed: int, u: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    x, known = rng.normal(50, 1, (u, 3)).astype(np.float32), rng.normal(50, 1, (n, 3)).astype(np.float32)
    picked = k_center(x, known, k)
    assert len(set(picked.tolist())) == len(picked) == min(k, u)
    centres = known.astype(float)
    for i in picked:
        if len(centres):
            distance = np.linalg.norm(x[:, None].astype(float) - centres, axis=2).min(1)
            assert distance[i] >= distance.max() - 1e-3
        centres = np.concatenate([centres, x[[i]].astype(float)])


def test_published_first_centre_and_the_law_of_the_second(reference: Path) -> None:
    arrays = np.load(reference / "alunet/badge.npz")
    rng = np.random.default_rng(0)
    picks = np.array([kmeans_plus_plus(arrays["E"], 2, rng) for _ in range(3000)])
    assert (picks[:, 0] == arrays["first"]).all()
    p = arrays["second_centre_prob"]
    counts = np.bincount(picks[:, 1], minlength=len(p))
    assert counts[p == 0].sum() == 0
    likely = p * 3000 >= 5
    rare = p[~likely].sum() > 0
    observed = np.append(counts[likely], counts[~likely].sum() if rare else [])
    expected = np.append(p[likely], p[~likely].sum() if rare else []) * 3000
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_identical_embeddings_are_drawn_without_repetition() -> None:
    picked = kmeans_plus_plus(np.ones((6, 4)), 6, np.random.default_rng(0))
    assert sorted(picked) == list(range(6))
    assert sorted(k_center(np.ones((6, 4)), None, 9)) == list(range(6))
    with pytest.raises(ValueError, match="not finite"):
        kmeans_plus_plus([[np.nan]], 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="differ in width"):
        k_center(np.ones((2, 3)), np.ones((2, 4)), 1)
    with pytest.raises(ValueError, match="matrix of rows"):
        k_center(np.ones(3), None, 1)


# --- submodular -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["lazy", "naive"])
@pytest.mark.parametrize("eta", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["pos", "cos", "fisher_signed"])
def test_published_mutual_information(reference: Path, kind: str, eta: float, optimizer: str) -> None:
    arrays = np.load(reference / "submodlib/mutual_information.npz")
    indices, gains = flqmi(arrays[f"S_{kind}"], 12, eta, optimizer)
    np.testing.assert_array_equal(indices, arrays[f"{kind}_eta{eta}_NaiveGreedy_order"])
    np.testing.assert_allclose(gains, arrays[f"{kind}_eta{eta}_NaiveGreedy_gain"], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 8), st.sampled_from([0.0, 1.0, 10.0]), st.booleans())
def test_lazy_is_exactly_naive(seed: int, u: int, q: int, eta: float, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    s = rng.integers(-2, 3, (u, q)).astype(float) if tied else rng.normal(size=(u, q))
    lazy, naive = flqmi(s, 15, eta), flqmi(s, 15, eta, "naive")
    np.testing.assert_array_equal(lazy[0], naive[0])
    np.testing.assert_array_equal(lazy[1], naive[1])
    value = np.maximum(s[lazy[0]].max(0), 0).sum() + eta * np.maximum(s[lazy[0]].max(1), 0).sum()
    assert lazy[1].sum() == pytest.approx(value, rel=1e-5, abs=1e-5)


def test_stochastic_greedy_is_close_and_needs_a_generator() -> None:
    s = np.random.default_rng(7).normal(size=(2000, 50)).astype(np.float32)
    _, exact = flqmi(s, 50)
    indices, gains = flqmi(s, 50, optimizer="stochastic", rng=np.random.default_rng(0))
    assert len(set(indices.tolist())) == 50
    assert gains.sum() > 0.98 * exact.sum()
    for keys, sentence in (
        ({"optimizer": "stochastic"}, "random generator"),
        ({"eta": -1}, "zero or more"),
        ({"optimizer": "x"}, "one of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            flqmi(s, 3, **keys)


# --- USIM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["c", "f"])
def test_published_usim_pipeline(reference: Path, kind: str) -> None:
    arrays = np.load(reference / "alunet/usim.npz")
    frequencies = sum(np.array([(arrays[f"lab_{x}"] == c).mean() for c in range(3)]) for x in "ab")
    u = arrays["unc_per_class"] @ class_weights(frequencies)
    np.testing.assert_allclose(np.sort(u)[::-1], arrays["curve"], rtol=1e-12)
    assert query_set_size(u, 10, published=True) == arrays["knee"]
    legacy = np.random.RandomState(int(arrays["seed"]))
    choice = usim(arrays["unc_per_class"], arrays["grads"], frequencies, 10, legacy, kind=kind, published=True)
    np.testing.assert_array_equal(choice.indices, arrays[f"{kind}_selected"])
    np.testing.assert_allclose(choice.gains, arrays[f"{kind}_gains"], rtol=1e-5)
    if kind == "f":
        np.testing.assert_array_equal(choice.query_set, arrays["f_q_ids"])


def test_knees(reference: Path) -> None:
    arrays = np.load(reference / "kneed/knees.npz")
    for name in ("gamma_sorted", "two_level", "linear", "constant"):
        y, s10, s1 = arrays[f"{name}_y"], *(int(arrays[f"{name}_{s}"]) for s in ("S10", "S1"))
        straight = s10 < 0
        assert kneedle(y) == (None if straight else s10), name
        assert kneedle(y, 1) == (None if s1 < 0 else s1), name
        assert elbow(y) == (None if straight else arrays[f"{name}_argmax"]), name
    assert query_set_size(np.ones(300), 10) == 50
    assert query_set_size(np.ones(30), 10) == 30


def test_weights_survive_a_class_nobody_has_labelled() -> None:
    np.testing.assert_allclose(class_weights([9.0, 1.0, 0.5]), [0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(class_weights([9.0, 1.0, 0.0]), [0, 0.5, 0.5])
    np.testing.assert_allclose(class_weights([0.0, 0.0]), [0, 1])
    with pytest.raises(ValueError, match="class frequencies"):
        class_weights([np.inf, 1])


def test_fisher_is_the_mean_square_and_published_code_takes_the_first() -> None:
    g = np.array([[1.0, 2.0], [3.0, 0.0]])
    np.testing.assert_array_equal(fisher_diagonal(g), [5, 2])
    np.testing.assert_array_equal(fisher_diagonal(g, published=True), [1, 4])
    np.testing.assert_allclose(cosine_similarity([[3, 4], [0, 0]], [[1, 0]]), [[0.6], [0]])


# --- representativeness -------------------------------------------------------------------------------------


def test_published_features_clusters_and_distances(reference: Path) -> None:
    arrays, picks = (
        np.load(reference / "active_segmentation/representativeness.npz"),
        json.loads((reference / "active_segmentation/representativeness.json").read_text()),
    )
    points = arrays["reduced_code"]
    np.testing.assert_allclose(
        np.abs(reduced_features(arrays["maxpooled"], 10, published=True)), np.abs(points), atol=1e-9
    )
    ids = picks["case_ids_labelled"] + picks["case_ids_unlabelled"]
    for width in ("5", "2.5"):
        published = [picks[f"clust_bw{width}_labels"][i] for i in ids]
        assert mean_shift_clusters(points, float(width)).tolist() == published
    first = next(farthest_on_average_steps(points[12:], points[:12], 1))
    np.testing.assert_allclose(first.utilities(), arrays["avg_distance_scores"], rtol=1e-5)


def test_distance_updates_where_published_code_runs_on(reference: Path) -> None:
    arrays, picks = (
        np.load(reference / "active_segmentation/representativeness.npz"),
        json.loads((reference / "active_segmentation/representativeness.json").read_text()),
    )
    points = arrays["reduced_code"]
    mine = farthest_on_average(points[12:], points[:12], 8)
    assert mine[0] == picks["dist_argmax_index"]
    known, left = list(points[:12]), set(range(40))
    for i in mine:
        means = {j: np.mean([np.linalg.norm(points[12 + j] - x) for x in known]) for j in left}
        assert means[int(i)] == pytest.approx(max(means.values()), rel=1e-5)
        known.append(points[12 + i])
        left.discard(int(i))
    assert mine.tolist() != list(range(19, 27))


def test_strata_are_evened_out_by_fraction_or_count() -> None:
    strata, labelled = ["a"] * 2 + ["b"] * 8, [True, False] + [True] + [False] * 7
    rng = np.random.default_rng(0)
    by_fraction = [strata[i] for i in stratified(strata, labelled, 4, rng)]
    assert by_fraction == ["b"] * 3 + [by_fraction[3]]
    by_count = [strata[i] for i in stratified(strata, labelled, 4, rng, "count")]
    assert sorted(by_count[:2]) == ["a", "b"]
    outliers_last = stratified([-1, 0, 0], [False] * 3, 3, rng)
    assert outliers_last[2] == 0
    with pytest.raises(ValueError, match="fraction"):
        stratified(strata, labelled, 1, rng, "share")
    with pytest.raises(ValueError, match="one stratum a unit"):
        stratified(strata, labelled[1:], 1, rng)


def test_typical_units_come_from_every_cluster_and_its_middle() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [0, 10]])
    x = np.concatenate([c + rng.normal(0, 0.5, (30, 2)) for c in centres])
    picked = typiclust(x, None, 3, rng)
    assert sorted(i // 30 for i in picked) == [0, 1, 2]
    assert all(np.linalg.norm(x[i] - centres[i // 30]) < 0.5 for i in picked)
    assert {i // 30 for i in typiclust(x, centres[:1] + 0.1, 2, rng)} == {1, 2}
    assert len(set(typiclust(np.ones((5, 2)), None, 5, rng).tolist())) == 5


# --- strided blocks and pseudo labels --------------------------------------------------------------------------------


def free_slices(case: dict) -> dict[str, np.ndarray]:
    free: dict[str, np.ndarray] = {}
    for i in case["unlabelled"]:
        scan, position = i.rsplit("-", 1)
        free.setdefault(scan, np.zeros(14, bool))[int(position)] = True
    return free


@pytest.mark.parametrize("rank", ["random", "uncertainty"])
@pytest.mark.parametrize(("thickness", "budget"), [(5, 4), (5, 8), (10, 4), (10, 8)])
def test_published_blocks(reference: Path, rank: str, thickness: int, budget: int) -> None:
    case = json.loads((reference / "active_segmentation/strided_blocks.json").read_text())
    free, scores = free_slices(case), {scan: np.zeros(14) for scan in free_slices(case)}
    for i, p in case["p_class0"].items():
        scan, position = i.rsplit("-", 1)
        scores[scan][int(position)] = -abs(p - 1 / 3)
    ranked = scores if rank == "uncertainty" else None
    blocks = strided_blocks(free, thickness, budget, np.random.default_rng(3), scores=ranked)
    published = case[f"{rank}_t{thickness}_k{budget}"]
    mine = [f"{b.scan}-{i}" for b in blocks for i in b.annotated]
    assert mine == [i for i in published["selected"] if i not in published["pseudo"]]
    assert {f"{b.scan}-{i}" for b in blocks for i in b.between} == set(published["pseudo"])


def test_published_blocks_and_earlier_pseudo_labels(reference: Path) -> None:
    case = json.loads((reference / "active_segmentation/strided_blocks.json").read_text())
    free = free_slices(case)
    pseudo = {scan: np.zeros(14, bool) for scan in free}
    pseudo["train_0"][[3, 4]] = True
    blocks = strided_blocks(free, 5, 16, np.random.default_rng(3), pseudo=pseudo)
    published = case["random_t5_k16_pseudo_preferTrue"]
    assert [f"{b.scan}-{i}" for b in blocks for i in b.annotated] == [
        i for i in published["selected"] if i not in published["pseudo"]
    ]


def test_an_odd_budget_is_spent_to_the_last_slice() -> None:
    blocks = strided_blocks({"a": np.ones(12, bool)}, 5, 5, np.random.default_rng(0))
    assert sum(len(b.annotated) for b in blocks) == 5
