# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Requirements on every registered method."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lib.querying.methods import REGISTRY, MethodError, compose, resolve
from lib.querying.registry import SELECTORS
from lib.querying.selection import Pick, PoolExhausted, PoolImage, select
from lib.regions import Box, boxes_overlap
from lib.uncertainty import UNCERTAINTIES, Moments

LABELS = {"background": 0, "one": 1, "two": 2}
SHAPES = {"case_a": (16, 12, 10), "case_b": (12, 12, 12), "case_c": (10, 16, 14), "case_d": (14, 3, 12)}
TAKEN: dict[str, tuple[Box, ...]] = {
    "case_a": (((0, 0, 0), (5, 4, 4)), ((8, 8, 2), (4, 4, 4))),
    "case_b": (((0, 0, 4), (12, 12, 1)),),
}


class Synthetic:
    """Evidence made of smooth random maps, the same in every process."""

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]] = SHAPES, logit: float | None = None) -> None:
        self.shapes = shapes
        self.logit = logit

    def moments(self, image: str) -> Moments:
        rng = np.random.default_rng(sorted(self.shapes).index(image))
        logits = rng.normal(0, 2, (4, 3, *self.shapes[image]))
        if self.logit is not None:  # saturated background with a small uncertain corner
            corner = logits[..., -3:, -2:, -3:].copy()
            logits[:] = 0
            logits[:, 0] = self.logit
            logits[..., -3:, -2:, -3:] = corner
        e = np.exp(logits - logits.max(1, keepdims=True))
        return Moments.from_members((e / e.sum(1, keepdims=True)).astype(np.float32))

    def features(self, image: str, boxes: Sequence[Box]) -> np.ndarray:
        mean = self.moments(image).mean
        cuts = [tuple(slice(a, a + d) for a, d in zip(*box, strict=True)) for box in boxes]
        return np.array(
            [np.r_[mean[(slice(None), *c)].mean((1, 2, 3)), mean[(slice(None), *c)].std((1, 2, 3))] for c in cuts]
        )

    def labelled_features(self) -> np.ndarray:
        return np.concatenate(
            [self.features(image, boxes) for image, boxes in TAKEN.items() if image in self.shapes]
            or [np.zeros((0, 6))]
        )

    def gradients(self, image: str, boxes: Sequence[Box], layer: str) -> np.ndarray:
        features = self.features(image, boxes)
        return np.concatenate([features - 0.3, features**2, np.sin(9 * features)], axis=1)

    def class_frequencies(self) -> np.ndarray:
        return np.array([1.2, 0.3, 0.0])


def pool(names: Sequence[str] = tuple(SHAPES)) -> list[PoolImage]:
    return [PoolImage(name, SHAPES[name], taken=TAKEN.get(name, ())) for name in names]


def hints() -> list[dict]:
    return [
        {"image": image, "voxel": [7 + k, 2, 6 + k], "class": c, "area": area}
        for image in SHAPES
        for k, c in enumerate(LABELS)
        for area in ("inside", "border")
    ]


def ask(
    name: str, n: int, images: Sequence[PoolImage], evidence: Synthetic | None = None, **keys: object
) -> list[Pick]:
    method = resolve(name, {"unit": keys.pop("unit")} if "unit" in keys else {})
    given: dict = {"size": (4, 4, 4), "seed": 5, "round_": 1, "labels": LABELS, **keys}
    if "hints" in method.needs:
        given["hints"] = hints()
    if "regions" in method.needs:
        spots = [
            ("case_c", (0, 0, 0)),
            ("case_d", (4, 0, 4)),
            ("case_a", (12, 0, 0)),
            ("case_c", (4, 4, 4)),
            ("case_b", (0, 0, 6)),
        ]
        given["regions"] = [{"image": i, "start": s, "size": (3, 3, 3)} for i, s in spots[:n]]
    return select(method, images, evidence or Synthetic(), n, **given)


def units_of(name: str) -> list[tuple[str, str]]:
    return [(name, unit) for unit in SELECTORS[REGISTRY[name].selector].units]


EVERY = [pair for name in REGISTRY for pair in units_of(name)]
N = {"patch": 5, "slice": 5, "volume": 2}


@pytest.mark.parametrize(("name", "unit"), EVERY)
def test_contract(name: str, unit: str) -> None:
    n = N[unit]
    picks = ask(name, n, pool(), unit=unit)
    assert len(picks) == n
    assert [p.rank for p in picks] == list(range(1, n + 1))
    for k, pick in enumerate(picks):
        shape = SHAPES[pick.image]
        assert pick.unit == unit
        assert all(a >= 0 and a + d <= s for a, d, s in zip(pick.start, pick.size, shape, strict=True))
        assert not any(boxes_overlap(pick.box, box) for box in TAKEN.get(pick.image, ()))
        assert not any(o.image == pick.image and boxes_overlap(o.box, pick.box) for o in picks[:k])
        assert np.isfinite(pick.score)
        assert pick.score >= 0
        if name != "precomputed":
            expected = {"patch": tuple(min(4, s) for s in shape), "slice": (*shape[:2], 1), "volume": shape}[unit]
            assert pick.size == expected
    json.dumps([p.reason for p in picks], allow_nan=False)


FALLING = ("greedy", "power", "core_set", "usim")
UNRANKED = ("random", "random_fg", "random_fg_predicted", "starting_budget", "precomputed", "strided")


@pytest.mark.parametrize(("name", "unit"), EVERY)
def test_utilities_of_every_step_are_told_on_request(name: str, unit: str) -> None:
    n = N[unit]
    plain, told = ask(name, n, pool(), unit=unit), ask(name, n, pool(), unit=unit, utilities=True)
    steps = [p.reason["step"] for p in told]
    assert [replace(p, reason={k: v for k, v in p.reason.items() if k != "step"}) for p in told] == plain
    json.dumps(steps, allow_nan=False)
    for k, record in enumerate(steps):
        assert set(record) == {"utility", "candidates", "left"}
        assert len(record["candidates"]) <= 5
        assert record["left"] is None or record["left"] >= len(record["candidates"])
        for c in record["candidates"]:
            box = tuple(c["start"]), tuple(c["size"])
            assert not any(boxes_overlap(box, taken) for taken in TAKEN.get(c["image"], ()))
            assert not any(o.image == c["image"] and boxes_overlap(o.box, box) for o in told[: k + 1])
    utilities = [record["utility"] for record in steps]
    selector = REGISTRY[name].selector
    if selector in UNRANKED:
        assert utilities == [None] * n
        return
    if selector != "typiclust":  # a unit alone in its cluster is typical of nothing
        assert all(u is not None for u in utilities[1:])
    if selector in FALLING:
        known = [u for u in utilities if u is not None]
        assert known == sorted(known, reverse=True)
    if selector not in ("kmeans_plus_plus", "peaks"):  # a draw, and peaks before other slices
        for record in steps:
            others = [c["utility"] for c in record["candidates"]]
            assert others == sorted(others, key=lambda u: -np.inf if u is None else -u)
            assert record["utility"] is None or all(record["utility"] >= u for u in others)


@pytest.mark.parametrize("name", REGISTRY)
def test_neither_the_order_of_the_pool_nor_of_calls_matters(name: str) -> None:
    first = ask(name, 2, pool())
    ask(name, 2, pool(), seed=9)
    assert ask(name, 2, pool(tuple(reversed(SHAPES)))) == first


@pytest.mark.slow
def test_another_process_picks_the_same() -> None:
    path = "import sys; sys.path[:0] = ['apps/activelearning', '.']\n"
    code = "import tests.lib.querying.test_conformance as t\n"
    code += "for m in t.REGISTRY: print(m, [(p.image, p.start) for p in t.ask(m, 2, t.pool())])"
    root = Path(__file__).resolve().parents[3]
    out = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True, cwd=root)
    here = [f"{name} {[(p.image, p.start) for p in ask(name, 2, pool())]}" for name in REGISTRY]
    assert out.stdout.splitlines() == here


@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "precomputed"])
def test_an_exhausted_pool_is_told_and_gives_what_is_left(name: str) -> None:
    with pytest.raises(PoolExhausted, match=r"pool exhausted: asked 5000, \d+ left") as caught:
        ask(name, 5000, pool(), utilities=True)
    picks = caught.value.picks
    assert str(caught.value) == f"pool exhausted: asked 5000, {len(picks)} left"
    assert picks
    assert all("step" in pick.reason for pick in picks)
    for k, pick in enumerate(picks):
        assert not any(boxes_overlap(pick.box, box) for box in TAKEN.get(pick.image, ()))
        assert not any(o.image == pick.image and boxes_overlap(o.box, pick.box) for o in picks[:k])
    full = [PoolImage(name_, SHAPES[name_], taken=(((0, 0, 0), SHAPES[name_]),)) for name_ in SHAPES]
    with pytest.raises(PoolExhausted, match="asked 3, 0 left"):
        ask(name, 3, full)


@pytest.mark.parametrize("logit", [20.0, 40.0])
@pytest.mark.parametrize("name", [n for n in REGISTRY if REGISTRY[n].uncertainty is not None])
def test_saturated_background_is_not_ranked_first(name: str, logit: float) -> None:
    picks = ask(name, 2, pool(), Synthetic(logit=logit))
    assert all(np.isfinite(p.score) and p.score >= 0 for p in picks)
    if SELECTORS[REGISTRY[name].selector] in (SELECTORS["greedy"], SELECTORS["power"]):
        assert picks[0].score > 0


@pytest.mark.parametrize("uncertainty", UNCERTAINTIES)
@pytest.mark.parametrize("selector", [s for s in SELECTORS if SELECTORS[s].scored])
def test_every_uncertainty_works_with_every_selector_and_unit(uncertainty: str, selector: str) -> None:
    for unit in SELECTORS[selector].units:
        parts = {"posterior": "ensemble", "uncertainty": uncertainty, "selector": selector, "unit": unit}
        picks = select(compose(parts), pool(), Synthetic(), 2, size=(4, 4, 4), labels=LABELS, round_=1)
        assert len(picks) == 2
        assert picks[0].reason["uncertainty"] == uncertainty


def test_evidence_without_features_or_gradients_is_refused_in_a_sentence() -> None:
    class OnlyMoments:
        moments = Synthetic().moments

    for name, what in (
        ("core_set", "features"),
        ("kmeans_bald", "features"),
        ("badge", "gradients"),
        ("usim_f", "gradients"),
    ):
        with pytest.raises(MethodError, match=f"{name} needs {what} of the network"):
            select(resolve(name), pool(), OnlyMoments(), 2, size=(4, 4, 4), labels=LABELS)
