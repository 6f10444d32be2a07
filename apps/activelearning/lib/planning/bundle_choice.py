# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Which bundles a server loads: those that were asked for, and the one that suits the images where none was."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lib.models.checkpoints import choose_device
from lib.models.recipe import Bundle
from lib.models.trusted_bundles import trusted_bundle
from lib.options import AppOptions
from lib.planning.configuration_choice import choose_configuration
from lib.planning.fingerprint import Fingerprint, Grey
from lib.planning.fingerprint_reader import spread_over
from lib.planning.planner import REFERENCE_GIB, Budget
from lib.planning.resolution import Spacing
from lib.regions import Triple
from lib.storage.volume_headers import ImageError
from lib.storage.volumes import Volume, image_geometry

logger = logging.getLogger(__name__)

AUTO = "auto"
BUNDLE_OF = {
    "2d": "segmentation_dynunet_2d",
    "3d_anisotropic": "segmentation_aunet_3d",
    "3d_fullres": "segmentation_dynunet_3d",
}
# Headers read for the choice; medians of more would hardly differ.
HEADERS = 200


def load_bundles(
    options: AppOptions, folder: Path, images: Mapping[str, Path], models: Path, written: Iterable[Path]
) -> tuple[dict[str, Bundle], dict[str, str]]:
    """The bundles to load by name, and why each of them was taken.

    Args:
        options: of the app; `models` names bundles, or "auto".
        folder: of the bundles.
        images: files of the pool by id.
        models: folder of the trained models of the project.
        written: folders that requests write into.

    Raises:
        OptionError: a bundle that other people could have changed.
        RecipeError: no such bundle.
    """
    why: dict[str, str] = {}
    for name in options.models:
        if name == AUTO:
            chosen, sentence = choose_bundle(images, models, choose_budget(options))
            why.setdefault(chosen, sentence)
            logger.info("models auto: %s; %s", chosen, sentence)
        else:
            why[name] = "as asked for"
    places = list(written)
    return {name: Bundle(trusted_bundle(folder, name, places)) for name in why}, why


def choose_budget(options: AppOptions) -> Budget:
    """Device of the options, and memory that is enough for any crop there: the choice of a bundle needs no more."""
    cpu = choose_device(options.device).type == "cpu"
    return Budget("cpu" if cpu else "cuda", options.memory or REFERENCE_GIB)


def choose_bundle(images: Mapping[str, Path], models: Path, budget: Budget) -> tuple[str, str]:
    """Bundle that suits the images and the device, and why in a sentence.

    A project that has a trained model keeps its bundle, so that new images never change what it learnt with. Without
    a readable image it is the bundle for 3D crops.
    """
    trained = [name for name in BUNDLE_OF.values() if (models / name / "current.json").is_file()]
    if trained:
        newest = max(trained, key=lambda name: (models / name / "current.json").stat().st_mtime_ns)
        return newest, "the project has a model trained with it"
    shapes: list[Triple] = []
    spacings: list[Spacing] = []
    for name in spread_over(sorted(images), HEADERS):
        try:
            shape, affine = image_geometry(images[name])
        except (ImageError, OSError):  # listed for the user by the datastore
            continue
        shapes.append(shape)
        spacings.append(Volume(np.empty(shape, np.uint8), affine, name).spacing)
    if not shapes:
        return BUNDLE_OF["3d_fullres"], "no image could be read yet; it suits most 3D scans"
    # Grey values play no part in the choice, so they are not read.
    pool = Fingerprint(tuple(shapes), tuple(spacings), "other", "not read", (), Grey(0, 0, 0, 1, 0, 0), None)
    configuration, why = choose_configuration(pool, budget)
    return BUNDLE_OF[configuration], why
