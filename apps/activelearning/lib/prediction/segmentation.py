# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Segmentation of an image by an ensemble; a large image never has all of its probabilities in memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from lib.prediction.posterior import DEEP_ENSEMBLE, Ensemble
from lib.prediction.postprocessing import label_map, without_doubted
from lib.prediction.tiled import LARGE_BYTES, WORKING_BYTES, is_large, streamed_moments
from lib.storage.volumes import Volume

OVERLAP = 0.5  # of the windows, as in `Ensemble.mean`


def segment(
    ensemble: Ensemble,
    volume: Volume,
    classes: int,
    scratch: Path,
    mirror: bool = True,
    limit: int = LARGE_BYTES,
    working_bytes: int = WORKING_BYTES,
) -> NDArray[np.uint8]:
    """Label map (X, Y, Z) of the members' mean on the stored grid, by the rules of `lib.prediction.postprocessing`.

    Above `limit` bytes of probabilities the members predict the image in slabs (`lib.prediction.tiled`). The
    probabilities that the rules read are then kept in half precision in a nameless file in `scratch`.

    Args:
        classes: those of the networks, background included.
        scratch: folder with room for 2 bytes per class and voxel. Only large images need any.
        mirror: whether to average over mirror images, if the ensemble has axes for them; each costs a prediction.

    Raises:
        OSError: no room in `scratch`.
    """
    smallest = ensemble.smallest_voxels(volume.spacing)
    if not is_large(classes, volume.shape, limit):
        return label_map(ensemble.mean(volume, OVERLAP, mirror), ensemble.confidence, smallest, ensemble.single)
    ruled = ensemble.confidence > 0 or bool(smallest) or bool(ensemble.single)
    label_xyz = np.empty(volume.shape, np.uint8)
    mirrored = ensemble.mirrored if mirror else ()
    with tempfile.TemporaryFile(dir=scratch) as file:
        probs_shape = (classes, *volume.shape)
        if ruled:
            # A mapped file that met a full disk would end the process.
            os.posix_fallocate(file.fileno(), 0, int(np.prod(probs_shape)) * np.dtype(np.float16).itemsize)
        for box, moments in streamed_moments(
            ensemble, volume, OVERLAP, DEEP_ENSEMBLE, 0, classes, working_bytes, mirrored
        ):
            here = tuple(slice(*ends) for ends in box)
            mean_cxyz = moments.mean
            label_xyz[here] = mean_cxyz.argmax(axis=0)
            if ruled:
                # Mapped anew for every slab: pages written through a mapping count as memory until the mapping is
                # closed.
                _mapped(file, probs_shape)[(slice(None), *here)] = mean_cxyz
        if ruled:
            without_doubted(label_xyz, _mapped(file, probs_shape), ensemble.confidence, smallest, ensemble.single)
    return label_xyz


def _mapped(file: BinaryIO, shape: tuple[int, ...]) -> NDArray[np.float16]:
    return np.memmap(file, np.float16, "r+", shape=shape)
