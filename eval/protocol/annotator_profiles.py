# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Simulated annotators with human errors: labels of a region by a profile, seeded by (seed, query)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.ndimage import gaussian_filter, label, map_coordinates

from eval.errors import RefereeError
from eval.protocol.oracle import child_rng, region_slices

UNLABELLED = 255  # in an answer: not looked at, so the voxel stays without a label
_REACH = 4  # standard deviations that a displaced border is looked up at


class Oracle(BaseModel):
    """A profile and its options.

    - perfect: ground truth.
    - boundary_noisy: borders moved by a smooth random field of `amplitude` mm (standard deviation per axis) and
      `smoothness` mm.
    - missing_small: connected objects below `smallest` mm^3 are overlooked, each with probability `share`.
    - partly_finished: a `share` of the queries is left unfinished. The first `done` of its slices are painted and the
      `rest` is unlabelled, or background as by a careless annotator.
    - class_confusion: every class of a region is taken for another one with probability `share`.
    - late: a `share` of the queries is answered a round later, or with `late_by: lease` after lease expiry
      (`lease_minutes`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: Literal["perfect", "boundary_noisy", "missing_small", "partly_finished", "late", "class_confusion"] = (
        "perfect"
    )
    amplitude: float = Field(default=1.0, ge=0, description="mm")
    smoothness: float = Field(default=3.0, gt=0, description="mm")
    smallest: float = Field(default=100.0, ge=0, description="mm^3")
    share: float = Field(default=0.5, ge=0, le=1)
    done: float = Field(default=0.5, ge=0, le=1)
    rest: Literal["unlabelled", "background"] = "unlabelled"
    late_by: Literal["round", "lease"] = "round"
    lease_minutes: float = Field(default=0.01, gt=0)

    def is_late(self, seed: int, query: object) -> bool:
        """Return whether this query is answered late."""
        return self.profile == "late" and bool(child_rng(seed, "late", query).random() < self.share)


def paint(
    label_xyz: NDArray[np.uint8],
    region: Mapping[str, Any],
    oracle: Oracle,
    seed: int,
    *,
    foreground: Mapping[str, int],
    spacing: Sequence[float],
    axis: int = 2,
) -> NDArray[np.uint8]:
    """Paint `region` of the true `label_xyz` as the oracle does, in the region's shape; spacing in mm.

    The same seed and query give the same result, independently of earlier queries.

    Raises:
        RefereeError: class_confusion with one foreground class.
    """
    box = region_slices(region)
    truth = label_xyz[box]
    rng = child_rng(seed, oracle.profile, region.get("query"), region["image"])
    if oracle.profile == "boundary_noisy":
        return _moved(label_xyz, box, oracle, rng, spacing)
    if oracle.profile == "missing_small":
        return _without_small(label_xyz, foreground, oracle, rng, spacing)[box]
    if oracle.profile == "partly_finished":
        return _begun(truth, oracle, rng, axis)
    if oracle.profile == "class_confusion":
        return _confused(truth, foreground, oracle, rng)
    return truth.copy()


def answers(
    label_xyz: NDArray[np.uint8], regions: Sequence[Mapping[str, Any]], oracle: Oracle, seed: int, **how: Any
) -> NDArray[np.uint8]:
    """Label map that a client uploads for the `regions` of one image: painted inside of them, background elsewhere."""
    answer_xyz = np.zeros_like(label_xyz)
    for region in regions:
        answer_xyz[region_slices(region)] = paint(label_xyz, region, oracle, seed, **how)
    return answer_xyz


def _moved(
    label_xyz: NDArray[np.uint8],
    box: tuple[slice, ...],
    oracle: Oracle,
    rng: np.random.Generator,
    spacing: Sequence[float],
) -> NDArray[np.uint8]:
    """Labels looked up at places displaced by a smooth field, never further than `_REACH` amplitudes an axis."""
    steps = np.asarray(spacing, dtype=np.float64)
    shape = tuple(part.stop - part.start for part in box)
    places = np.indices(shape).astype(np.float64)
    for axis in range(3):
        field = gaussian_filter(rng.standard_normal(shape), oracle.smoothness / steps, mode="wrap")
        spread = field.std()
        scaled = field * (oracle.amplitude / spread if spread > 0 else 0.0)
        reach = _REACH * oracle.amplitude
        places[axis] += box[axis].start + np.clip(scaled, -reach, reach) / steps[axis]
    found = map_coordinates(label_xyz, places, order=0, mode="nearest")
    return np.asarray(found, dtype=np.uint8)


def _without_small(
    label_xyz: NDArray[np.uint8],
    foreground: Mapping[str, int],
    oracle: Oracle,
    rng: np.random.Generator,
    spacing: Sequence[float],
) -> NDArray[np.uint8]:
    """The whole label map without the small objects that are overlooked; an object is seen or not as a whole."""
    kept = label_xyz.copy()
    bar = oracle.smallest / float(np.prod(spacing))
    for value in foreground.values():
        parts, count = label(label_xyz == value, structure=np.ones((3, 3, 3)))
        small = np.flatnonzero(np.bincount(parts.ravel(), minlength=count + 1)[1:] < bar) + 1
        overlooked = small[rng.random(small.size) < oracle.share]
        kept[np.isin(parts, overlooked)] = 0
    return kept


def _begun(truth: NDArray[np.uint8], oracle: Oracle, rng: np.random.Generator, axis: int) -> NDArray[np.uint8]:
    painted = truth.copy()
    if rng.random() < oracle.share:
        done = int(np.ceil(oracle.done * truth.shape[axis]))
        rest: list[slice] = [slice(None)] * 3
        rest[axis] = slice(done, None)
        painted[tuple(rest)] = UNLABELLED if oracle.rest == "unlabelled" else 0
    return painted


def _confused(
    truth: NDArray[np.uint8], foreground: Mapping[str, int], oracle: Oracle, rng: np.random.Generator
) -> NDArray[np.uint8]:
    values = list(foreground.values())
    if len(values) < 2:
        raise RefereeError("the oracle class_confusion needs two or more foreground classes; choose another profile")
    painted = truth.copy()
    for value in values:
        other = int(rng.choice([v for v in values if v != value]))
        if rng.random() < oracle.share:
            painted[truth == value] = other
    return painted
