# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Class-stratified selection of ClaSP PE: one stream of candidates a class and one for all classes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lib.regions import Box
from lib.selectors.greedy import ScoredBox, best_boxes

ALL = -1  # the stream of all classes together
T = TypeVar("T")


def image_limits(n_per_image: int, ratio: float, classes: Sequence[int]) -> dict[int, int]:
    """Most candidates of each stream from one image (nnActive, section 4).

    max(1, floor(n ratio / (|F| + 1))) for each foreground class F of `classes`, max(1, floor(n (1 - ratio))) for `ALL`.
    """
    per_class = max(1, int(n_per_image * ratio / (len(classes) + 1)))
    return {**dict.fromkeys(classes, per_class), ALL: max(1, int(n_per_image * (1 - ratio)))}


def pick_streams(
    grids: Mapping[int, NDArray[np.floating[Any]]],
    size: Sequence[int],
    stride: Sequence[int],
    taken: Sequence[Box],
    limits: Mapping[int, int],
    rng: np.random.Generator,
) -> dict[int, list[ScoredBox]]:
    """Best boxes of every stream in one image, streams in random order, none overlapping a box of another.

    `grids` maps a stream to its utilities at every position (GX, GY, GZ).
    """
    order = list(grids)
    rng.shuffle(order)
    blocked, found = list(taken), dict[int, list[ScoredBox]]()
    for stream in order:
        found[stream] = best_boxes(grids[stream], size, stride, blocked, limits[stream])
        blocked += [((start[0], start[1], start[2]), (size[0], size[1], size[2])) for start, _ in found[stream]]
    return found


def allot(n: int, ratio: float, classes: Sequence[int], rng: np.random.Generator) -> dict[int, int]:
    """Share of `n` per stream: floor(n ratio) spread evenly over the classes, the rest to `ALL`.

    The remainder of the division goes, one each, to classes in random order.
    """
    of_classes = int(n * ratio) if classes else 0
    share, left = divmod(of_classes, len(classes)) if classes else (0, 0)
    order = list(classes)
    rng.shuffle(order)
    return {**{c: share + (c in order[:left]) for c in classes}, ALL: n - of_classes}


def merge_streams(
    streams: Mapping[int, Sequence[tuple[float, T]]], quotas: Mapping[int, int]
) -> tuple[list[tuple[int, T]], dict[int, int]]:
    """The best of every stream up to its quota; what a stream lacks is filled from `ALL`, then from the other streams.

    Takes (utility, item) a stream. Gives (stream, item) in the order of streams, and how many each stream lacked.
    Published code stops with an error where a stream runs short.
    """
    ranked = {s: sorted(items, key=lambda item: -item[0]) for s, items in streams.items()}
    chosen = [(s, item) for s in quotas for _, item in ranked.get(s, [])[: quotas[s]]]
    lacking = {s: n - len(ranked.get(s, [])) for s, n in quotas.items() if len(ranked.get(s, [])) < n}
    missing = sum(lacking.values())
    spare_all = [(ALL, item) for _, item in ranked.get(ALL, [])[quotas[ALL] :]]
    others = [(u, s, item) for s in quotas if s != ALL for u, item in ranked.get(s, [])[quotas[s] :]]
    spare = spare_all + [(s, item) for _, s, item in sorted(others, key=lambda entry: -entry[0])]
    return chosen + spare[:missing], lacking
