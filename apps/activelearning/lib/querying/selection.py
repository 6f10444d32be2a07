# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The one entry to the query methods: `select` a batch of regions from a pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lib.querying.at_random import select_precomputed, select_random
from lib.querying.by_score import select_classes, select_peaks, select_scored, select_volumes
from lib.querying.by_unit import (
    select_by_features,
    select_by_gradients,
    select_diverse,
    select_stochastic,
    select_stratified,
    select_strided,
)
from lib.querying.method import MethodError, QueryMethod
from lib.querying.types import Ask, Candidate, Evidence, Pick, PoolExhausted, PoolImage
from lib.regions import triple

__all__ = ["SUMMARISED", "Ask", "Candidate", "Evidence", "Pick", "PoolExhausted", "PoolImage", "select"]

_Stage = Callable[[Ask, Sequence[PoolImage], Any], list[Pick]]

_STAGES: dict[str, _Stage] = {
    "greedy": select_scored,
    "power": select_scored,
    "softrank": select_scored,
    "class_stratified": select_classes,
    "peaks": select_peaks,
    "masked_volume": select_volumes,
    "stochastic_batch": select_stochastic,
    "stratified": lambda ask, pool, evidence: select_stratified(ask, pool),
    "strided": select_strided,
    "strided_uncertainty": select_strided,
    "kmeans_plus_plus": select_by_gradients,
    "usim": select_by_gradients,
    "diverse_top": select_diverse,
    "random": select_random,
    "random_fg": select_random,
    "random_fg_predicted": select_random,
    "starting_budget": select_random,
    "precomputed": lambda ask, pool, evidence: select_precomputed(ask, pool),
}

# Selectors whose candidates are kept per image (`lib.querying.candidate_cache`), so that a second query skips images
# that cannot win.
SUMMARISED = frozenset({"greedy", "power", "softrank", "class_stratified"})


def select(
    method: QueryMethod,
    pool: Sequence[PoolImage],
    evidence: Evidence | None,
    n: int,
    *,
    size: Sequence[int] | None = None,
    seed: int = 0,
    round_: int = 0,
    axis: int = 2,
    stride: Sequence[int] = (1, 1, 1),
    n_per_image: int | None = None,
    hints: Sequence[Mapping[str, Any]] = (),
    regions: Sequence[Mapping[str, Any]] = (),
    labels: Mapping[str, int] | None = None,
    rounds_total: int | None = None,
    utilities: bool = False,
) -> list[Pick]:
    """The `n` regions that `method` selects next, best first, without overlap with each other or a taken box.

    The result depends only on the arguments, not on the order of `pool`. `size` is a patch in voxels (clipped to the
    image), `axis` what a slice lies across, `labels` the class values by name, `round_` the round of the query (0
    is the starting budget), `rounds_total` the planned number of rounds, for schedules. With `utilities`, "step" of
    each reason records the utility of the pick at its greedy step, the best candidates of that step that were not
    taken, and the number left. The picks are the same.

    Raises:
        MethodError: the method cannot work with this request (no model, no hints, no size, a prediction off the grid of
            its image, ...).
        PoolExhausted: fewer than `n` regions are left; it carries them.
    """
    patch, steps = None if size is None else triple(size), triple(stride, "stride")
    names = labels or {}
    ask = Ask(method, n, patch, seed, round_, axis, steps, n_per_image, hints, regions, names, rounds_total, utilities)
    images = sorted(pool, key=lambda image: image.id)
    _check(ask, images, evidence)
    stage = _STAGES.get(method.selector, select_by_features)
    picks = stage(ask, images, evidence) if images else []
    if len(picks) < n and method.selector != "precomputed":
        raise PoolExhausted(n, picks, _limited_by(ask, picks))
    return picks


def _check(ask: Ask, images: Sequence[PoolImage], evidence: Evidence | None) -> None:
    if ask.n < 1:
        raise MethodError(f"a batch has one region or more, found {ask.n}")
    if ask.n_per_image is not None and ask.n_per_image < 1:
        raise MethodError(f"n_per_image must be one or more, found {ask.n_per_image}")
    if min(ask.stride) < 1 or (ask.size is not None and min(ask.size) < 1):
        raise MethodError(f"size and stride must be one voxel or more, found {ask.size} and {ask.stride}")
    if ask.method.unit == "patch" and ask.size is None and ask.method.selector != "precomputed":
        raise MethodError(f"{ask.method.name} selects patches: set their size in voxels or millimetres")
    if "features" in ask.method.needs and ask.method.posterior is None and evidence is None:
        raise MethodError(f"{ask.method.name} needs features of the images and there are none: use random")
    if ask.method.posterior is not None and evidence is None:
        raise MethodError(f"{ask.method.name} needs a trained model and there is none yet: train first, or use random")
    if ask.axis not in (0, 1, 2):
        raise MethodError(f"axis must be 0, 1 or 2, found {ask.axis!r}")
    repeated = [name for name, count in Counter(i.id for i in images).items() if count > 1]
    if repeated:
        raise MethodError(f"the pool holds {repeated[0]} more than once")


def _limited_by(ask: Ask, picks: Sequence[Pick]) -> str:
    """Reason for a shortage that the limit per image causes, although free positions are left."""
    reached = ask.n_per_image is not None and max(Counter(p.image for p in picks).values(), default=0) >= ask.per_image
    return f" with at most {ask.n_per_image} per image" if reached else ""
