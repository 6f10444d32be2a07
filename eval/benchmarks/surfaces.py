# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""HD95 and mean surface distance together, against MONAI's two calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from monai.metrics.utils import get_edge_surface_distance
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from eval.benchmarks import Row
from eval.benchmarks.timing import ratio
from eval.metrics.surfaces import Surfaces
from eval.protocol.dataset import read_dataset
from eval.protocol.volumes import read_volume

Bools = NDArray[np.bool_]
Pair = tuple[Bools, Bools]
Distances = list[tuple[float, float]]
_CASES = 100


def run() -> Iterator[Row]:
    """One row for 100 small scans with two classes, one for a large scan with two organs."""
    rng = np.random.default_rng(0)
    real = _real_hippocampi(rng)
    source = "real" if real else "phantom"
    small = real or [pair for _ in range(_CASES) for pair in _blobs(rng, (36, 50, 35), 8.0)]
    yield distances_row(f"HD95 + MSD, {_CASES} {source} hippocampi, 2 classes", small, (1.0, 1.0, 1.0), 4.0, 3)
    large = _blobs(rng, (512, 512, 200), 60.0)
    yield distances_row("HD95 + MSD, 512 x 512 x 200 phantom, 2 organs", large, (0.8, 0.8, 2.5), 8.0, 1)


def distances_row(name: str, pairs: list[Pair], spacing: tuple[float, ...], bar: float, reference_repeats: int) -> Row:
    """Row of one set of mask pairs, once both ways give the same mm."""
    difference = np.abs(np.array(ours(pairs, spacing)) - np.array(_exact_monai(pairs, spacing))).max()
    assert difference < 1e-6, f"{difference} mm apart from MONAI"
    return ratio(name, lambda: ours(pairs, spacing), lambda: monai(pairs, spacing), bar, 3, reference_repeats)


def ours(pairs: list[Pair], spacing: tuple[float, ...]) -> Distances:
    """(HD95, MSD) of every pair from one pass over both surfaces."""
    found = [Surfaces.between(*pair, spacing=spacing) for pair in pairs]
    return [(surfaces.hausdorff(95), surfaces.mean()) for surfaces in found]


def monai(pairs: list[Pair], spacing: tuple[float, ...]) -> Distances:
    """The same from MONAI, which computes each measure from the masks."""
    found = []
    for pair in pairs:
        prediction, truth = (torch.from_numpy(mask)[None, None] for mask in pair)
        lengths = list(spacing)
        hd95 = compute_hausdorff_distance(prediction, truth, percentile=95, include_background=True, spacing=lengths)
        mean = compute_average_surface_distance(
            prediction, truth, symmetric=True, include_background=True, spacing=lengths
        )
        found.append((float(hd95), float(mean)))
    return found


def _exact_monai(pairs: list[Pair], spacing: tuple[float, ...]) -> Distances:
    """MONAI's surface distances with percentile and mean in double precision: its own have float32 ranks and sums."""
    found = []
    for pair in pairs:
        prediction, truth = (torch.from_numpy(mask) for mask in pair)
        _, distances, _ = get_edge_surface_distance(prediction, truth, spacing=spacing, symmetric=True)
        there, back = (np.asarray(d, dtype=np.float64) for d in distances)
        hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
        found.append((float(hd95), float(np.concatenate([there, back]).mean())))
    return found


def _real_hippocampi(rng: np.random.Generator) -> list[Pair]:
    """Labels of the decathlon's hippocampi against themselves moved and ragged; empty where the scans are not."""
    shared = Path(os.environ.get("PATCHWISE_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    folder = shared / "data" / "Task04_Hippocampus"
    if not folder.is_dir():
        return []
    pairs = []
    for case in read_dataset(folder).cases[:_CASES]:
        label_xyz = read_volume(case.label, placed=False).values_xyz
        pairs += [_disturbed(label_xyz == value, rng) for value in (1, 2)]
    return pairs


def _blobs(rng: np.random.Generator, shape: tuple[int, ...], radius: float) -> list[Pair]:
    """Two ellipsoids, each against itself disturbed."""
    pairs = []
    for place in (0.33, 0.62):
        axes = [np.arange(n) for n in shape]
        centre = [n * place for n in shape]
        radii = [min(radius * rng.uniform(0.8, 1.2), 0.3 * n) for n in shape]
        terms = [((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii, strict=True)]
        mask = terms[0][:, None, None] + terms[1][None, :, None] + terms[2][None, None, :] < 1
        pairs.append(_disturbed(mask, rng))
    return pairs


def _disturbed(mask: Bools, rng: np.random.Generator) -> Pair:
    """The mask shifted by a voxel with parts of its border removed or added, like the prediction of a network."""
    moved = np.roll(mask, tuple(rng.integers(-1, 2, size=3)), axis=(0, 1, 2))
    rim = binary_dilation(moved) & ~moved
    prediction = moved | (rim & (rng.random(mask.shape) < 0.3))
    return prediction, mask
