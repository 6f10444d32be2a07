# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lib.querying.methods import MethodError, resolve
from lib.querying.selection import PoolExhausted, PoolImage, select
from lib.regions import boxes_overlap
from lib.selectors.class_stratified import ALL, allot, image_limits, merge_streams, pick_streams
from lib.selectors.greedy import best_boxes
from lib.selectors.noise import power, softrank
from lib.uncertainty import UNCERTAINTIES, Moments
from lib.units import box_mean
from tests.lib.worlds import LABELS, Members, hints_for, softmax, world

# --- the whole query stage against published arrays ------------------------------------------------------------------

RUNS = {"pred_entropy": 1.0, "exp_entropy": 1.0, "mutual_information": 1.0, "power_bald": 1.0, "power_bald_b10": 10.0}


def class_entropy(moments: Moments, c: int) -> np.ndarray:
    """U_c = predictive entropy * mean_c; ALL gives plain predictive entropy (ClaSP PE)."""
    entropy = moments.predictive_entropy()
    return entropy if c == ALL else entropy * moments.mean_of(c)


@pytest.mark.parametrize("run", ["s1", "s2", "s122", "nNone"])
def test_published_query_stage(shared: Path, run: str) -> None:
    folder = shared / "reference/nnactive/golden"
    inputs, golden = np.load(folder / "cd_inputs.npz"), np.load(folder / f"cd_query_{run}.npz")
    config = json.loads(str(golden["config"]))
    stride = config["agg_stride"]
    stride = tuple(stride) if isinstance(stride, list) else (stride,) * 3
    query, per_image = config["query_size"], config["n_patch_per_image"] or config["query_size"]
    images = [str(name) for name in inputs["image_order"]]
    taken = {
        image: [
            (tuple(map(int, c)), tuple(map(int, s)))
            for f, c, s in zip(inputs["ann_file"], inputs["ann_coords"], inputs["ann_size"], strict=True)
            if f == image
        ]
        for image in images
    }
    grids = {}
    for image in images:
        moments = Moments.from_members(inputs[f"probs_{image}"])
        size = tuple(min(6, n) for n in moments.shape[1:])
        grids[image] = {u: box_mean(UNCERTAINTIES[u](moments), size, stride) for u in UNCERTAINTIES}, size
    for method in [*RUNS, "softrank_bald", "power_pe"]:
        rng = np.random.default_rng(4242 if method == "power_pe" else int(inputs["seed"]))
        resolved = resolve(method)
        kept: list[tuple] = []
        for image in images:
            maps, size = grids[image]
            grid = maps[resolved.uncertainty].astype(np.float64)
            if resolved.selector == "power":
                grid = power(grid, RUNS.get(method, 1.0), rng)
            limit = 2 * per_image if resolved.selector == "softrank" else per_image
            kept += [(image, s, v) for s, v in best_boxes(grid, size, stride, taken[image], limit)]
        np.testing.assert_array_equal([s for _, s, _ in kept], golden[f"{method}__top_coords"], err_msg=method)
        np.testing.assert_allclose([v for _, _, v in kept], golden[f"{method}__top_score"], atol=2e-6, rtol=2e-5)
        if resolved.selector == "softrank":
            ranked = sorted(kept, key=lambda c: -c[2])
            soft = softrank([v for _, _, v in ranked], 1.0, rng)
            chosen = [ranked[i] for i in np.argsort(-soft, kind="stable")[:query]]
        else:
            chosen = sorted(kept, key=lambda c: -c[2])[:query]
        np.testing.assert_array_equal([s for _, s, _ in chosen], golden[f"{method}__sel_coords"], err_msg=method)
        assert [f"{i}.nii.gz" for i, _, _ in chosen] == golden[f"{method}__sel_file"].tolist()


BETAS = {
    "class_pe66": None, "class_pe33": None, "class_power_pe66": 1.0, "class_power_pe66_exp": 10**0.5,
}  # fmt: skip


@pytest.mark.parametrize("run", ["s1", "s2", "s122"])
@pytest.mark.parametrize("method", BETAS)
def test_published_class_stratified_stage(shared: Path, run: str, method: str) -> None:
    folder = shared / "reference/nnactive/golden"
    inputs, golden = np.load(folder / "cd_inputs.npz"), np.load(folder / f"cd_query_{run}.npz")
    config = json.loads(str(golden["config"]))
    stride = config["agg_stride"]
    stride = tuple(stride) if isinstance(stride, list) else (stride,) * 3
    ratio, query, per_image = float(resolve(method).options["ratio"]), config["query_size"], config["n_patch_per_image"]
    rng = np.random.default_rng(int(inputs["seed"]))
    streams: dict[int, list] = {1: [], 2: [], ALL: []}
    for image in map(str, inputs["image_order"]):
        moments = Moments.from_members(inputs[f"probs_{image}"])
        size = tuple(min(6, n) for n in moments.shape[1:])
        grids = {c: box_mean(class_entropy(moments, c), size, stride).astype(np.float64) for c in (1, 2, ALL)}
        if BETAS[method]:
            grids = {c: power(g, BETAS[method], rng) for c, g in grids.items()}
        taken = [
            (tuple(map(int, c)), tuple(map(int, s)))
            for f, c, s in zip(inputs["ann_file"], inputs["ann_coords"], inputs["ann_size"], strict=True)
            if f == image
        ]
        found = pick_streams(grids, size, stride, taken, image_limits(per_image, ratio, [1, 2]), rng)
        for stream, boxes in found.items():
            streams[stream] += [(score, (image, start)) for start, score in boxes]
    for stream, kept in streams.items():
        np.testing.assert_array_equal([s for _, (_, s) in kept], golden[f"{method}__top_cls{stream}_coords"])
        np.testing.assert_allclose(
            [u for u, _ in kept], golden[f"{method}__top_cls{stream}_score"], atol=2e-6, rtol=2e-5
        )
    chosen, lacking = merge_streams(streams, allot(query, ratio, [1, 2], rng))
    assert not lacking
    mine = sorted((f"{image}.nii.gz", tuple(start)) for _, (image, start) in chosen)
    published = zip(golden[f"{method}__sel_file"], golden[f"{method}__sel_coords"], strict=True)
    assert mine == sorted((str(f), tuple(int(v) for v in c)) for f, c in published)


def test_greedy_picks_of_the_engine_are_the_published_ones(shared: Path) -> None:
    folder = shared / "reference/nnactive/golden"
    inputs, golden = np.load(folder / "cd_inputs.npz"), np.load(folder / "cd_query_s1.npz")
    probs = {str(name): inputs[f"probs_{name}"] for name in inputs["image_order"]}
    pool = [
        PoolImage(
            name,
            p.shape[2:],
            taken=tuple(
                (tuple(map(int, c)), tuple(map(int, s)))
                for f, c, s in zip(inputs["ann_file"], inputs["ann_coords"], inputs["ann_size"], strict=True)
                if f == name
            ),
        )
        for name, p in probs.items()
    ]
    for method in ("pred_entropy", "exp_entropy", "mutual_information"):
        picks = select(resolve(method), pool[::-1], Members(probs), 8, size=(6, 6, 6), n_per_image=6)
        np.testing.assert_array_equal([p.start for p in picks], golden[f"{method}__sel_coords"])
        np.testing.assert_array_equal([p.size for p in picks], golden[f"{method}__sel_size"])
        assert [f"{p.image}.nii.gz" for p in picks] == golden[f"{method}__sel_file"].tolist()


# --- what every answer carries -------------------------------------------------------------------------------------


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
    with pytest.raises(PoolExhausted, match="asked 3, 1 left with at most 1 an image"):
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
