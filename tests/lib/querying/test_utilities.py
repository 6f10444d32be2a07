# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Summaries of the candidates of images, and utilities of every step: the picks stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib.prediction.candidate_store import SummaryFile
from lib.querying.candidate_cache import MemorySummaries
from lib.querying.methods import resolve
from lib.querying.selection import PoolImage, select
from tests.lib.worlds import LABELS, Members, softmax, world


class Summarised(Members):
    def __init__(self, members: dict[str, np.ndarray]) -> None:
        super().__init__(members)
        self.summaries = MemorySummaries()


@pytest.mark.parametrize("method", ["predictive_entropy", "power_pe", "power_bald"])
@pytest.mark.parametrize("n_per_image", [None, 2])
def test_summaries_give_the_same_picks_and_read_only_what_can_win(method: str, n_per_image: int | None) -> None:
    pool, evidence = world(9)
    kept, resolved, rng = Summarised(evidence.members), resolve(method), np.random.default_rng(0)
    for turn in range(5):
        keys = {"size": (4, 4, 4), "seed": 3, "n_per_image": n_per_image}
        plain = select(resolved, pool, evidence, 4, **keys)
        kept.read.clear()
        assert select(resolved, pool, kept, 4, **keys) == plain
        assert (len(set(kept.read)) == 9) if turn == 0 else (len(set(kept.read)) < 9)
        asked = {p.image: p.box for p in plain}
        pool = [
            PoolImage(
                i.id, i.shape, taken=(*i.taken[int(rng.integers(2)) :], *([asked[i.id]] if i.id in asked else []))
            )
            for i in pool
        ]


# --- utilities of every step ---------------------------------------------------------------------------------------


class WithFeatures(Members):
    """One feature a box, its first coordinate squared; gradients are twice that."""

    def features(self, image: str, boxes: list) -> np.ndarray:
        return np.array([[float(start[0] ** 2)] for start, _ in boxes])

    def labelled_features(self) -> np.ndarray:
        return np.array([[30.0]])

    def gradients(self, image: str, boxes: list, layer: str) -> np.ndarray:
        return 2 * self.features(image, boxes)

    def class_frequencies(self) -> np.ndarray:
        return np.ones(3)


def steps(method: str, n: int, evidence: Members, pool: list[PoolImage], options: dict | None = None, **keys) -> list:
    picks = select(resolve(method, options), pool, evidence, n, size=(4, 1, 1), utilities=True, **keys)
    return [(p.start[0], p.reason["step"]) for p in picks]


@pytest.mark.parametrize("method", ["bald", "power_bald"])
@pytest.mark.parametrize("kind", [Members, Summarised])
def test_alternatives_of_a_step_are_the_next_best_boxes(method: str, kind: type[Members]) -> None:
    pool, evidence = world(2)
    chosen = resolve(method)
    keys = {"size": (4, 4, 4), "seed": 3}
    told = select(chosen, pool, kind(evidence.members), 2, utilities=True, **keys)
    further = select(chosen, pool, evidence, 7, **keys)
    for k, pick in enumerate(told):
        assert pick.reason["step"] == {
            "utility": further[k].reason["utility"],
            "candidates": [
                {"image": p.image, "start": list(p.start), "size": [4, 4, 4], "utility": p.reason["utility"]}
                for p in further[k + 1 : k + 6]
            ],
            "left": None,
        }


def test_utilities_of_steps_over_features_by_hand() -> None:
    pool = [PoolImage("a", (16, 1, 1))]  # features 0, 16, 64 and 144 of the units at 0, 4, 8 and 12; 30 is labelled
    evidence = WithFeatures({"a": softmax(np.random.default_rng(0).normal(0, 1, (3, 3, 16, 1, 1)))})

    def told(method: str, n: int, **options: object) -> list[tuple[int, float, list, int]]:
        return [
            (start, s["utility"], [(c["start"][0], c["utility"]) for c in s["candidates"]], s["left"])
            for start, s in steps(method, n, evidence, pool, {"unit": "patch", **options})
        ]

    assert told("core_set", 2) == [
        (12, 114, [(8, 34), (0, 30), (4, 14)], 3),
        (8, 34, [(0, 30), (4, 14)], 2),
    ]
    start, utility, others, left = told("badge", 2)[0]
    assert (start, utility, left) == (12, 288.0**2, 3)
    assert others == [(8, 128.0**2), (4, 32.0**2), (0, 0.0)]
    start, utility, others, left = told("badge", 2)[1]
    assert utility == (288.0 - 2 * start**2) ** 2
    assert left == 2
    scores = evidence.moments("a").mutual_information().astype(float).reshape(4, 4).mean(axis=1)
    group = told("stochastic_batch", 2, posterior="ensemble", uncertainty="bald")
    worth = np.mean([scores[start // 4] for start, *_ in group])
    assert [(others, left) for _, _, others, left in group] == [([], 2)] * 2
    assert [utility for _, utility, _, _ in group] == pytest.approx([worth] * 2)


def test_utilities_of_evenly_spread_units_are_minus_the_labelled_share() -> None:
    pool = [PoolImage("a", (16, 1, 1), taken=(((0, 0, 0), (4, 1, 1)),)), PoolImage("b", (8, 1, 1))]
    picks = select(resolve("stratified", {"unit": "patch"}), pool, None, 3, size=(4, 1, 1), utilities=True)
    assert [(p.image, p.reason["step"]["utility"], p.reason["step"]["left"]) for p in picks] == [
        ("b", 0.0, 4),
        ("a", -0.25, 3),
        *[(p.image, -0.5, 2) for p in picks[2:]],
    ]


@pytest.mark.parametrize("method", ["clasp_pe", "class_stratified", "softrank_bald"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_every_image_offers_is_remembered_until_its_boxes_change(
    method: str, on_disk: bool, tmp_path: Path
) -> None:
    pool, evidence = world(9)
    kept, resolved = Summarised(evidence.members), resolve(method)
    if on_disk:
        kept.summaries = SummaryFile(tmp_path / "summaries.sqlite", {image.id: "digest" for image in pool})
    keys = {"size": (4, 4, 4), "seed": 3, "round_": 1, "labels": LABELS}
    changed = {image.id for image in pool}
    for _ in range(4):
        plain = select(resolved, pool, evidence, 4, **keys)
        kept.read.clear()
        assert select(resolved, pool, kept, 4, **keys) == plain
        # The first image is opened besides to see how many classes there are.
        assert changed <= set(kept.read) <= changed | {"case_0"}
        changed = {pick.image for pick in plain}
        pool = [PoolImage(i.id, i.shape, taken=(*i.taken, *(p.box for p in plain if p.image == i.id))) for i in pool]
    later = {**keys, "round_": 2}
    assert select(resolved, pool, kept, 4, **later) == select(resolved, pool, evidence, 4, **later)
