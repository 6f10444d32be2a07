# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Pictures of the reason for a region: its middle slice and the score map, with the box drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.regions import Box

RGB = NDArray[np.uint8]
BOX_COLOUR = (255, 204, 0)
ZOOM_TO = 240


def thumbnail(image_xyz: NDArray[np.float32], score_xyz: NDArray[np.floating[Any]] | None, box: Box) -> RGB:
    """RGB picture (H, W, 3): the image, and right of it the score map where there is one.

    The slice lies across the axis on which the box is thinnest compared to the image, through the middle of the box.
    Grey values are stretched from the 1st to the 99th percentile of the image, scores from 0 to their maximum.
    """
    axis = slice_axis(image_xyz.shape, box)
    at = box[0][axis] + box[1][axis] // 2
    low, high = np.percentile(image_xyz, (1, 99))
    plane = (np.take(image_xyz, at, axis=axis) - low) / max(float(high - low), 1e-8)
    panels = [_framed(_grey(plane), axis, box)]
    if score_xyz is not None:
        heat = np.take(score_xyz, at, axis=axis) / max(float(score_xyz.max()), 1e-8)
        panels.append(_framed(_heat(heat), axis, box))
    gap = np.full((panels[0].shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)


def slice_axis(shape: Sequence[int], box: Box) -> int:
    """Axis on which the box spans the smallest share of the image, the last of equal ones."""
    shares = [d / n for d, n in zip(box[1], shape, strict=True)]
    return max(axis for axis in range(3) if shares[axis] == min(shares))


def _grey(plane: NDArray[np.floating[Any]]) -> RGB:
    return np.repeat((255 * np.clip(plane[..., None], 0, 1)).astype(np.uint8), 3, axis=2)


def _heat(plane: NDArray[np.floating[Any]]) -> RGB:
    """Black over red and yellow to white, like hot metal."""
    channels = [np.clip(3 * np.clip(plane, 0, 1) - k, 0, 1) for k in range(3)]
    return (255 * np.stack(channels, axis=-1)).astype(np.uint8)


def _framed(plane_rgb: RGB, axis: int, box: Box) -> RGB:
    """Enlarged by whole factors, turned so that the first axis runs to the right and the second up, box outlined."""
    rows, columns = (k for k in range(3) if k != axis)
    zoom = max(1, ZOOM_TO // max(plane_rgb.shape[:2]))
    big = np.repeat(np.repeat(plane_rgb, zoom, axis=0), zoom, axis=1).copy()
    a, b = zoom * box[0][rows], zoom * (box[0][rows] + box[1][rows]) - 1
    c, d = zoom * box[0][columns], zoom * (box[0][columns] + box[1][columns]) - 1
    big[[a, b], c : d + 1] = BOX_COLOUR
    big[a : b + 1, [c, d]] = BOX_COLOUR
    return np.ascontiguousarray(big.transpose(1, 0, 2)[::-1])
