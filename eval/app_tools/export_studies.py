# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`python -m eval export --studies DIR --nnunet FOLDER`: the labels of a project as an nnU-Net dataset."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from eval.app_path import add_app
from eval.app_tools.project import open_annotations
from eval.errors import RefereeError
from eval.files import place, write_json
from eval.reporting.deidentify import pseudonyms

if TYPE_CHECKING:
    from lib.partial_labels import LabelMap
    from lib.storage.volumes import Grid
    from lib.studies.submissions import SubmissionStore

_ENDING = ".nii.gz"


def export_studies(studies: Path, out: Path, deidentify: bool = False) -> dict[str, Any]:
    """Write every annotated image of a project and its label as an nnU-Net dataset; return its dataset.json.

    Unlabelled voxels have nnU-Net's `ignore` label, the largest class id plus one. It is left out if every label is
    complete. The dataset appears when it is complete. A server may be at work on the folder meanwhile.

    Args:
        studies: the studies folder, or the state folder of a project on a DICOMweb server.
        out: a new or empty folder.
        deidentify: case_001, ... for images, and headers that hold the grid and no more.

    Raises:
        RefereeError: a folder in use, no project, no annotated image, or a file that cannot be used.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RefereeError(f"{out} is not an empty folder; name a new one")
    with open_annotations(studies) as annotations, _refused(studies):
        images = _annotated(studies, annotations)
        if not images:
            raise RefereeError(
                f"{studies}: no image has a label, so there is nothing to export; annotate a region first"
            )
        names = pseudonyms(images) if deidentify else {image: image for image in images}
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            made = Path(folder) / out.name
            card = _write(studies, annotations, images, names, made, plain=deidentify)
            if out.exists():
                out.rmdir()
            made.rename(out)
    return card


@contextmanager
def _refused(studies: Path) -> Iterator[None]:
    add_app()
    from lib.errors import PatchwiseError

    try:
        yield
    except (PatchwiseError, sqlite3.DatabaseError) as error:
        raise RefereeError(f"{studies}: {error}") from error


def _annotated(studies: Path, annotations: SubmissionStore) -> dict[str, Path]:
    """Images with a label, by id."""
    from lib.studies.folder_listing import FolderListing

    listing = FolderListing(studies)
    labelled = {*annotations.ledger.answers.images(), *FolderListing(annotations.merged, labels=True).files()}
    found = {image: listing.path(image) for image in sorted(labelled)}
    return {image: path for image, path in found.items() if path is not None}


def _write(
    studies: Path,
    annotations: SubmissionStore,
    images: Mapping[str, Path],
    names: Mapping[str, str],
    out: Path,
    plain: bool,
) -> dict[str, Any]:
    from lib.partial_labels import UNLABELLED
    from lib.storage.volumes import image_grid

    classes = annotations.classes
    ignore, partly, written = max(classes.values()) + 1, False, 0
    for folder in ("imagesTr", "labelsTr"):
        (out / folder).mkdir(parents=True)
    for image, path in images.items():
        grid = image_grid(path, image)
        label_xyz = _label(annotations, image, grid)
        open_xyz = label_xyz == UNLABELLED
        if open_xyz.all():
            continue
        partly = partly or bool(open_xyz.any())
        written += 1
        _save(out / "labelsTr" / f"{names[image]}{_ENDING}", np.where(open_xyz, np.uint8(ignore), label_xyz), grid)
        _save_image(path, out / "imagesTr" / f"{names[image]}_0000{_ENDING}", grid, plain)
    if not written:
        raise RefereeError(f"{studies}: no voxel of any label is annotated, so there is nothing to export")
    card = {
        "channel_names": _channels(studies / "dataset.json"),
        "labels": {"background": 0, **classes, **({"ignore": ignore} if partly else {})},
        "numTraining": written,
        "file_ending": _ENDING,
    }
    write_json(out / "dataset.json", card)
    return card


def _label(annotations: SubmissionStore, image: str, grid: Grid) -> LabelMap:
    """The label of all answers, which a killed server may not have written yet; else the file of the folder."""
    from lib.storage.class_labels import load_classes
    from lib.studies.folder_listing import FolderListing

    if annotations.ledger.answers.last(image):
        return annotations.rebuilt(image, grid.shape)
    path = FolderListing(annotations.merged, labels=True).path(image)
    if path is None:
        raise RefereeError(f"{annotations.merged}: the label of {image} is gone; run the command again")
    return load_classes(path, annotations.classes, grid, annotations.ignored)


def _save_image(source: Path, target: Path, grid: Grid, plain: bool) -> None:
    """Link or copy an image that nnU-Net reads as it is; else write its voxels anew."""
    from lib.storage.volumes import load_image

    if not plain and source.name.endswith(_ENDING) and nib.load(source).ndim == 3:  # type: ignore[attr-defined]
        place(source, target)
        return
    voxels_xyz: NDArray[Any] = load_image(source).array_xyz
    whole_xyz = np.rint(voxels_xyz)
    limits = np.iinfo(np.int16)
    if limits.min <= whole_xyz.min() and whole_xyz.max() <= limits.max and np.array_equal(whole_xyz, voxels_xyz):
        voxels_xyz = whole_xyz.astype(np.int16)
    _save(target, voxels_xyz, grid)


def _save(target: Path, array_xyz: NDArray[Any], grid: Grid) -> None:
    image = nib.Nifti1Image(array_xyz, grid.affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, target)


def _channels(card: Path) -> dict[str, str]:
    """Channel names of the project's dataset.json; nnU-Net normalises by them, e.g. `CT`."""
    try:
        content = json.loads(card.read_text())
        named = content.get("channel_names") or content.get("modality") or {}
        found = {str(number): str(name) for number, name in dict(named).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        found = {}
    return {"0": found.get("0", "image")}
