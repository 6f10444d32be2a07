# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Selection from fixed units that cover every image, where whole batches or features are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    Places,
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
from lib.units import covering_means, covering_starts

Units = list[tuple[PoolImage, Triple, Triple]]


def tiles(ask: Ask, image: PoolImage) -> list[Triple]:
    """Starts of the units that cover `image`: evenly spread patches, every slice, or all of it.

    Patches overlap where their size does not divide the image's; `_apart` keeps a batch free of overlaps.
    """
    axes = (covering_starts(n, k) for n, k in zip(image.shape, ask.box_size(image), strict=True))
    return [(x, y, z) for x, y, z in product(*axes)]


def free_units(ask: Ask, pool: Sequence[PoolImage]) -> Units:
    """Units that overlap no taken box, image by image."""
    found: Units = []
    for image in pool:
        size = ask.box_size(image)
        found += [(image, start, size) for start in tiles(ask, image) if image.is_free((start, size))]
    return found


def unit_scores(
    ask: Ask, image: PoolImage, maps: Iterable[NDArray[np.float32]], starts: Sequence[Triple]
) -> NDArray[np.float64]:
    """Mean of each map (X, Y, Z) over the units of `tiles` at `starts`, (units, maps)."""
    size = ask.box_size(image)
    places = np.array(starts, dtype=np.intp).reshape(-1, 3)
    axes = [covering_starts(n, k) for n, k in zip(image.shape, size, strict=True)]
    cells = tuple(np.searchsorted(axis, places[:, a]) for a, axis in enumerate(axes))
    return np.stack([covering_means(m, size)[cells].astype(np.float64) for m in maps], axis=1)


_Choice = tuple[list[int], list[Step]]


def _apart(units: Units, n: int, choose: Callable[[NDArray[np.bool_], list[int], int], _Choice]) -> _Choice:
    """Indices of at most `n` units of which no two overlap, and the record of each step.

    `choose(free, chosen, repeat)` selects n - len(chosen) of the free units (U,), given those chosen before. Its picks
    before the first one that overlaps an earlier pick stay; the selection is repeated among the units that overlap
    none of them. Where units do not overlap, it is called once.
    """
    free, chosen, records = np.ones(len(units), dtype=bool), list[int](), list[Step]()
    places = Places([_placed(unit) for unit in units])
    for repeat in range(n):
        if len(chosen) >= n or not free.any():
            break
        found, steps = choose(free.copy(), list(chosen), repeat)
        for k, i in enumerate(found):
            if not free[i]:
                break
            chosen.append(i)
            records += steps[k : k + 1]
            free &= ~places.overlapping(i)
    return chosen, records


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
    """The random group of n units with the highest mean score (Gaillochet et al. 2023).

    Of a group with overlapping units, those before the first overlap are kept, and the rest comes from the best group
    of units left.
    """
    units = _scored_units(ask, pool, evidence)
    if not units:
        return []
    scores, images = np.array([c.score for c in units]), {image.id: image for image in pool}

    def choose(free: NDArray[np.bool_], chosen: list[int], repeat: int) -> _Choice:
        rows = np.flatnonzero(free)
        group = stochastic_batch(
            scores[rows],
            ask.n - len(chosen),
            _repeated(ask, "groups", repeat),
            statistic=str(ask.option("statistic")),
            keep_last=bool(ask.option("keep_last")),
            groups=int(ask.option("groups")) or None,
            resample=bool(ask.option("resample")),
        )
        return rows[group].tolist(), []

    indices, _ = _apart([(images[c.image], c.start, c.size) for c in units], ask.n, choose)
    worth = getattr(scores[indices], str(ask.option("statistic")))()
    left = len(units) - len(indices)
    return picks_from(ask, [units[i] for i in indices], steps=lambda: [step(worth, (), left)] * len(indices))


def select_stratified(ask: Ask, pool: Sequence[PoolImage]) -> list[Pick]:
    """Units spread over the images so that the same share (or number) of each is annotated (StrRS)."""
    units = [(i, start, ask.box_size(i)) for i in pool for start in tiles(ask, i)]
    labelled = np.array([not image.is_free((start, size)) for image, start, size in units])
    strata, equal = [i.id for i, _, _ in units], str(ask.option("equal"))

    def steps(free: NDArray[np.bool_], chosen: list[int], repeat: int) -> Selection:
        # A unit that a pick overlaps counts like one that an annotated region overlaps.
        done = (labelled | ~free).tolist()
        return stratified_steps(strata, done, ask.n - len(chosen), _repeated(ask, "strata", repeat), equal)

    return _plain(ask, units, steps, subset=False)


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
    labelled, take = source.labelled_features(), selector.steps

    def steps(free: NDArray[np.bool_], chosen: list[int], repeat: int) -> Selection:
        known = np.concatenate([labelled, features[chosen]]) if chosen else labelled
        return take(features[free], known, ask.n - len(chosen), _repeated(ask, "features", repeat), **options)

    return _plain(ask, units, steps)


def select_by_gradients(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """BADGE and USIM over gradients of units."""
    units = free_units(ask, pool)
    if not units:
        return []
    source = with_gradients(evidence, ask)
    layer = str(ask.option("layer"))
    gradients = np.concatenate([source.gradients(i.id, boxes, layer) for i, boxes in _by_image(units)])
    if ask.method.selector == "kmeans_plus_plus":

        def steps(free: NDArray[np.bool_], chosen: list[int], repeat: int) -> Selection:
            return kmeans_plus_plus_steps(gradients[free], ask.n - len(chosen), _repeated(ask, "gradients", repeat))

        return _plain(ask, units, steps)
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
    gains: dict[int, float] = {}

    def choose(free: NDArray[np.bool_], chosen: list[int], repeat: int) -> _Choice:
        rows = np.flatnonzero(free)
        choice = usim(
            variances[rows],
            gradients[rows],
            frequencies,
            ask.n - len(chosen),
            _repeated(ask, "gradients", repeat),
            kind=str(ask.option("kind")),
            eta=float(ask.option("eta")),
            background=ask.labels.get(BACKGROUND, 0),
            parameters=int(ask.option("parameters")),
            published=bool(ask.option("published")),
        )
        found: list[int] = rows[choice.indices].tolist()
        gains.update(zip(found, choice.gains.tolist(), strict=True))
        return found, []

    scores, (indices, _) = variances.mean(axis=1), _apart(units, ask.n, choose)
    chosen = [Candidate(*_placed(units[i]), float(scores[i]), gains[i], {"gain": gains[i]}) for i in indices]
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


def _plain(
    ask: Ask, units: Units, steps: Callable[[NDArray[np.bool_], list[int], int], Selection], subset: bool = True
) -> list[Pick]:
    """Picks of units without a score, in the order of the selection `steps(free, chosen, repeat)`.

    Rows of the selection are those of the free units with `subset`, else of all.
    """
    candidates = [Candidate(*_placed(unit), 0.0, 0.0) for unit in units]

    def choose(free: NDArray[np.bool_], chosen: list[int], repeat: int) -> _Choice:
        rows = np.flatnonzero(free) if subset else np.arange(len(units))
        found, records = traced([candidates[i] for i in rows], steps(free, chosen, repeat), ask.utilities)
        return rows[found].tolist(), records

    chosen, records = _apart(units, ask.n, choose)
    return picks_from(ask, [candidates[i] for i in chosen], steps=lambda: records)


def _placed(unit: tuple[PoolImage, Triple, Triple]) -> tuple[str, Triple, Triple]:
    image, start, size = unit
    return image.id, start, size


def _repeated(ask: Ask, name: str, repeat: int) -> np.random.Generator:
    """Generator of a repeated selection; the first one is that of a single selection."""
    return ask.rng(name, repeat) if repeat else ask.rng(name)
