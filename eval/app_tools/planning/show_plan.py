# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The plan of a bundle for the images of a folder, printed by `python -m eval plan FOLDER`."""

from __future__ import annotations

from pathlib import Path

from eval.app_path import add_app
from eval.errors import RefereeError
from eval.protocol.dataset import read_dataset

BUNDLES = Path(__file__).resolve().parents[3] / "bundles"


def plan_text(folder: Path, bundle: str, device: str, memory: float | None, out: Path | None) -> str:
    """Fingerprint and plan as a table; with `out` the plan is written there as YAML.

    `folder` is decathlon-style (dataset.json, imagesTr, labelsTr) or a studies folder of the server; of label maps only
    foreground is looked at, and 255 is not annotated.

    Raises:
        RefereeError: no such folder or bundle, no GPU to measure, no image that can be read, unusable class names.
    """
    add_app()
    from lib.errors import PatchwiseError
    from lib.models.class_names import resolve_classes, unlabelled_values
    from lib.models.plan_files import write_plan
    from lib.models.recipe import Bundle
    from lib.planning.bundle_choice import AUTO, choose_bundle
    from lib.planning.fingerprint_reader import declared_modality, take_fingerprint
    from lib.planning.memory_budget import measure_budget
    from lib.planning.planner import make_plan, names_sides

    if not folder.is_dir():
        raise RefereeError(f"{folder}: no such folder; give a decathlon-style folder or a studies folder")
    if device == "cuda" and memory is None:
        import torch

        if not torch.cuda.is_available():
            raise RefereeError("this machine has no GPU to measure; give --memory GIB, or --device cpu")
    try:
        images, labels, unused = files_of(folder)
        budget, why = measure_budget(device, memory), ""
        if bundle == AUTO:
            bundle, why = choose_bundle(images, folder / ".patchwise" / "models", budget)
        recipe = Bundle(BUNDLES / bundle)
        pool = take_fingerprint(images, labels, declared_modality(folder), unlabelled_values(folder))
        names = resolve_classes(None, folder, {}) if (folder / "dataset.json").is_file() else {}
        outputs, sided = len(names) + 1, names_sides(names)
        plan = make_plan(pool, budget, recipe.configuration, outputs, sided=sided)
        if out:
            write_plan(plan, out)
    except PatchwiseError as error:
        raise RefereeError(str(error)) from error
    except OSError as error:
        raise RefereeError(f"{out}: the plan cannot be written there ({error.strerror})") from error
    chosen = [("bundle", f"{bundle}{why and f' ({why})'}")]
    rows = [*pool.rows(), *chosen, *(("left out", sentence) for sentence in unused)]
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), "", plan.table()])


def files_of(folder: Path) -> tuple[dict[str, Path], dict[str, Path], tuple[str, ...]]:
    """Images and labels by id, and sentences about files of a dataset that belong to no case."""
    from lib.storage.dataset_folder import paired_files
    from lib.studies.folder_listing import FolderListing
    from lib.studies.unused_files import unused_files

    if (folder / "imagesTr").is_dir():
        images, labels = paired_files(folder, missing_ok=True)
        return images, labels, read_dataset(folder).unused if labels and (folder / "dataset.json").is_file() else ()
    images = {i: folder / f"{i}{end}" for i, end in FolderListing(folder).files().items()}
    there = folder / "labels" / "final"
    labels = {i: there / f"{i}{end}" for i, end in FolderListing(there, labels=True).files().items()}
    return images, labels, tuple(unused_files(folder).values())
