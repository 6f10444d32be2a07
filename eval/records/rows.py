# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Rows of the referee's tables: measures of one case, of one round, of one region."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.metrics.cost import COSTS
from eval.metrics.segmentation import dice, dice_per_slice, relative_volume_error, sensitivity, specificity
from eval.metrics.surfaces import Surfaces

# Costs that need the labels inside of a region; runs from before they were kept have NaN there.
_DRAWN = COSTS[3:]


def case_rows(
    predicted_xyz: NDArray[np.uint8],
    truth_xyz: NDArray[np.uint8],
    foreground: Mapping[str, int],
    spacing: Sequence[float],
    *,
    tolerance: float = 1.0,
    axis: int = 2,
) -> list[dict[str, Any]]:
    """One row per class with every segmentation measure; undefined values are None, so that JSON can hold them.

    Distances in mm, all from one pass over both surfaces; `tolerance` in mm of the surface Dice; `axis`: the 2D Dice is
    a mean over the slices across it.
    """
    rows = []
    for name, value in foreground.items():
        prediction, truth = predicted_xyz == value, truth_xyz == value
        surfaces = Surfaces.between(prediction, truth, spacing=spacing)
        measures = {
            "dice": dice(prediction, truth),
            "dice_2d": dice_per_slice(prediction, truth, axis=axis),
            "hausdorff95": surfaces.hausdorff(95),
            "hausdorff95_pooled": surfaces.hausdorff(95, pooled=True),
            "hausdorff": surfaces.hausdorff(),
            "mean_surface_distance": surfaces.mean(),
            "surface_dice": surfaces.dice(tolerance),
            "relative_volume_error": relative_volume_error(prediction, truth),
            "sensitivity": sensitivity(prediction, truth),
            "specificity": specificity(prediction, truth),
        }
        rows.append({"class": name, **{key: None if np.isnan(v) else v for key, v in measures.items()}})
    return rows


def class_means(rows: Sequence[Mapping[str, Any]], measure: str, classes: Iterable[str]) -> dict[str, float]:
    """Mean of a measure over the cases where it is defined, for every class; NaN for a class without such a case."""
    means = {}
    for name in classes:
        values = np.array([row[measure] for row in rows if row["class"] == name], dtype=float)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the mean of no defined case is NaN, as declared
            means[name] = float(np.nanmean(values)) if values.size else float("nan")
    return means


def round_row(
    regions: Sequence[Mapping[str, Any]],
    tested: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    pool_foreground: int,
) -> dict[str, Any]:
    """Budget spent so far (`regions` of all rounds until now) and quality reached.

    mean_dice and mean_hd95 (mm) are plain means over classes of means over cases (nnActive specification, section 8);
    foreground_fraction is the share of the pool's foreground voxels that lie in asked regions.
    """
    voxels = sum(int(np.prod(region["size"])) for region in regions)
    costs = {name: sum(region.get("costs", {}).get(name, float("nan")) for region in regions) for name in _DRAWN}
    foreground = sum(region["classes"][name] for region in regions for name in classes)
    dices = class_means(tested, "dice", classes)
    distances = class_means(tested, "hausdorff95", classes)
    return {
        "regions": len(regions),
        "voxels": voxels,
        "foreground_voxels": foreground,
        "foreground_fraction": foreground / pool_foreground if pool_foreground else float("nan"),
        "mean_dice": float(np.mean(list(dices.values()))),
        **{f"dice_{name}": value for name, value in dices.items()},
        "mean_hd95": float(np.mean(list(distances.values()))),
        **costs,
    }


def query_row(region: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """One region as a flat row: its place, size, score and content."""
    starts = dict(zip("xyz", region["start"], strict=True))
    sizes = dict(zip(("dx", "dy", "dz"), region["size"], strict=True))
    inside = {f"voxels_{name}": region["classes"][name] for name in classes}
    return {
        "query": region["query"],
        "image": region["image"],
        **starts,
        **sizes,
        "unit": region["unit"],
        "score": region["score"],
        "foreground_voxels": sum(inside.values()),
        **inside,
        **{name: region.get("costs", {}).get(name, float("nan")) for name in _DRAWN},
    }
