# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Selection from a fixed set of units, disjoint tiles of every image, where whole batches or features are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.querying.by_score import best, image_candidates, moments_of, score_map
from lib.querying.method import MethodError
from lib.querying.registry import SELECTORS
from lib.querying.types import (
    ALTERNATIVES,
    Ask,
    Candidate,
    Evidence,
    Pick,
    PoolImage,
    Step,
    picks_from,
    step,
    traced,
    with_features,
    with_gradients,
)
from lib.regions import Triple, triple
from lib.selectors.badge import kmeans_plus_plus_steps
from lib.selectors.core_set import k_center_steps
from lib.selectors.random_regions import BACKGROUND
from lib.selectors.representative import (
    stratified_steps,
)
from lib.selectors.steps import Selection, Taken
from lib.selectors.stochastic import stochastic_batch
from lib.selectors.strided import Block, strided_blocks
from lib.selectors.usim import usim
from lib.uncertainty import PosteriorMoments
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
    ask: Ask, image: PoolImage, maps: Iterable[NDArray[np.float32]], starts: Sequence[Triple]
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
    worth = getattr(np.array([units[i].score for i in indices]), str(ask.option("statistic")))()
    left = len(units) - len(indices)
    return picks_from(ask, [units[i] for i in indices], steps=lambda: [step(worth, (), left)] * len(indices))


def select_stratified(ask: Ask, pool: Sequence[PoolImage]) -> list[Pick]:
    """Units spread over the images so that the same share (or number) of each is annotated (StrRS)."""
    units = [(i, start, ask.box_size(i)) for i in pool for start in tiles(ask, i)]
    labelled = [not image.is_free((start, size)) for image, start, size in units]
    rng = ask.rng("strata")
    strata, equal = [i.id for i, _, _ in units], str(ask.option("equal"))
    return _plain(ask, units, stratified_steps(strata, labelled, ask.n, rng, equal))


def select_strided(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence | None) -> list[Pick]:
    """The outer slices of blocks; those between can be interpolated (Burmeister 2022)."""
    images = {i.id: i for i in pool}
    free = {i.id: np.array([i.is_free((start, ask.box_size(i))) for start in tiles(ask, i)], dtype=bool) for i in pool}
    scores: dict[str, NDArray[np.floating[Any]]] | None = None
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
    return picks_from(ask, chosen, steps=lambda: _block_steps(ask, images, free, scores, blocks))


def _block_steps(
    ask: Ask,
    images: Mapping[str, PoolImage],
    free: Mapping[str, NDArray[np.bool_]],
    scores: Mapping[str, NDArray[np.floating[Any]]] | None,
    blocks: Sequence[Block],
) -> list[Step]:
    """Steps per annotated slice: the sum of scores of its block, compared with free blocks of the same thickness."""
    left, found = {scan: flags.copy() for scan, flags in free.items()}, list[Step]()
    for block in blocks:
        left[block.scan][block.bottom : block.top + 1] = False
        others = list[Candidate]()
        for scan, flags in left.items():
            size = list(ask.box_size(images[scan]))
            size[ask.axis] = block.thickness
            runs = np.convolve(flags, np.ones(block.thickness), mode="valid") == block.thickness
            for bottom in np.flatnonzero(runs) if len(flags) >= block.thickness else ():
                worth = float(scores[scan][bottom : bottom + block.thickness].sum()) if scores else np.nan
                others.append(Candidate(scan, tiles(ask, images[scan])[bottom], triple(size), 0.0, worth))
        worth = float(scores[block.scan][block.bottom : block.top + 1].sum()) if scores else np.nan
        record = step(worth, best(others, ALTERNATIVES) if scores else (), len(others))
        found += [record] * len(block.annotated)
    return found


def select_by_features(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """Units by a selector over their features."""
    units = free_units(ask, pool)
    if not units:
        return []
    source, selector = with_features(evidence, ask), SELECTORS[ask.method.selector]
    assert selector.steps is not None, "a selector without a stage of its own works on features"
    features = np.concatenate([source.features(i.id, boxes) for i, boxes in _by_image(units)])
    options = {name: ask.option(name) for name in selector.options}
    steps = selector.steps(features, source.labelled_features(), ask.n, ask.rng("features"), **options)
    return _plain(ask, units, steps)


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
        return _plain(ask, units, kmeans_plus_plus_steps(gradients, ask.n, rng))
    variances = np.concatenate(
        [
            unit_scores(ask, image, _variances(moments_of(image, evidence)), [s for s, _ in boxes])
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
    left = len(units) - np.arange(1, len(chosen) + 1)
    return picks_from(
        ask, chosen, steps=lambda: [step(c.utility, (), int(n)) for c, n in zip(chosen, left, strict=True)]
    )


def _variances(moments: PosteriorMoments) -> Iterator[NDArray[np.float32]]:
    """Variance of each class in turn: all of them at once may be more than the memory holds."""
    return (moments.variance_of(c) for c in range(moments.shape[0]))


def select_diverse(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """The best 2 n units of every image by score, then those farthest apart in features (nnActive, section 4).

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
    chosen, steps = traced(units, _largest_then_farthest(features, ask.n), ask.utilities)
    return picks_from(ask, [units[i] for i in chosen], steps=lambda: steps)


def _largest_then_farthest(features: NDArray[np.float64], k: int) -> Selection:
    """The row with the largest norm, then core-set."""
    norms = np.square(features).sum(axis=1)
    first = int(norms.argmax())
    yield Taken(first, lambda: np.sqrt(norms))
    rest = np.delete(np.arange(len(features)), first)
    for taken in k_center_steps(features[rest], features[[first]], k - 1):
        yield Taken(int(rest[taken.row]), partial(_spread, taken, rest, len(features)))


def _spread(taken: Taken, rest: NDArray[np.intp], units: int) -> NDArray[np.floating[Any]]:
    """Utilities of the rows in `rest`, at their places among all."""
    found = np.full(units, np.nan)
    found[rest] = taken.utilities()
    return found


def _by_image(units: Units) -> list[tuple[PoolImage, list[tuple[Triple, Triple]]]]:
    """Groups of consecutive units of the same image, in order."""
    found: list[tuple[PoolImage, list[tuple[Triple, Triple]]]] = []
    for image, start, size in units:
        if not found or found[-1][0].id != image.id:
            found.append((image, []))
        found[-1][1].append((start, size))
    return found


def _plain(ask: Ask, units: Units, selection: Selection) -> list[Pick]:
    """Picks of units without a score, in the order of `selection`."""
    candidates = [Candidate(i.id, start, size, 0.0, 0.0) for i, start, size in units]
    chosen, steps = traced(candidates, selection, ask.utilities)
    return picks_from(ask, [candidates[i] for i in chosen], steps=lambda: steps)
