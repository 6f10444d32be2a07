# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Selection by scores: one image's maps at a time, and only the candidates that can still win are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lib.pool import Ask, Candidate, Evidence, Pick, PoolImage, class_shares, picks_from
from lib.registry_schema import MethodError
from lib.selectors.greedy import best_boxes
from lib.selectors.noise import power, softrank
from lib.uncertainty import UNCERTAINTIES, Moments
from lib.units import unit_grid


def moments_of(image: PoolImage, evidence: Evidence) -> Moments:
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
    (nnActive, sections 3 and 4). At most `n_per_image` candidates an image; equal utilities keep the order of images.
    """
    if ask.method.selector == "softrank":
        return _select_softrank(ask, pool, evidence)
    kept: list[Candidate] = []
    for image in pool:
        floor = kept[ask.n].utility if len(kept) > ask.n else None
        kept += image_candidates(ask, image, evidence, ask.per_image, floor)
        kept = best(kept, ask.n + 1)
    return picks_from(ask, kept[: ask.n], kept[ask.n] if len(kept) > ask.n else None)


def _select_softrank(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> list[Pick]:
    """The best 2 n_per_image of every image by score, ranked over the pool, then noise on the ranks (section 4.2)."""
    kept = [c for image in pool for c in image_candidates(ask, image, evidence, 2 * ask.per_image)]
    scores = np.array([c.score for c in kept])
    soft = softrank(scores, float(ask.option("beta")), ask.rng("ranks"))
    noisy = [Candidate(c.image, c.start, c.size, c.score, float(u), c.reason) for c, u in zip(kept, soft, strict=True)]
    chosen = best(noisy, ask.n + 1)
    return picks_from(ask, chosen[: ask.n], chosen[ask.n] if len(chosen) > ask.n else None)


def image_candidates(
    ask: Ask, image: PoolImage, evidence: Evidence, limit: int, floor: float | None = None
) -> list[Candidate]:
    """Best free units of one image, best first, at most `limit`, none of them at or below the utility `floor`.

    Noise is drawn for every position from the image's own generator, so that what an image offers depends on nothing
    but the seed, the round, the method and its maps.
    """
    moments = moments_of(image, evidence)
    size, stride = ask.box_size(image), ask.stride
    assert ask.method.uncertainty is not None
    grid = unit_grid(UNCERTAINTIES[ask.method.uncertainty](moments), size, stride)
    utilities = utility_of(ask, grid, image)
    found = []
    for start, utility in best_boxes(utilities, size, stride, image.taken, limit, floor):
        x, y, z = (a // s for a, s in zip(start, stride, strict=True))
        reason = {"predicted": class_shares(moments, (start, size), ask.labels)}
        found.append(Candidate(image.id, start, size, float(grid[x, y, z]), utility, reason))
    return found


def utility_of(ask: Ask, grid: NDArray[np.float32], image: PoolImage) -> NDArray[np.floating]:
    """What the selection ranks by: the scores themselves, or the scores with power noise."""
    if ask.method.selector == "power":
        return power(grid, float(ask.option("beta")), ask.rng("noise", image.id))
    return grid


def best(candidates: Sequence[Candidate], n: int) -> list[Candidate]:
    """The `n` of highest utility, best first; equal utilities keep their order."""
    return sorted(candidates, key=lambda c: -c.utility)[:n]
