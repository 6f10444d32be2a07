# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Selection by scores: one image's maps at a time, and only the candidates that can still win are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lib.querying.candidate_cache import (
    Head,
    ImageCandidates,
    SummaryStore,
    best_of_pool,
    remembered,
    summary_key,
    taken_digest,
)
from lib.querying.method import MethodError
from lib.querying.types import (
    ALTERNATIVES,
    Ask,
    Candidate,
    Evidence,
    Pick,
    PoolImage,
    Step,
    class_shares,
    picks_from,
    ranked_steps,
    traced_steps,
)
from lib.regions import Triple, triple
from lib.selectors.class_stratified import ALL, allot, image_limits, merge_streams, pick_streams
from lib.selectors.greedy import best_boxes, open_grid
from lib.selectors.noise import beta_at, power, softrank
from lib.selectors.peaks import ranked_slices
from lib.selectors.random_regions import BACKGROUND
from lib.uncertainty import PosteriorMoments, score_map_of
from lib.units import unit_grid, volume_mean


def moments_of(image: PoolImage, evidence: Evidence) -> PosteriorMoments:
    """Moments of an image, checked to lie on its grid.

    Raises:
        MethodError: moments of another shape.
    """
    moments = evidence.moments(image.id)
    if moments.shape[1:] != tuple(image.shape):
        raise MethodError(
            f"the prediction for {image.id} has the shape {moments.shape[1:]} and the image {tuple(image.shape)}: "
            "score again with predictions on the grid of the stored image"
        )
    return moments


def select_scored(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """Greedy, power and softrank selection over the pool, in the order of image ids.

    Score = mean of the uncertainty over the unit; utility = score, or log score + Gumbel noise drawn at every position
    (nnActive, section 4). At most `n_per_image` candidates per image; equal utilities keep the order of images.
    Evidence with a `summaries` store gives the same picks without reading the maps of images that cannot win.
    """
    if ask.method.selector == "softrank":
        return _select_softrank(ask, pool, evidence)
    kept = _best_scored(_wider(ask) if ask.utilities else ask, pool, evidence)
    chosen, runner_up = kept[: ask.n], kept[ask.n] if len(kept) > ask.n else None
    return picks_from(ask, chosen, runner_up, lambda: ranked_steps(kept, len(chosen)))


def _wider(ask: Ask) -> Ask:
    """Copy of `ask` with enough additional regions that its last step has alternatives, even within one image."""
    return replace(ask, n=ask.n + ALTERNATIVES)


def _best_scored(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Candidate]:
    """The n + 1 best candidates of the pool."""
    store = getattr(evidence, "summaries", None)
    if isinstance(store, SummaryStore):
        return best_of_pool(ask, pool, store, lambda image: summarise(ask, image, evidence), ask.n + 1)
    kept = list[Candidate]()
    for image in pool:
        floor = kept[ask.n].utility if len(kept) > ask.n else None
        kept += image_candidates(ask, image, evidence, ask.per_image, floor)
        kept = best(kept, ask.n + 1)
    return kept


def _select_softrank(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """The best 2 n_per_image of every image by score, ranked over the pool, then noise on the ranks."""
    store = getattr(evidence, "summaries", None)

    def offers(image: PoolImage) -> list[Candidate]:
        return image_candidates(ask, image, evidence, 2 * ask.per_image)

    kept = [c for image_offers in remembered(summary_key(ask), pool, store, offers) for c in image_offers]
    scores = np.array([c.score for c in kept])
    soft = softrank(scores, float(ask.option("beta")), ask.rng("ranks"))
    noisy = [Candidate(c.image, c.start, c.size, c.score, float(u), c.reason) for c, u in zip(kept, soft, strict=True)]
    ranked = best(noisy, len(noisy))
    chosen, rest = ranked[: ask.n], ranked[ask.n :]
    return picks_from(ask, chosen, rest[0] if rest else None, lambda: ranked_steps(ranked, len(chosen), left=len(rest)))


def summarise(ask: Ask, image: PoolImage, evidence: Evidence) -> ImageCandidates:
    """Summary of the candidates of `image` for `ask`, for a store of summaries."""
    candidates = image_candidates(ask, image, evidence, ask.per_image)
    if not image.taken:
        ceiling = candidates[0].utility if candidates else -np.inf
    else:
        grid = unit_grid(score_map(ask, moments_of(image, evidence)), ask.box_size(image), ask.stride)
        ceiling = float(np.fmax.reduce(utility_of(ask, grid, image), axis=None))
    best_one = candidates[0].utility if candidates else -np.inf
    head = Head(taken_digest(image.taken), best_one, ceiling)
    return ImageCandidates(head, image.taken, tuple(candidates), complete=len(candidates) < ask.per_image)


def image_candidates(
    ask: Ask, image: PoolImage, evidence: Evidence, limit: int, floor: float | None = None
) -> list[Candidate]:
    """Best free units of one image, best first, at most `limit`, none of them at or below the utility `floor`.

    Noise is drawn for every position from the image's own generator. The candidates of an image therefore depend only
    on the seed, the round, the method and its maps.
    """
    moments = moments_of(image, evidence)
    size, stride = ask.box_size(image), ask.stride
    grid = unit_grid(score_map(ask, moments), size, stride)
    utilities = utility_of(ask, grid, image)
    found = []
    for start, utility in best_boxes(utilities, size, stride, image.taken, limit, floor):
        x, y, z = (a // s for a, s in zip(start, stride, strict=True))
        reason = {"predicted": class_shares(moments, (start, size), ask.labels)}
        found.append(Candidate(image.id, start, size, float(grid[x, y, z]), utility, reason))
    return found


def score_map(ask: Ask, moments: PosteriorMoments) -> NDArray[np.float32]:
    """The method's uncertainty at every voxel, (X, Y, Z)."""
    assert ask.method.uncertainty is not None, "a method that ranks has an uncertainty"
    return score_map_of(ask.method.uncertainty, moments)


def utility_of(ask: Ask, grid: NDArray[np.float32], image: PoolImage) -> NDArray[np.floating[Any]]:
    """Utilities that the selection ranks by: the scores themselves, or the scores with power noise."""
    if ask.method.selector == "power":
        return power(grid, float(ask.option("beta")), ask.rng("noise", image.id))
    return grid


def select_classes(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """Class-stratified selection: streams U_c = uncertainty * mean_c for every foreground class and one for all.

    Beta follows the schedule over rounds (round 1 uses its first value). If a class has too few candidates, the other
    streams fill its quota, and the reason records the shortage (ClaSP PE; nnActive, section 4).
    """
    ratio, names = float(ask.option("ratio")), {value: name for name, value in ask.labels.items()}
    streams = _pool_streams(ask, pool, evidence, ratio, limited=True)
    if sum(map(len, streams.values())) < ask.n and ask.n_per_image is None:
        streams = _pool_streams(ask, pool, evidence, ratio, limited=False)
    quotas = allot(ask.n, ratio, sorted(s for s in streams if s != ALL), ask.rng("quotas"))
    chosen, lacking = merge_streams(streams, quotas)
    told = {"lacking": {names.get(s, str(s)): n for s, n in lacking.items()}} if lacking else {}
    labelled = []
    for stream, c in chosen:
        name = "all" if stream == ALL else names.get(stream, str(stream))
        reason = {**c.reason, "stream": name, **told}
        labelled.append(Candidate(c.image, c.start, c.size, c.score, c.utility, reason))
    return picks_from(ask, labelled, steps=lambda: _stream_steps(streams, chosen))


def _stream_steps(
    streams: Mapping[int, Sequence[tuple[float, Candidate]]], chosen: Sequence[tuple[int, Candidate]]
) -> list[Step]:
    """Steps within the stream of each pick, since utilities of different streams do not compare."""
    units = [(stream, c) for stream, found in streams.items() for _, c in found]
    place = {(c.image, c.start): i for i, (_, c) in enumerate(units)}
    values = np.array([c.utility for _, c in units], dtype=np.float64)
    of_stream = np.array([stream for stream, _ in units], dtype=np.intp)
    steps = traced_steps(
        [c for _, c in units],
        [place[c.image, c.start] for _, c in chosen],
        (np.where(of_stream == stream, values, -np.inf) for stream, _ in chosen),
    )
    return [{**record, "left": None} for record in steps]  # streams hold their best only


def _pool_streams(
    ask: Ask, pool: Sequence[PoolImage], evidence: Evidence, ratio: float, limited: bool
) -> dict[int, list[tuple[float, Candidate]]]:
    """The best of every stream over the pool, n or more; unless `limited`, one image may fill a whole batch."""
    background = ask.labels.get(BACKGROUND, 0)
    classes = [c for c in range(moments_of(pool[0], evidence).shape[0]) if c != background]
    limits = image_limits(ask.per_image, ratio, classes)
    if not limited:
        limits = dict.fromkeys(limits, ask.n)

    def offers(image: PoolImage) -> list[Candidate]:
        found = _streams(ask, image, moments_of(image, evidence), limits)
        return [replace(c, reason={**c.reason, "stream": s}) for s, own in found.items() for c in own]

    # Noise, order and schedule depend on seed and round, so these candidates are valid for one round only.
    key = f"{summary_key(ask)}/{ask.seed}/{ask.round}/{ask.rounds_total}/{ask.n}/{limited}"
    streams: dict[int, list[tuple[float, Candidate]]] = {stream: [] for stream in limits}
    for image_offers in remembered(key, pool, getattr(evidence, "summaries", None), offers):
        for c in image_offers:
            streams[int(c.reason["stream"])].append((c.utility, c))
        for stream, found in streams.items():
            streams[stream] = sorted(found, key=lambda item: -item[0])[: ask.n + ALTERNATIVES]
    return streams


def _streams(
    ask: Ask, image: PoolImage, moments: PosteriorMoments, limits: Mapping[int, int]
) -> dict[int, list[Candidate]]:
    size, stride, score = ask.box_size(image), ask.stride, score_map(ask, moments)
    # One map per class of a large image would not fit into memory, so each is reduced to its grid of units.
    grids = {s: unit_grid(score if s == ALL else score * moments.mean_of(s), size, stride) for s in limits}
    utilities: dict[int, NDArray[np.floating[Any]]] = dict(grids)
    if ask.option("schedule") != "none":
        beta = _beta(ask)
        utilities = {c: power(g, beta, ask.rng("noise", image.id, c)) for c, g in grids.items()}
    picked = pick_streams(utilities, size, stride, image.taken, limits, ask.rng("order", image.id))
    found: dict[int, list[Candidate]] = {}
    for stream, boxes in picked.items():
        for start, utility in boxes:
            reason = {"predicted": class_shares(moments, (start, size), ask.labels)}
            x, y, z = (a // s for a, s in zip(start, stride, strict=True))
            score_here = float(grids[stream][x, y, z])
            found.setdefault(stream, []).append(Candidate(image.id, start, size, score_here, utility, reason))
        found.setdefault(stream, [])
    return found


def _beta(ask: Ask) -> float:
    rounds = ask.rounds_total or int(ask.option("planned_rounds"))
    first, last = float(ask.option("beta")), float(ask.option("beta_last"))
    return beta_at(str(ask.option("schedule")), ask.round - 1, rounds, first, last)


def select_peaks(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """Slices at the peaks of each image's profile, the highest of the pool; other slices when peaks run short (USS)."""
    kept = _best_peaks(_wider(ask) if ask.utilities else ask, pool, evidence)
    chosen, runner_up = kept[: ask.n], kept[ask.n] if len(kept) > ask.n else None
    return picks_from(ask, chosen, runner_up, lambda: ranked_steps(kept, len(chosen)))


def _best_peaks(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Candidate]:
    """The n + 1 best slices of the pool, peaks first."""
    distance, found = int(ask.option("distance")), list[tuple[int, Candidate]]()
    for image in pool:
        moments = moments_of(image, evidence)
        size = ask.box_size(image)
        grid = unit_grid(score_map(ask, moments), size)
        taken = ~np.isfinite(open_grid(grid, size, (1, 1, 1), image.taken)).ravel()
        order, tiers = ranked_slices(grid.ravel(), taken, distance)
        for i, tier in zip(order[: ask.per_image], tiers, strict=False):
            start: Triple = triple(int(i) if a == ask.axis else 0 for a in range(3))
            reason = {"peak": bool(tier == 0), "predicted": class_shares(moments, (start, size), ask.labels)}
            score = float(grid.ravel()[i])
            found.append((int(tier), Candidate(image.id, start, size, score, score, reason)))
        found = sorted(found, key=lambda entry: (entry[0], -entry[1].utility))[: ask.n + 1]
    return [c for _, c in found]


def select_volumes(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """Whole volumes by their mean uncertainty inside the predicted foreground, dilated by a box (UVS).

    An image without predicted foreground counts with the mean over all of it.
    """
    width, background, found = int(ask.option("dilation")), ask.labels.get(BACKGROUND, 0), list[Candidate]()
    free = [image for image in pool if not image.taken]
    for image in free:
        moments = moments_of(image, evidence)
        mask = ndimage.maximum_filter((moments.predicted() != background).astype(np.uint8), width, mode="constant")
        score = volume_mean(score_map(ask, moments), mask)
        reason = {"predicted": class_shares(moments, ((0, 0, 0), image.shape), ask.labels)}
        found = best([*found, Candidate(image.id, (0, 0, 0), image.shape, score, score, reason)], ask.n + ALTERNATIVES)
    chosen, runner_up = found[: ask.n], found[ask.n] if len(found) > ask.n else None
    return picks_from(ask, chosen, runner_up, lambda: ranked_steps(found, len(chosen), left=len(free) - len(chosen)))


def best(candidates: Sequence[Candidate], n: int) -> list[Candidate]:
    """The `n` of highest utility, best first; equal utilities keep their order."""
    return sorted(candidates, key=lambda c: -c.utility)[:n]
