# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Selection without scores: random families from hints or predictions, and regions given by the request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from lib.querying.by_score import moments_of
from lib.querying.method import MethodError
from lib.querying.types import Ask, Candidate, Evidence, Pick, PoolImage, picks_from
from lib.regions import Region, triple
from lib.selectors.random_regions import (
    BACKGROUND,
    FG33,
    FG66,
    Draw,
    Hint,
    HintsOf,
    Space,
    hints_from_labels,
    parse_hints,
    random_regions,
    starting_budget,
)

_SHARES = {"33": FG33, "66": FG66}


def select_random(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence | None) -> list[Pick]:
    """Draw regions uniformly, by hints, or by predicted foreground (nnActive, section 4).

    Raises:
        MethodError: the method works from hints and there are none for this pool.
    """
    spaces = {i.id: Space(i.shape, ask.box_size(i), list(i.taken)) for i in pool}
    rng, selector = ask.rng("draw"), ask.method.selector
    if selector == "random":
        return _as_picks(ask, random_regions(spaces, ask.n, rng))
    if selector == "random_fg_predicted":
        assert evidence is not None  # `select` refuses a method that needs a model without one
        hints_of = _predicted_hints(ask, pool, evidence)
        return _as_picks(ask, random_regions(spaces, ask.n, rng, _SHARES[ask.option("foreground")], hints_of))
    hints = _usable_hints(ask, pool)
    if selector == "starting_budget":
        return _as_picks(ask, starting_budget(spaces, ask.n, rng, hints, int(ask.option("per_class"))))
    weights = _SHARES[ask.option("foreground")]
    return _as_picks(ask, random_regions(spaces, ask.n, rng, weights, lambda image: hints.get(image, ())))


def _usable_hints(ask: Ask, pool: Sequence[PoolImage]) -> Mapping[str, Sequence[Hint]]:
    try:
        hints = parse_hints(ask.hints)
    except ValueError as error:
        raise MethodError(str(error)) from error
    shapes = {i.id: i.shape for i in pool}
    for image in sorted(set(hints) & set(shapes)):
        for hint in hints[image]:
            if any(v < 0 or v >= n for v, n in zip(hint.voxel, shapes[image], strict=True)):
                raise MethodError(f"a hint at {hint.voxel} lies outside of {image}, whose shape is {shapes[image]}")
    if not set(hints) & set(shapes):
        raise MethodError(
            f"{ask.method.name} needs hints of where the classes are and this request has none for the pool's images: "
            "send hints, or use random_fg_predicted, which works from predictions"
        )
    return hints


def _predicted_hints(ask: Ask, pool: Sequence[PoolImage], evidence: Evidence) -> HintsOf:
    """Hints from the predicted label map of an image, made when the image is first drawn from."""
    images, background = {i.id: i for i in pool}, ask.labels.get(BACKGROUND, 0)

    @lru_cache(maxsize=4096)
    def hints_of(image: str) -> Sequence[Hint]:
        moments = moments_of(images[image], evidence)
        by_value = {value: name for name, value in ask.labels.items()}
        names = {c: by_value.get(c, str(c)) for c in range(moments.shape[0]) if c != background}
        return hints_from_labels(moments.predicted(), image, names, ask.rng("hints", image))

    return hints_of


def select_precomputed(ask: Ask, pool: Sequence[PoolImage]) -> list[Pick]:
    """The regions of the request, `{"image", "start", "size"}`, in their order.

    Raises:
        MethodError: none given, an unknown image, a box outside of its image, or one that overlaps another.
    """
    images = {i.id: i for i in pool}
    if not ask.regions:
        raise MethodError(f"{ask.method.name} needs a list of regions and the request has none: send regions")
    chosen: list[Region] = []
    for given in list(ask.regions)[: ask.n]:
        try:
            region = Region(str(given["image"]), triple(given["start"], "start"), triple(given["size"]))
        except (KeyError, TypeError, ValueError) as error:
            raise MethodError(f"a region needs image, start and size, found {dict(given)}: {error}") from error
        if region.image not in images:
            raise MethodError(f"region of {region.image!r}: no such image in the pool")
        if not region.inside(images[region.image].shape):
            raise MethodError(
                f"region of {region.image} from {region.start} to {region.stop} leaves the image, whose shape is "
                f"{images[region.image].shape}"
            )
        if not images[region.image].is_free(region.box) or any(region.overlaps(other) for other in chosen):
            raise MethodError(f"region of {region.image} at {region.start} overlaps one that is taken already")
        chosen.append(region)
    return picks_from(ask, [Candidate(r.image, r.start, r.size, 0.0, 0.0) for r in chosen])


def _as_picks(ask: Ask, draws: Sequence[Draw]) -> list[Pick]:
    chosen = [
        Candidate(d.image, d.start, d.size, 0.0, 0.0, {"area": d.area, **({"class": d.label} if d.label else {})})
        for d in draws
    ]
    return picks_from(ask, chosen)
