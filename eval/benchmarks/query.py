# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Pieces of the query stage against the plain way of doing each."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, signal
from sklearn.cluster import kmeans_plusplus as sklearn_kmeans_plusplus

from eval.benchmarks import Row
from eval.benchmarks.timing import limit, memory, ratio
from lib.querying.candidate_cache import MemorySummaries
from lib.querying.methods import resolve
from lib.querying.selection import PoolImage, select
from lib.regions import Box, boxes_overlap
from lib.selectors.badge import kmeans_plus_plus
from lib.selectors.core_set import k_center
from lib.selectors.greedy import best_boxes
from lib.selectors.submodular import flqmi
from lib.uncertainty import Moments
from lib.units import box_mean

Floats = NDArray[np.float32]

SIDE, BOX = 128, (32, 32, 32)
ONE = (1, 1, 1)


def run() -> Iterator[Row]:
    """Rows of every piece of the query stage, each as it is measured."""
    rng = np.random.default_rng(0)
    yield from moments_rows(rng)
    yield from aggregation_rows(rng)
    for piece in (selection_row, query_row, mutual_information_row, k_center_row, kmeans_row, pool_row):
        yield piece(rng)


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
    """The best 50 boxes of 50 volumes in which 300 boxes are taken, image by image as in a query."""
    grids = [rng.random((SIDE - 31,) * 3, dtype=np.float32) for _ in range(50)]
    taken = [disjoint_boxes(rng, 6, (12, 12, 12)) for _ in grids]

    def ours() -> Sequence[tuple[int, tuple[int, ...], float]]:
        images = enumerate(zip(grids, taken, strict=True))
        offers = [(i, s, v) for i, (grid, boxes) in images for s, v in best_boxes(grid, BOX, ONE, boxes, 50)]
        return sorted(offers, key=lambda offer: -offer[2])[:50]

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


def mutual_information_row(rng: np.random.Generator) -> Row:
    """Lazy greedy against evaluating every candidate at every step."""
    similarity = rng.standard_normal((20_000, 1_000), dtype=np.float32)
    chosen: dict[str, list[int]] = {}

    def lazy() -> None:
        chosen["lazy"] = flqmi(similarity, 100)[0].tolist()

    def naive() -> None:
        covered, picked = np.zeros(1_000, np.float32), list[int]()
        own = np.maximum(similarity.max(axis=1), 0).astype(np.float64)
        for _ in range(100):
            gains = np.maximum(similarity - covered, 0).sum(axis=1, dtype=np.float64) + own
            gains[picked] = -np.inf
            picked.append(int(gains.argmax()))
            covered = np.maximum(covered, similarity[picked[-1]])
        chosen["naive"] = picked

    found = ratio("facility-location mutual information, U 20,000, Q 1,000, B 100", lazy, naive, 7.0, 3, 1)
    assert chosen["lazy"] == chosen["naive"], "both ways must reach exactly the same value"
    return found


def k_center_row(rng: np.random.Generator) -> Row:
    """Distances to the newest centre only against the distances to all centres at every pick."""
    features = rng.standard_normal((50_000, 512), dtype=np.float32)
    labelled = rng.standard_normal((20, 512), dtype=np.float32)
    picked: dict[str, list[int]] = {}

    def ours() -> None:
        picked["ours"] = k_center(features, labelled, 100).tolist()

    def plain() -> None:
        rows, centres, chosen = torch.from_numpy(features), torch.from_numpy(labelled), list[int]()
        for _ in range(100):
            chosen.append(int(torch.cdist(rows, centres).min(dim=1).values.argmax()))
            centres = torch.cat([centres, rows[chosen[-1:]]])
        picked["plain"] = chosen

    found = ratio("k-center, 50,000 x 512, B 100", ours, plain, 3.0, 3, 1)
    assert picked["ours"] == picked["plain"], "both ways must pick the same rows"
    return found


def kmeans_row(rng: np.random.Generator) -> Row:
    """k-means++ against scikit-learn's."""
    embeddings = rng.standard_normal((20_000, 2_048), dtype=np.float32)
    return ratio(
        "k-means++ on gradients, 20,000 x 2,048, B 100",
        lambda: kmeans_plus_plus(embeddings, 100, np.random.default_rng(0)),
        lambda: sklearn_kmeans_plusplus(embeddings, 100, random_state=0),
        6.0, 3, 1,
    )  # fmt: skip


def pool_row(rng: np.random.Generator) -> Row:
    """The next batch of 50 from 2,000 images whose candidate summaries are kept, some of them outdated."""
    shape, method = (24, 24, 24), resolve("power_pe")
    shared = [Moments.from_members(iter([_probabilities(rng, (3, *shape)) for _ in range(2)])) for _ in range(8)]

    class Evidence:
        summaries = MemorySummaries()

        def moments(self, image: str) -> Moments:
            return shared[int(image) % len(shared)]

    evidence, pool = Evidence(), [PoolImage(f"{i:04d}", shape) for i in range(2000)]
    picks = select(method, pool, evidence, 50, size=(8, 8, 8))
    taken = {p.image: (p.box,) for p in picks}
    pool = [PoolImage(i.id, i.shape, taken=taken.get(i.id, ())) for i in pool]
    untouched = [copy.deepcopy(evidence.summaries) for _ in range(5)]

    def ours() -> None:
        Evidence.summaries = untouched.pop()
        select(method, pool, evidence, 50, size=(8, 8, 8))

    return limit("pool of 2,000 images, next batch of 50: under 0.2 s", ours, 0.2)


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
