# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Pieces of the query stage against the plain way of doing each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, signal

from eval.benchmarks import Row
from eval.benchmarks.timing import limit, memory, ratio
from lib.engine import PoolImage, select
from lib.methods import resolve
from lib.regions import Box, boxes_overlap
from lib.selectors.greedy import best_boxes_over
from lib.uncertainty import Moments
from lib.units import box_mean

Floats = NDArray[np.float32]

SIDE, BOX = 128, (32, 32, 32)
ONE = (1, 1, 1)


def run() -> list[Row]:
    """Rows of every piece of the query stage."""
    rng = np.random.default_rng(0)
    return [*moments_rows(rng), *aggregation_rows(rng), selection_row(rng), query_row(rng)]


def moments_rows(rng: np.random.Generator) -> list[Row]:
    """Predictive entropy, expected entropy and mutual information of 5 members."""
    members = [_probabilities(rng, (3, SIDE, SIDE, SIDE)) for _ in range(5)]

    def ours() -> tuple[Floats, Floats, Floats]:
        moments = Moments.from_members(members)
        return moments.predictive_entropy(), moments.expected_entropy(), moments.mutual_information()

    def stacked() -> tuple[torch.Tensor, ...]:
        probs = torch.stack([torch.from_numpy(p) for p in members])
        mean = probs.mean(0)
        predictive = -(mean * mean.log()).nan_to_num().sum(0)
        expected = -(probs * probs.log()).nan_to_num().sum(1).mean(0)
        return predictive, expected, predictive - expected

    for mine, plain in zip(ours(), stacked(), strict=True):
        assert np.abs(mine - plain.numpy()).max() < 1e-6, "both ways must give the same maps"
    return [
        ratio("moments of 5 members, 5 x 3 x 128^3", ours, stacked, 4.5),
        memory("moments of 5 members, extra peak memory", ours, stacked, 8.0),
    ]


def aggregation_rows(rng: np.random.Generator) -> list[Row]:
    """Means over every box of 32^3."""
    score = rng.random((SIDE, SIDE, SIDE), dtype=np.float32)
    kernel = np.full(BOX, 1 / np.prod(BOX), np.float32)
    exact = signal.fftconvolve(score.astype(np.float64), kernel.astype(np.float64), mode="valid")
    assert np.abs(box_mean(score, BOX) - exact).max() < 1e-6, "the error must stay below 1e-6"
    return [
        ratio("box mean 32^3 against fftconvolve", lambda: box_mean(score, BOX),
              lambda: signal.fftconvolve(score, kernel, mode="valid"), 10.0, 9, 5),
        ratio("box mean 32^3 against uniform_filter", lambda: box_mean(score, BOX),
              lambda: ndimage.uniform_filter(score, BOX), 4.0, 9, 5),
    ]  # fmt: skip


def selection_row(rng: np.random.Generator) -> Row:
    """The best 50 boxes of 50 volumes in which 300 boxes are taken."""
    grids = [rng.random((SIDE - 31,) * 3, dtype=np.float32) for _ in range(50)]
    taken = [disjoint_boxes(rng, 6, (12, 12, 12)) for _ in grids]

    def ours() -> list[tuple[int, tuple[int, ...], float]]:
        return [(i, s, v) for i, s, v in best_boxes_over(grids, BOX, ONE, taken, 50)]

    def plain() -> list[tuple[int, tuple[int, ...], float]]:
        return _sort_and_test(grids, BOX, taken, 50)

    assert ours() == plain(), "both ways must pick the same boxes"
    return ratio("greedy, 50 volumes of 128^3, 50 wanted, 300 taken", ours, plain, 60.0, 5, 1)


def query_row(rng: np.random.Generator) -> Row:
    """From cached moments to 50 regions in one image."""
    moments = Moments.from_members(iter([_probabilities(rng, (3, SIDE, SIDE, SIDE)) for _ in range(5)]))

    class Evidence:
        def moments(self, image: str) -> Moments:
            return moments

    pool = [PoolImage("image", (SIDE, SIDE, SIDE), taken=tuple(disjoint_boxes(rng, 300, (8, 8, 8))))]
    method = resolve("power_bald")

    def ours() -> object:
        return select(method, pool, Evidence(), 1, size=BOX)

    return limit("whole query stage, one 128^3 image, 300 taken: under 0.5 s", ours, 0.5)


def disjoint_boxes(rng: np.random.Generator, count: int, size: tuple[int, int, int]) -> list[Box]:
    """`count` boxes of `size` on a lattice in a volume of 128^3, none overlapping another."""
    per_axis = [SIDE // k for k in size]
    cells = np.unravel_index(rng.choice(int(np.prod(per_axis)), count, replace=False), per_axis)
    starts = np.stack(cells, axis=1) * size
    return [((int(x), int(y), int(z)), size) for x, y, z in starts]


def _sort_and_test(
    grids: Sequence[Floats], size: tuple[int, int, int], taken: Sequence[Sequence[Box]], wanted: int
) -> list[tuple[int, tuple[int, ...], float]]:
    """All positions of all images sorted, walked best first, each tested against every taken box of its image."""
    scores = np.stack([grid.ravel() for grid in grids])
    blocked, found = [list(boxes) for boxes in taken], list[tuple[int, tuple[int, ...], float]]()
    for flat in np.argsort(-scores, axis=None, kind="stable"):
        i, position = divmod(int(flat), scores.shape[1])
        x, y, z = (int(v) for v in np.unravel_index(position, grids[i].shape))
        if not any(boxes_overlap(((x, y, z), size), other) for other in blocked[i]):
            found.append((i, (x, y, z), float(grids[i][x, y, z])))
            blocked[i].append(((x, y, z), size))
            if len(found) == wanted:
                break
    return found


def _probabilities(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    odds = np.exp(3 * rng.standard_normal(shape, dtype=np.float32))
    return np.asarray(odds / odds.sum(axis=0, keepdims=True))
