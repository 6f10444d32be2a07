# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Selection from a fixed set of units, disjoint tiles of every image, where whole batches or features are compared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from lib.querying.by_score import best, image_candidates, moments_of, score_map
from lib.querying.method import MethodError
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
    traced_steps,
    with_features,
    with_gradients,
)
from lib.regions import Triple, triple
from lib.selectors.badge import kmeans_plus_plus
from lib.selectors.core_set import CHUNK, SquaredDistances, feature_matrix, k_center
from lib.selectors.random_regions import BACKGROUND
from lib.selectors.representative import (
    OUTLIER,
    farthest_on_average,
    mean_distances,
    mean_shift_clusters,
    reduced_features,
    stratified,
)
from lib.selectors.stochastic import stochastic_batch
from lib.selectors.strided import Block, strided_blocks
from lib.selectors.typiclust import MAX_CLUSTERS, typiclust
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
    indices = stratified(strata, labelled, ask.n, rng, equal)
    return _plain(ask, units, indices, lambda: _evenness(strata, labelled, indices, equal))


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
    """A step for each annotated slice: the sum of scores of its block, against free blocks of the same thickness."""
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
    """Core-set, clusters, distance or typicality over the features of units."""
    units = free_units(ask, pool)
    if not units:
        return []
    source = with_features(evidence, ask)
    features = np.concatenate([source.features(i.id, boxes) for i, boxes in _by_image(units)])
    labelled = source.labelled_features()
    rng, selector = ask.rng("features"), ask.method.selector
    if selector == "core_set":
        indices = k_center(features, labelled, ask.n)
        start = _to_nearest(features, labelled)
        return _plain(ask, units, indices, lambda: map(np.sqrt, _nearest(features, indices, start, start)))
    if selector == "typiclust":
        neighbours = int(ask.option("neighbours"))
        indices = typiclust(features, labelled, ask.n, rng, neighbours)
        again = ask.rng("features")
        return _plain(ask, units, indices, lambda: _typicality(features, labelled, ask.n, again, neighbours, indices))
    free, known = _reduced(features, labelled, ask)
    if selector == "distance":
        indices = farthest_on_average(free, known, ask.n)
        return _plain(ask, units, indices, lambda: _mean_distance(free, known, indices))
    clusters = mean_shift_clusters(np.concatenate([free, known]), float(ask.option("bandwidth")) or None)
    flags = np.arange(len(clusters)) >= len(free)
    indices = stratified(clusters.tolist(), flags, ask.n, rng)
    return _plain(ask, units, indices, lambda: (v[: len(units)] for v in _evenness(clusters.tolist(), flags, indices)))


def _reduced(
    features: NDArray[np.floating[Any]], labelled: NDArray[np.floating[Any]], ask: Ask
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
        indices = kmeans_plus_plus(gradients, ask.n, rng)
        return _plain(ask, units, indices, lambda: _nearest(gradients, indices, np.square(gradients).sum(axis=1)))
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
    first = int(np.square(features).sum(axis=1).argmax())
    rest = np.delete(np.arange(len(units)), first)
    order = [first, *rest[k_center(features[rest], features[[first]], ask.n - 1)]] if ask.n > 1 else [first]
    norms = np.square(features).sum(axis=1)
    return picks_from(
        ask,
        [units[i] for i in order],
        steps=lambda: traced_steps(units, order, map(np.sqrt, _nearest(features, order, norms))),
    )


def _by_image(units: Units) -> list[tuple[PoolImage, list[tuple[Triple, Triple]]]]:
    """Runs of units of one image, in order."""
    found: list[tuple[PoolImage, list[tuple[Triple, Triple]]]] = []
    for image, start, size in units:
        if not found or found[-1][0].id != image.id:
            found.append((image, []))
        found[-1][1].append((start, size))
    return found


def _plain(
    ask: Ask,
    units: Units,
    indices: NDArray[np.intp],
    utilities: Callable[[], Iterable[NDArray[np.floating[Any]]]],
) -> list[Pick]:
    """Picks of units without a score; `utilities` gives those of every unit at each step, where they are asked for."""

    def steps() -> list[Step]:
        return traced_steps([Candidate(i.id, s, d, 0.0, 0.0) for i, s, d in units], indices.tolist(), utilities())

    chosen = [Candidate(units[i][0].id, units[i][1], units[i][2], 0.0, 0.0) for i in indices]
    return picks_from(ask, chosen, steps=steps)


def _to_nearest(features: NDArray[np.floating[Any]], labelled: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Squared distance of each row to the nearest labelled one, (U,); infinite where there is none."""
    rows, nearest = feature_matrix(features, "unlabelled"), np.full(len(features), np.inf, np.float32)
    if not len(labelled):
        return nearest
    known = feature_matrix(labelled, "labelled")
    for a in range(0, len(rows), CHUNK):
        part = torch.cdist(rows[a : a + CHUNK], known, compute_mode="donot_use_mm_for_euclid_dist")
        nearest[a : a + CHUNK] = part.min(dim=1).values.square().numpy()
    return nearest


def _nearest(
    features: NDArray[np.floating[Any]],
    chosen: Sequence[int] | NDArray[np.intp],
    first: NDArray[np.floating[Any]],
    start: NDArray[np.floating[Any]] | None = None,
) -> Iterator[NDArray[np.floating[Any]]]:
    """`first`, then at each further step the squared distance to the nearest row chosen before, at most `start`."""
    distances = SquaredDistances(feature_matrix(features, "unlabelled"))
    nearest = np.full(len(features), np.inf, np.float32) if start is None else start
    yield first
    for row in chosen[:-1]:
        nearest = np.minimum(nearest, distances.to(int(row)))
        yield nearest


def _mean_distance(
    features: NDArray[np.floating[Any]], labelled: NDArray[np.floating[Any]], chosen: NDArray[np.intp]
) -> Iterator[NDArray[np.floating[Any]]]:
    """Mean distance to labelled rows and those chosen before, at each step; infinite where there are none."""
    count = len(labelled)
    total = mean_distances(features, labelled) * count if count else np.zeros(len(features))
    for row in chosen:
        yield total / count if count else np.full(len(features), np.inf)
        total, count = total + mean_distances(features, features[[row]]), count + 1


def _evenness(
    strata: Sequence[Hashable],
    labelled: Sequence[bool] | NDArray[np.bool_],
    chosen: NDArray[np.intp],
    equal: str = "fraction",
) -> Iterator[NDArray[np.floating[Any]]]:
    """Minus the labelled share (or count) of each unit's stratum at each step; outliers lie below all others."""
    names, code = np.unique(np.array(strata), return_inverse=True)
    done, sizes = np.array(labelled, dtype=bool), np.bincount(code)
    counts = np.bincount(code[done], minlength=len(names))
    below = np.array([name == OUTLIER for name in names.tolist()]) * (sizes.max() + 1)
    for i in chosen:
        share = counts / sizes if equal == "fraction" else counts
        yield np.where(done, np.nan, 0.0 - (share + below)[code])
        done[i] = True
        counts[code[i]] += 1


def _typicality(
    features: NDArray[np.floating[Any]],
    labelled: NDArray[np.floating[Any]],
    k: int,
    rng: np.random.Generator,
    neighbours: int,
    chosen: NDArray[np.intp],
) -> Iterator[NDArray[np.floating[Any]]]:
    """Typicality in the clusters of `typiclust`, drawn again by the same `rng`; -inf outside of the pick's cluster.

    A cluster of one has no neighbours to be typical of: infinite.
    """
    rows = feature_matrix(np.concatenate([features, labelled]) if len(labelled) else features, "all").numpy()
    spread = rows.std(axis=0)
    rows = (rows - rows.mean(axis=0)) / np.where(spread > 0, spread, 1)
    clusters = max(1, min(len(labelled) + k, MAX_CLUSTERS, len(np.unique(rows, axis=0))))
    cluster = KMeans(clusters, n_init=4, random_state=int(rng.integers(2**31))).fit_predict(rows)[: len(features)]
    far = np.zeros(len(features))
    for c in np.unique(cluster):
        members = np.flatnonzero(cluster == c)
        if len(members) > 1:
            near = NearestNeighbors(n_neighbors=min(neighbours, len(members) - 1)).fit(rows[members])
            far[members] = near.kneighbors()[0].mean(axis=1)
    typicality = np.divide(1, far, out=np.full(len(far), np.inf), where=far > 0)
    for i in chosen:
        yield np.where(cluster == cluster[i], typicality, -np.inf)
