# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Selection from a fixed set of units, disjoint tiles of every image, where whole batches or features are compared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from lib.pool import (
    Ask,
    Candidate,
    Evidence,
    Pick,
    PoolImage,
    picks_from,
    with_features,
    with_gradients,
)
from lib.pool_scored import image_candidates, moments_of, score_map
from lib.regions import Triple
from lib.registry_schema import MethodError
from lib.selectors.badge import kmeans_plus_plus
from lib.selectors.core_set import k_center
from lib.selectors.random_regions import BACKGROUND
from lib.selectors.representative import (
    farthest_on_average,
    mean_shift_clusters,
    reduced_features,
    stratified,
)
from lib.selectors.stochastic import stochastic_batch
from lib.selectors.strided import strided_blocks
from lib.selectors.typiclust import typiclust
from lib.selectors.usim import usim
from lib.units import unit_grid

Units = list[tuple[PoolImage, Triple, Triple]]


def tiles(ask: Ask, image: PoolImage) -> list[Triple]:
    """Starts of the disjoint units of `image`: patches side by side from its first voxel, every slice, or all of it."""
    size = ask.box_size(image)
    axes = (range(0, n - k + 1, k) for n, k in zip(image.shape, size, strict=True))
    return [(x, y, z) for x, y, z in product(*axes)]


def free_units(ask: Ask, pool: Sequence[PoolImage]) -> Units:
    """Units that meet no taken box, image by image."""
    found: Units = []
    for image in pool:
        size = ask.box_size(image)
        found += [(image, start, size) for start in tiles(ask, image) if image.is_free((start, size))]
    return found


def unit_scores(
    ask: Ask, image: PoolImage, maps: Sequence[NDArray[np.float32]], starts: Sequence[Triple]
) -> NDArray[np.float64]:
    """Mean of each map (X, Y, Z) over the units at `starts`, (units, maps)."""
    size = ask.box_size(image)
    cells = tuple(np.array(starts, dtype=np.intp).reshape(-1, 3).T // np.array(size)[:, None])
    return np.stack([unit_grid(m, size, size)[cells].astype(np.float64) for m in maps], axis=1)


def _scored_units(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Candidate]:
    found: list[Candidate] = []
    for image in pool:
        units = free_units(ask, [image])
        if units:
            starts = [start for _, start, _ in units]
            scores = unit_scores(ask, image, [score_map(ask, moments_of(image, evidence))], starts)[:, 0]
            found += [
                Candidate(image.id, s, units[0][2], float(v), float(v)) for s, v in zip(starts, scores, strict=True)
            ]
    return found


def select_stochastic(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """The random group of n units with the highest mean score (Gaillochet et al. 2023)."""
    units = _scored_units(ask, pool, evidence)
    if not units:
        return []
    indices = stochastic_batch(
        [c.score for c in units],
        ask.n,
        ask.rng("groups"),
        statistic=str(ask.option("statistic")),
        keep_last=bool(ask.option("keep_last")),
        groups=int(ask.option("groups")) or None,
        resample=bool(ask.option("resample")),
    )
    return picks_from(ask, [units[i] for i in indices])


def select_stratified(ask: Ask, pool: Sequence[PoolImage]) -> list[Pick]:
    """Units spread over the images so that the same share (or number) of each is annotated (StrRS)."""
    units = [(i, start, ask.box_size(i)) for i in pool for start in tiles(ask, i)]
    labelled = [not image.is_free((start, size)) for image, start, size in units]
    rng = ask.rng("strata")
    indices = stratified([i.id for i, _, _ in units], labelled, ask.n, rng, str(ask.option("equal")))
    return _plain(ask, units, indices)


def select_strided(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence | None) -> list[Pick]:
    """The outer slices of blocks; those between can be interpolated (Burmeister 2022)."""
    images = {i.id: i for i in pool}
    free = {i.id: np.array([i.is_free((start, ask.box_size(i))) for start in tiles(ask, i)], dtype=bool) for i in pool}
    scores: dict[str, NDArray[np.floating]] | None = None
    if ask.method.uncertainty is not None:
        assert evidence is not None, "`select` refuses a method that ranks without a model"
        scores = {
            i.id: unit_scores(ask, i, [score_map(ask, moments_of(i, evidence))], tiles(ask, i))[:, 0] for i in pool
        }
    thickness = int(ask.option("thickness"))
    blocks = strided_blocks(free, thickness, ask.n, ask.rng("blocks"), scores=scores)
    chosen = []
    for block in blocks:
        image = images[block.scan]
        reason = {
            "block": {"top": block.top, "bottom": block.bottom, "axis": ask.axis},
            "pseudo_labels": ask.option("pseudo_labels"),
        }
        for position in block.annotated:
            start = tiles(ask, image)[position]
            score = float(scores[block.scan][position]) if scores else 0.0
            chosen.append(Candidate(image.id, start, ask.box_size(image), score, score, reason))
    return picks_from(ask, chosen)


def select_by_features(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """Core-set, clusters, distance or typicality over the features of units."""
    units = free_units(ask, pool)
    if not units:
        return []
    source = with_features(evidence, ask)
    features = np.concatenate([source.features(i.id, boxes) for i, boxes in _by_image(units)])
    labelled = source.labelled_features()
    rng, selector = ask.rng("features"), ask.method.selector
    if selector == "core_set":
        return _plain(ask, units, k_center(features, labelled, ask.n))
    if selector == "distance":
        return _plain(ask, units, farthest_on_average(*_reduced(features, labelled, ask), ask.n))
    if selector == "typiclust":
        return _plain(ask, units, typiclust(features, labelled, ask.n, rng, int(ask.option("neighbours"))))
    free, known = _reduced(features, labelled, ask)
    clusters = mean_shift_clusters(np.concatenate([free, known]), float(ask.option("bandwidth")) or None)
    flags = np.arange(len(clusters)) >= len(free)
    return _plain(ask, units, stratified(clusters.tolist(), flags, ask.n, rng))


def _reduced(
    features: NDArray[np.floating], labelled: NDArray[np.floating], ask: Ask
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    everything = np.concatenate([features, labelled]) if len(labelled) else features
    points = reduced_features(everything, int(ask.option("components")))
    return points[: len(features)], points[len(features) :]


def select_by_gradients(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """BADGE and USIM over gradients of units."""
    units = free_units(ask, pool)
    if not units:
        return []
    source = with_gradients(evidence, ask)
    layer = str(ask.option("layer"))
    gradients = np.concatenate([source.gradients(i.id, boxes, layer) for i, boxes in _by_image(units)])
    rng = ask.rng("gradients")
    if ask.method.selector == "kmeans_plus_plus":
        return _plain(ask, units, kmeans_plus_plus(gradients, ask.n, rng))
    variances = np.concatenate(
        [
            unit_scores(ask, image, list(moments_of(image, evidence).class_variance()), [s for s, _ in boxes])
            for image, boxes in _by_image(units)
        ]
    )
    frequencies = source.class_frequencies()
    if len(frequencies) != variances.shape[1]:
        raise MethodError(
            f"{ask.method.name} needs one class frequency for each of {variances.shape[1]} classes, found "
            f"{len(frequencies)}"
        )
    choice = usim(
        variances,
        gradients,
        frequencies,
        ask.n,
        rng,
        kind=str(ask.option("kind")),
        eta=float(ask.option("eta")),
        background=ask.labels.get(BACKGROUND, 0),
        parameters=int(ask.option("parameters")),
        published=bool(ask.option("published")),
    )
    scores = variances.mean(axis=1)
    chosen = [
        Candidate(units[i][0].id, units[i][1], units[i][2], float(scores[i]), float(gain), {"gain": float(gain)})
        for i, gain in zip(choice.indices, choice.gains, strict=True)
    ]
    return picks_from(ask, chosen)


def select_diverse(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """The best 2 n units of every image by score, then those farthest apart in features (nnActive, section 4.5).

    Features are divided by their standard deviation; the first pick has the largest norm.
    """
    images = {i.id: i for i in pool}
    units = [c for image in pool for c in image_candidates(ask, image, evidence, 2 * ask.per_image)]
    if not units:
        return []
    spans = _by_image([(images[c.image], c.start, c.size) for c in units])
    source = with_features(evidence, ask)
    features = np.concatenate([source.features(i.id, boxes) for i, boxes in spans]).astype(np.float64)
    features = features / (features.std(axis=0) + 1e-6)
    first = int(np.square(features).sum(axis=1).argmax())
    rest = np.delete(np.arange(len(units)), first)
    order = [first, *rest[k_center(features[rest], features[[first]], ask.n - 1)]] if ask.n > 1 else [first]
    return picks_from(ask, [units[i] for i in order])


def _by_image(units: Units) -> list[tuple[PoolImage, list[tuple[Triple, Triple]]]]:
    """Runs of units of one image, in order."""
    found: list[tuple[PoolImage, list[tuple[Triple, Triple]]]] = []
    for image, start, size in units:
        if not found or found[-1][0].id != image.id:
            found.append((image, []))
        found[-1][1].append((start, size))
    return found


def _plain(ask: Ask, units: Units, indices: Sequence[int] | NDArray[np.intp]) -> list[Pick]:
    return picks_from(ask, [Candidate(units[i][0].id, units[i][1], units[i][2], 0.0, 0.0) for i in indices])
