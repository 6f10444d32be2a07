# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Compute the fingerprint of a pool from its images and their annotated voxels."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lib.models.plan import PlanError
from lib.partial_labels import UNLABELLED
from lib.planning.fingerprint import Fingerprint, Grey
from lib.randomness import child_rng
from lib.regions import Triple
from lib.storage.atomic_files import read_json
from lib.storage.volume_headers import ImageError
from lib.storage.volumes import Volume, image_geometry, load_image, load_label

logger = logging.getLogger(__name__)

# Images whose intensities are read; sizes and spacings come from the headers of all.
SAMPLED_IMAGES = 24
# Voxels remembered an image for the percentiles of the whole pool.
SAMPLED_VOXELS = 10_000
# With fewer annotated foreground voxels, the percentiles of a tail are unreliable.
ENOUGH_FOREGROUND = 1_000
# Air is -1000 Hounsfield units, padding of CT scanners lower; nothing in a body is above 4000 but metal.
AIR, METAL = -700.0, 4000.0


def take_fingerprint(
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    modality: str | None = None,
    ignored: Collection[int] = (),
) -> Fingerprint:
    """Fingerprint of a pool: headers of all `images`, intensities of a bounded sample, one image in memory at a time.

    `labels` are partial label maps; only their annotated foreground voxels are read. An unreadable image is left out
    and named. `modality` is the entry in dataset.json; None guesses CT from air at about -1000.
    `ignored` are values of labels, beside 255, that are not annotated.

    Raises:
        PlanError: no image can be read.
    """
    geometry: dict[str, tuple[Triple, tuple[float, float, float]]] = {}
    unreadable = []
    for name in sorted(images):
        try:
            shape, affine = image_geometry(images[name])
        except ImageError as error:
            logger.warning("left out of the plan: %s", error)
            unreadable.append(name)
            continue
        geometry[name] = shape, Volume(np.empty(shape, np.uint8), affine, name).spacing
    each, voxels = [], []
    marked: dict[int, list[NDArray[np.float32]]] = {}
    for name in _sample(sorted(geometry), sorted(set(labels) & set(geometry))):
        try:
            array_xyz = load_image(images[name]).array_xyz
        except ImageError as error:
            logger.warning("left out of the plan: %s", error)
            unreadable.append(name)
            del geometry[name]
            continue
        each.append(Grey.of(array_xyz))
        voxels.append(_some(array_xyz.ravel(), name))
        if name in labels:
            for value, found in _foreground(array_xyz, labels[name], ignored).items():
                marked.setdefault(value, []).append(_some(found, name))
    if not geometry or not each:
        raise PlanError(f"no image of the pool can be read, out of {len(images)}; put readable images there first")
    guess = sum(g.minimum <= AIR and g.high <= METAL for g in each) > len(each) / 2
    return Fingerprint(
        shapes=tuple(sorted(shape for shape, _ in geometry.values())),
        spacings=tuple(spacing for _, spacing in sorted(geometry.values())),
        modality=("CT" if guess else "other") if modality is None else modality,
        modality_source="dataset.json" if modality else "guessed from the grey values",
        images_grey=tuple(sorted(each, key=lambda grey: (grey.high, grey.mean))),
        grey=Grey.of(np.concatenate(voxels)),
        foreground=_balanced([np.concatenate(parts) for _, parts in sorted(marked.items())]),
        unreadable=tuple(sorted(unreadable)),
    )


def declared_modality(folder: Path) -> str | None:
    """Modality that a decathlon's or nnU-Net's dataset.json names: "CT" or "other"; None without one."""
    try:
        content = read_json(folder / "dataset.json")
    except (OSError, ValueError):
        return None
    named = content.get("modality") or content.get("channel_names") if isinstance(content, dict) else None
    first = next(iter(named.values()), None) if isinstance(named, dict) else named
    if not isinstance(first, str) or not first:
        return None
    return "CT" if first.strip().upper() == "CT" else "other"


def _sample(names: list[str], annotated: list[str]) -> list[str]:
    """At most SAMPLED_IMAGES names, evenly spread; half of the places are for annotated images."""
    chosen = set(spread_over(annotated, SAMPLED_IMAGES // 2))
    rest = [name for name in names if name not in chosen]
    return sorted(chosen | set(spread_over(rest, SAMPLED_IMAGES - len(chosen))))


def spread_over(names: list[str], count: int) -> list[str]:
    """At most `count` of the names, evenly spread over their order."""
    if len(names) <= count:
        return names
    return [names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int)]


def _foreground(
    array_xyz: NDArray[np.float32], label: Path, ignored: Collection[int]
) -> dict[int, NDArray[np.float32]]:
    """Grey values of every annotated class; none where the label map is not on the grid of its image."""
    mask = load_label(label).array_xyz
    if mask.shape != array_xyz.shape:
        return {}
    inside = (mask > 0) & ~np.isin(mask, [UNLABELLED, *ignored])
    values, classes = array_xyz[inside], mask[inside]
    return {int(c): values[classes == c] for c in np.unique(classes)}


def _balanced(classes: Sequence[NDArray[np.float32]]) -> Grey | None:
    """Grey values in which every class counts the same; None where little is annotated.

    In a plain sample a rare class is below the percentile, so clipping would make it look like its surroundings.
    """
    total = sum(len(values) for values in classes)
    if total < ENOUGH_FOREGROUND:
        return None
    largest = max(map(len, classes))
    even = [np.tile(values, round(largest / len(values))) for values in classes]
    return replace(Grey.of(np.concatenate(even)), voxels=total)


def _some(values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    if len(values) <= SAMPLED_VOXELS:
        return values
    drawn: NDArray[np.float32] = values[
        child_rng(0, None, "fingerprint", name).integers(len(values), size=SAMPLED_VOXELS)
    ]
    return drawn
