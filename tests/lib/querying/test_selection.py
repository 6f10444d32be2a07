# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lib.querying.by_unit import tiles
from lib.querying.methods import MethodError, resolve
from lib.querying.selection import Ask, PoolExhausted, PoolImage, select
from lib.regions import boxes_overlap
from lib.selectors.class_stratified import ALL, allot, image_limits, merge_streams, pick_streams
from lib.selectors.greedy import best_boxes
from lib.selectors.noise import power, softrank
from lib.uncertainty import UNCERTAINTIES, Moments
from lib.units import box_mean
from tests.lib.querying.test_conformance import Synthetic
from tests.lib.worlds import LABELS, Members, hints_for, softmax, world

# --- the whole query stage against published arrays ------------------------------------------------------------------

RUNS = {"pred_entropy": 1.0, "exp_entropy": 1.0, "mutual_information": 1.0, "power_bald": 1.0, "power_bald_b10": 10.0}


def class_entropy(moments: Moments, c: int) -> np.ndarray:
    """U_c = predictive entropy * mean_c; ALL gives plain predictive entropy (ClaSP PE)."""
    entropy = moments.predictive_entropy()
    return entropy if c == ALL else entropy * moments.mean_of(c)


class Stage:
    """A published query stage.

    Two of its four images have published probabilities. Of the others, which the published code searched first, only
    the shape, which determines the number of drawn values, and the kept candidates are published.
    """

    def __init__(self, reference: Path, run: str) -> None:
        self.inputs = np.load(reference / "nnactive/query_inputs.npz")
        self.found = np.load(reference / f"nnactive/query_{run}.npz")
        stride = self.found["agg_stride"].tolist()
        self.stride = tuple(stride) if isinstance(stride, list) else (stride,) * 3
        self.query, self.per_image = int(self.found["query_size"]), int(self.found["n_patch_per_image"])
        self.images = [str(name) for name in self.inputs["image_order"]]
        self.shapes = {image: tuple(shape) for image, shape in zip(self.images, self.inputs["shapes"], strict=True)}
        self.sizes = {image: tuple(min(6, n) for n in shape) for image, shape in self.shapes.items()}
        self.probs = {image: self.inputs[f"probs_{image}"] for image in self.images if f"probs_{image}" in self.inputs}

    @property
    def seed(self) -> int:
        return int(self.inputs["seed"])

    def taken(self, image: str) -> list:
        rows = zip(self.inputs["ann_file"], self.inputs["ann_coords"], self.inputs["ann_size"], strict=True)
        return [(tuple(map(int, c)), tuple(map(int, s))) for name, c, s in rows if name == image]

    def grids(self, image: str, maps: dict) -> dict:
        """Patch scores of an image from functions of its moments; zeros where there are no probabilities."""
        if image not in self.probs:
            empty = box_mean(np.zeros(self.shapes[image]), self.sizes[image], self.stride)
            return {name: empty.astype(np.float64) for name in maps}
        moments = Moments.from_members(self.probs[image])
        scores = {name: box_mean(make(moments), self.sizes[image], self.stride) for name, make in maps.items()}
        return {name: grid.astype(np.float64) for name, grid in scores.items()}

    def kept(self, method: str, image: str, part: str = "") -> list[tuple]:
        """Candidates that the published code kept of an image: (image, start, score), best first."""
        names, starts, scores = (self.found[f"{method}__top_{part}{what}"] for what in ("file", "coords", "score"))
        rows = zip(names, starts, scores, strict=True)
        return [(image, tuple(map(int, s)), float(v)) for name, s, v in rows if name == f"{image}.nii.gz"]

    def chosen(self, method: str) -> list[tuple]:
        """Regions that the published code chose: (image, start), best first."""
        rows = zip(self.found[f"{method}__sel_file"], self.found[f"{method}__sel_coords"], strict=True)
        return [(str(name).removesuffix(".nii.gz"), tuple(map(int, s))) for name, s in rows]

    def compared(self, method: str, image: str, mine: list[tuple], part: str = "") -> list[tuple]:
        """`mine`, if it equals the published candidates; these, if there is no input to compute them."""
        published = self.kept(method, image, part)
        if image not in self.probs:
            return published
        assert [start for _, start, _ in mine] == [start for _, start, _ in published], (method, image, part)
        scores = [[score for _, _, score in kept] for kept in (mine, published)]
        np.testing.assert_allclose(*scores, atol=2e-6, rtol=2e-5)
        return mine


@pytest.mark.parametrize("run", ["s1", "s122", "no_limit"])
def test_published_query_stage(reference: Path, run: str) -> None:
    stage = Stage(reference, run)
    grids = {image: stage.grids(image, UNCERTAINTIES) for image in stage.images}
    methods = [name for name in (*RUNS, "softrank_bald", "power_pe") if f"{name}__sel_file" in stage.found]
    assert len(methods) == (3 if run == "no_limit" else 7)
    for method in methods:
        rng = np.random.default_rng(4242 if method == "power_pe" else stage.seed)
        resolved = resolve(method)
        kept: list[tuple] = []
        for image in stage.images:
            grid = grids[image][resolved.uncertainty]
            if resolved.selector == "power":
                grid = power(grid, RUNS.get(method, 1.0), rng)
            limit = 2 * stage.per_image if resolved.selector == "softrank" else stage.per_image
            boxes = best_boxes(grid, stage.sizes[image], stage.stride, stage.taken(image), limit)
            kept += stage.compared(method, image, [(image, s, v) for s, v in boxes])
        if resolved.selector == "softrank":
            ranked = sorted(kept, key=lambda c: -c[2])
            soft = softrank([v for _, _, v in ranked], 1.0, rng)
            chosen = [ranked[i] for i in np.argsort(-soft, kind="stable")[: stage.query]]
        else:
            chosen = sorted(kept, key=lambda c: -c[2])[: stage.query]
        assert [(image, start) for image, start, _ in chosen] == stage.chosen(method), method


BETAS = {
    "class_pe66": None, "class_pe33": None, "class_power_pe66": 1.0, "class_power_pe66_exp": 10**0.5,
}  # fmt: skip


@pytest.mark.parametrize("run", ["s1", "s122"])
@pytest.mark.parametrize("method", BETAS)
def test_published_class_stratified_stage(reference: Path, run: str, method: str) -> None:
    stage = Stage(reference, run)
    ratio = float(resolve(method).options["ratio"])
    rng = np.random.default_rng(stage.seed)
    streams: dict[int, list] = {1: [], 2: [], ALL: []}
    maps = {c: partial(class_entropy, c=c) for c in streams}
    for image in stage.images:
        grids = stage.grids(image, maps)
        if BETAS[method]:
            grids = {c: power(g, BETAS[method], rng) for c, g in grids.items()}
        limits = image_limits(stage.per_image, ratio, [1, 2])
        found = pick_streams(grids, stage.sizes[image], stage.stride, stage.taken(image), limits, rng)
        for stream, boxes in found.items():
            mine = [(image, start, score) for start, score in boxes]
            kept = stage.compared(method, image, mine, f"cls{stream}_")
            streams[stream] += [(score, (image, start)) for image, start, score in kept]
    chosen, lacking = merge_streams(streams, allot(stage.query, ratio, [1, 2], rng))
    assert not lacking
    assert sorted((image, tuple(start)) for _, (image, start) in chosen) == sorted(stage.chosen(method))


def test_greedy_picks_of_the_engine_are_the_published_ones(reference: Path) -> None:
    stage = Stage(reference, "s1")
    pool = [PoolImage(image, p.shape[2:], taken=tuple(stage.taken(image))) for image, p in stage.probs.items()]
    for method in ("pred_entropy", "exp_entropy", "mutual_information"):
        published = sorted((k for image in stage.probs for k in stage.kept(method, image)), key=lambda c: -c[2])
        keys = {"size": (6, 6, 6), "n_per_image": stage.per_image}
        picks = select(resolve(method), pool[::-1], Members(stage.probs), len(published), **keys)
        assert [(p.image, p.start) for p in picks] == [(image, start) for image, start, _ in published]
        assert [p.size for p in picks] == [stage.sizes[image] for image, _, _ in published]


# --- content of every response -------------------------------------------------------------------------------------


def test_a_pick_says_why() -> None:
    pool, evidence = world()
    picks = select(resolve("power_pe"), pool, evidence, 4, size=(4, 4, 4), labels=LABELS, seed=1)
    json.dumps([p.reason for p in picks], allow_nan=False)
    for rank, pick in enumerate(picks, start=1):
        grid = box_mean(evidence.moments(pick.image).predictive_entropy(), (4, 4, 4))
        assert pick.rank == rank
        assert pick.score == pytest.approx(float(grid[pick.start]))
        assert pick.score > 0
        assert pick.reason["uncertainty"] == "predictive_entropy"
        assert sum(pick.reason["predicted"].values()) == pytest.approx(1, abs=1e-3)
        assert set(pick.reason["predicted"]) <= set(LABELS)
        assert not any(
            boxes_overlap((tuple(pick.reason["runner_up"]["start"]), (4, 4, 4)), p.box)
            for p in picks
            if p.image == pick.reason["runner_up"]["image"]
        )
    utilities = [p.reason["utility"] for p in picks]
    assert utilities == sorted(utilities, reverse=True)


def test_one_image_at_a_time_and_once() -> None:
    pool, evidence = world()
    select(resolve("bald"), pool[::-1], evidence, 5, size=(4, 4, 4))
    assert evidence.read == ["case_0", "case_1", "case_2"]


@pytest.mark.parametrize("method", ["power_pe", "power_bald", "softrank_bald", "random", "random_fg_predicted"])
def test_seed_and_round_decide_and_nothing_else(method: str) -> None:
    pool, evidence = world()

    def run(images: list[PoolImage], **keys: int) -> list[tuple]:
        picks = select(resolve(method), images, evidence, 6, size=(3, 3, 3), labels=LABELS, **keys)
        return [(p.image, p.start) for p in picks]

    assert run(pool, seed=1, round_=2) == run(pool[::-1], seed=1, round_=2)
    assert run(pool, seed=1, round_=2) != run(pool, seed=2, round_=2)
    assert run(pool, seed=1, round_=2) != run(pool, seed=1, round_=3)


def test_a_batch_is_the_same_as_single_regions_one_after_the_other() -> None:
    pool, evidence = world(2)
    batch = [(p.image, p.start) for p in select(resolve("power_pe"), pool, evidence, 5, size=(4, 4, 4), seed=3)]
    single, current = [], pool
    for _ in range(5):
        (pick,) = select(resolve("power_pe"), current, evidence, 1, size=(4, 4, 4), seed=3)
        single.append((pick.image, pick.start))
        current = [PoolImage(i.id, i.shape, taken=(*i.taken, pick.box)) if i.id == pick.image else i for i in current]
    assert single == batch


def test_power_noise_of_the_engine_favours_high_scores_by_the_power_law() -> None:
    probs = softmax(np.random.default_rng(0).normal(0, 1, (3, 2, 4, 1, 1)))
    pool, evidence = [PoolImage("a", (4, 1, 1))], Members({"a": probs})
    scores = evidence.moments("a").predictive_entropy().ravel().astype(float)
    picks = [
        select(resolve("power_pe", {"beta": 2}), pool, evidence, 1, size=(1, 1, 1), seed=s)[0].start[0]
        for s in range(2000)
    ]
    expected = scores**2 / (scores**2).sum() * 2000
    assert stats.chisquare(np.bincount(picks, minlength=4), expected).pvalue > 1e-3


@pytest.mark.parametrize("unit", ["slice", "volume"])
def test_units_other_than_patches(unit: str) -> None:
    _, evidence = world()
    pool = [PoolImage(f"case_{i}", (14, 12, 10)) for i in range(3)]
    picks = select(resolve("predictive_entropy", {"unit": unit}), pool, evidence, 3, axis=1)
    scores = {i.id: evidence.moments(i.id).predictive_entropy().astype(float) for i in pool}
    if unit == "volume":
        assert [p.image for p in picks] == sorted(scores, key=lambda i: -scores[i].mean())
        assert all(p.size == (14, 12, 10) for p in picks)
    else:
        best = max((scores[i].mean(axis=(0, 2))[k], i, k) for i in scores for k in range(12))
        assert (picks[0].image, picks[0].start, picks[0].size) == (best[1], (0, best[2], 0), (14, 1, 10))


# --- running short and refusing ------------------------------------------------------------------------------------


def test_an_exhausted_pool_gives_what_is_left() -> None:
    pool, evidence = world(1, (4, 4, 8))
    pool = [PoolImage("case_0", (4, 4, 8), taken=(((0, 0, 0), (4, 4, 4)),))]
    with pytest.raises(PoolExhausted, match=r"pool exhausted: asked 3, 1 left$") as caught:
        select(resolve("bald"), pool, evidence, 3, size=(4, 4, 4))
    assert [p.start for p in caught.value.picks] == [(0, 0, 4)]
    with pytest.raises(PoolExhausted, match="asked 3, 1 left"):
        select(resolve("random"), pool, None, 3, size=(4, 4, 4))
    with pytest.raises(PoolExhausted, match="asked 2, 0 left"):
        select(resolve("random"), [], None, 2, size=(4, 4, 4))
    with pytest.raises(PoolExhausted, match="asked 3, 1 left with at most 1 per image"):
        select(resolve("bald"), world(1)[0], world(1)[1], 3, size=(4, 4, 4), n_per_image=1)


@pytest.mark.parametrize(
    ("method", "keys", "sentence"),
    [
        ("random_fg33", {}, "needs hints .*random_fg_predicted"),
        ("random_fg66", {"hints": [{"image": "other", "voxel": [1, 1, 1], "class": "one"}]}, "needs hints"),
        ("starting_budget", {}, "needs hints"),
        (
            "random_fg66",
            {"hints": [{"image": "case_0", "voxel": [14, 0, 0], "class": "one"}]},
            "lies outside of case_0",
        ),
        ("random_fg66", {"hints": [{"image": "case_0"}]}, "without voxel"),
        ("predictive_entropy", {"size": None}, "size in voxels or millimetres"),
        ("random", {"n": 0}, "one region or more"),
        ("random", {"n_per_image": 0}, "n_per_image must be one or more"),
        ("random", {"size": (0, 1, 1)}, "one voxel or more"),
        ("random", {"axis": 3}, "axis must be 0, 1 or 2"),
        ("precomputed", {}, "send regions"),
        ("precomputed", {"regions": [{"image": "nobody", "start": [0, 0, 0], "size": [1, 1, 1]}]}, "no such image"),
        ("precomputed", {"regions": [{"image": "case_0", "start": [13, 0, 0], "size": [2, 1, 1]}]}, "leaves the image"),
        ("precomputed", {"regions": [{"image": "case_0", "start": [3, 3, 3], "size": [2, 1, 1]}]}, "overlaps"),
        ("precomputed", {"regions": [{"image": "case_0", "start": [3, 3]}]}, "three whole numbers"),
    ],
)
def test_requests_that_cannot_be_served(method: str, keys: dict, sentence: str) -> None:
    pool, evidence = world()
    arguments = {"size": (4, 4, 4), "n": 2, **keys}
    with pytest.raises(MethodError, match=sentence):
        select(resolve(method), pool, evidence, arguments.pop("n"), **arguments)


def test_no_model_and_predictions_off_the_grid_are_refused() -> None:
    pool, evidence = world()
    with pytest.raises(MethodError, match="needs a trained model"):
        select(resolve("bald"), pool, None, 2, size=(4, 4, 4))
    with pytest.raises(
        MethodError, match=r"prediction for case_0 has the shape \(14, 12, 10\) and the image \(9, 9, 9\)"
    ):
        select(resolve("bald"), [PoolImage("case_0", (9, 9, 9))], evidence, 2, size=(4, 4, 4))
    with pytest.raises(MethodError, match="more than once"):
        select(resolve("random"), [pool[0], pool[0]], None, 2, size=(4, 4, 4))


# --- random families -----------------------------------------------------------------------------------------------


def test_hinted_families_and_replay() -> None:
    pool, _ = world()
    hints = hints_for(pool)
    picks = select(resolve("starting_budget"), pool, None, 6, size=(2, 2, 2), hints=hints, seed=1)
    assert sorted(p.reason["class"] for p in picks) == ["background", "background", "one", "one", "two", "two"]
    assert all(p.score == 0 for p in picks)
    assert {p.reason["area"] for p in select(resolve("random_fg66"), pool, None, 9, size=(2, 2, 2), hints=hints)} > {
        "all"
    }
    regions = [{"image": p.image, "start": list(p.start), "size": list(p.size), "query": 3} for p in picks]
    again = select(resolve("precomputed"), pool, None, 6, regions=regions)
    assert [(p.image, p.start, p.size) for p in again] == [(p.image, p.start, p.size) for p in picks]


def test_predicted_foreground_is_where_random_fg_predicted_looks() -> None:
    logits = np.zeros((2, 2, 30, 30, 30))
    logits[:, 0] = 5
    logits[:, 1, 20:25, 20:25, 20:25] = 10
    evidence = Members({"a": softmax(logits)})
    hits = 0
    for seed in range(60):
        (pick,) = select(
            resolve("random_fg_predicted"), [PoolImage("a", (30, 30, 30))], evidence, 1, size=(3, 3, 3), seed=seed,
            labels={"background": 0, "organ": 1},
        )  # fmt: skip
        hits += boxes_overlap(pick.box, ((20, 20, 20), (5, 5, 5)))
        if "class" in pick.reason:
            assert pick.reason["class"] == "organ"
            assert boxes_overlap(pick.box, ((20, 20, 20), (5, 5, 5)))
    assert 30 <= hits <= 55


@given(
    st.tuples(*[st.integers(1, 23)] * 3),
    st.tuples(*[st.integers(1, 25)] * 3),
    st.sampled_from(["patch", "slice", "volume"]),
    st.integers(0, 2),
)
def test_units_of_fixed_methods_reach_every_voxel(shape: tuple, size: tuple, unit: str, axis: int) -> None:
    image, covered = PoolImage("a", shape), np.zeros(shape, dtype=bool)
    ask = Ask(resolve("stochastic_batch", {"unit": unit}), 1, size, axis=axis)
    for start in tiles(ask, image):
        covered[tuple(slice(a, a + d) for a, d in zip(start, ask.box_size(image), strict=True))] = True
    assert covered.all()


@pytest.mark.parametrize("method", ["stochastic_batch", "stratified", "badge", "core_set", "typiclust", "usim_c"])
def test_a_batch_of_fixed_units_never_overlaps_and_fills_up_where_units_do(method: str) -> None:
    # Units start at 0, 3 and 6 of 10 voxels, so that one may overlap all others of its image.
    pool = [PoolImage(name, (10, 10, 10)) for name in "abcdef"]
    evidence = Synthetic(dict.fromkeys("abcdef", (10, 10, 10)))
    picks = select(resolve(method, {"unit": "patch"}), pool, evidence, 6, size=(4, 4, 4), labels=LABELS, utilities=True)
    assert {s for p in picks for s in p.start} <= {0, 3, 6}
    assert len(picks) == 6
    for k, pick in enumerate(picks):
        assert not any(o.image == pick.image and boxes_overlap(o.box, pick.box) for o in picks[:k])
        assert pick.reason["step"] is not None


def test_a_group_that_overlaps_goes_on_with_the_best_group_of_the_units_left() -> None:
    # Of 7 voxels, units of 4 start at 0 and 3 and share the voxel 3: one of them can be picked at most.
    pool = [PoolImage("a", (7, 4, 4)), PoolImage("b", (4, 4, 4)), PoolImage("c", (4, 4, 4))]
    evidence = Synthetic({i.id: i.shape for i in pool})
    for seed in range(20):
        picks = select(resolve("stochastic_batch", {"unit": "patch"}), pool, evidence, 3, size=(4, 4, 4), seed=seed)
        assert sorted(p.image for p in picks) == ["a", "b", "c"]
        with pytest.raises(PoolExhausted) as raised:
            select(resolve("stochastic_batch", {"unit": "patch"}), pool, evidence, 4, size=(4, 4, 4), seed=seed)
        assert sorted(p.image for p in raised.value.picks) == ["a", "b", "c"]
