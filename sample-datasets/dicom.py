# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""DICOM: a decathlon-style folder to one study per case (image series and segmentation), and back, exactly."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import SegmentationStorage

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:  # loaded by path from elsewhere: this folder's name is not a module name
    sys.path.append(HERE)

from dicom_parts.names import digest  # noqa: E402
from dicom_parts.segmentation import read_segmentation, write_segmentation  # noqa: E402
from dicom_parts.series import STORAGE, DicomError, read_series, write_series  # noqa: E402

__all__ = ["DicomError", "folder_to_dicom", "folder_to_nifti", "main", "to_dicom", "to_nifti"]

_AFFINE_MM = 1e-3


def to_dicom(
    image: Path, label: Path | None, classes: Mapping[str, int], modality: str, out: Path, dataset: str = ""
) -> list[Path]:
    """Write one case as `out`/image/NNNN.dcm and, with a label, `out`/seg.dcm; the same case gives the same bytes.

    UIDs derive from the name of the dataset, of the case, and from the voxels.

    Raises:
        DicomError: the case cannot be expressed in DICOM; nothing is written then.
    """
    case = _case_id(image)
    values_xyz, affine = _volume(image)
    key = f"{dataset}/{case}/{digest(np.ascontiguousarray(values_xyz).tobytes(), affine.tobytes())}"
    slices = write_series(values_xyz, affine, case, modality, key)
    files: dict[Path, Dataset] = {out / "image" / f"{k:04d}.dcm": data for k, data in enumerate(slices, start=1)}
    if label is not None:
        label_xyz, label_affine = _volume(label)
        if not np.allclose(affine, label_affine, atol=_AFFINE_MM):
            raise DicomError(f"{label} has another affine than its image {image.name}; resave it on that grid")
        if not np.isin(label_xyz, np.arange(256)).all():
            raise DicomError(f"{label} holds values that are not class ids (0 to 255); check that it is a label map")
        label_xyz = label_xyz.astype(np.uint8)
        key = f"{key}/{digest(np.ascontiguousarray(label_xyz).tobytes())}"
        files[out / "seg.dcm"] = write_segmentation(label_xyz, classes, slices, key)
    (out / "image").mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        pydicom.dcmwrite(path, data, write_like_original=False)
    return list(files)


def to_nifti(slices: Sequence[Dataset], segmentation: Dataset | None) -> tuple[Any, Any, dict[str, int]]:
    """NIfTI image of a series, NIfTI label map (None without a segmentation), and the classes it names."""
    values_xyz, grid, _ = read_series(slices)
    image = _nifti(values_xyz, grid.affine)
    if segmentation is None:
        return image, None, {}
    label_xyz, classes = read_segmentation(segmentation, grid)
    return image, _nifti(label_xyz, grid.affine), classes


def _nifti(values_xyz: np.ndarray, affine: np.ndarray) -> Any:
    """Image with sform and qform: where rounded positions shear the first a little, ITK takes the second."""
    image = nib.Nifti1Image(values_xyz, affine)
    image.set_qform(affine, code="scanner")
    return image


def folder_to_dicom(folder: Path, out: Path, modality: str | None = None) -> int:
    """Convert every image of imagesTr, with its label if labelsTr has one; return the number of cases.

    The modality is CT or MR if dataset.json contains it, else MR.

    Raises:
        DicomError: no dataset.json, no image, a case that cannot be converted.
    """
    card = _card(folder)
    given = next(iter(card.get("modality", {}).values()), "") if isinstance(card.get("modality"), dict) else ""
    kind = modality or ("CT" if str(given).upper() == "CT" else "MR")
    classes = _classes(card)
    images = sorted(p for p in (folder / "imagesTr").glob("*.nii*") if not p.name.startswith("._"))
    if not images:
        raise DicomError(f"{folder / 'imagesTr'} holds no NIfTI image; name a decathlon-style folder")
    _refuse_used(out)
    dataset = f"{card.get('name', folder.name)}/{card.get('description', '')}"
    for image in images:
        label = folder / "labelsTr" / image.name
        to_dicom(image, label if label.is_file() else None, classes, kind, out / _case_id(image), dataset)
    return len(images)


def folder_to_nifti(folder: Path, out: Path) -> int:
    """Convert every series below `folder` to a decathlon-style folder `out`; return the number of series.

    A segmentation goes with the series it references. Cases are named by patient; further series of one patient get
    a number.

    Raises:
        DicomError: no image series, segmentations with different names of one class id, a series that cannot be
            converted.
    """
    series, segmentations = _found(folder)
    if not series:
        raise DicomError(f"{folder} holds no CT or MR series; name the folder that the series lie below")
    _refuse_used(out)
    (out / "imagesTr").mkdir(parents=True)
    (out / "labelsTr").mkdir()
    classes: dict[str, int] = {"background": 0}
    names: set[str] = set()
    training, modality = [], "MR"
    for uid, slices in sorted(series.items(), key=lambda item: (str(item[1][0].get("PatientID", "")), item[0])):
        image, label, found = to_nifti(slices, segmentations.get(uid))
        name = _unused(
            "".join(c if c.isalnum() or c in "-_." else "_" for c in str(slices[0].get("PatientID", ""))), names
        )
        modality = str(slices[0].Modality)
        nib.save(image, out / "imagesTr" / f"{name}.nii.gz")
        if label is None:
            continue
        for class_name, value in found.items():
            if classes.setdefault(class_name, value) != value or list(classes.values()).count(value) > 1:
                raise DicomError(
                    f"case {name} calls class {value} {class_name}, other cases do not; convert them apart"
                )
        nib.save(label, out / "labelsTr" / f"{name}.nii.gz")
        training.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
    card = {
        "name": folder.name,
        "description": "converted from DICOM",
        "tensorImageSize": "3D",
        "modality": {"0": modality},
        "labels": {str(v): n for n, v in sorted(classes.items(), key=lambda item: item[1])},
        "numTraining": len(training),
        "numTest": 0,
        "training": training,
        "test": [],
    }
    (out / "dataset.json").write_text(json.dumps(card, indent=1) + "\n")
    return len(series)


def _found(folder: Path) -> tuple[dict[str, list[Dataset]], dict[str, Dataset]]:
    """Image slices by series, and segmentations by the series they reference."""
    series: dict[str, list[Dataset]] = defaultdict(list)
    segmentations: dict[str, Dataset] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            data = pydicom.dcmread(path)
        except InvalidDicomError:
            continue
        if data.get("SOPClassUID") in STORAGE.values():
            series[str(data.SeriesInstanceUID)].append(data)
        elif data.get("SOPClassUID") == SegmentationStorage:
            uid = str(data.ReferencedSeriesSequence[0].SeriesInstanceUID)
            if uid in segmentations:
                raise DicomError(f"{path} is a second segmentation of series {uid}; keep the one you mean")
            segmentations[uid] = data
    return series, segmentations


def _volume(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    try:
        volume: Any = nib.load(path)
        values_xyz = np.asarray(volume.dataobj)
    except Exception as error:  # nibabel, gzip and zlib each raise their own kinds
        raise DicomError(f"{path} cannot be read as NIfTI ({' '.join(str(error).split())}); replace it") from error
    if values_xyz.ndim == 4 and values_xyz.shape[3] == 1:
        values_xyz = values_xyz[..., 0]
    return values_xyz, np.asarray(volume.affine, np.float64)


def _card(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    try:
        card = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DicomError(f"{path} cannot be read ({error}); a decathlon-style folder has one") from error
    if not isinstance(card, dict):
        raise DicomError(f"{path} holds no object; a decathlon-style folder has one")
    return card


def _classes(card: dict[str, Any]) -> dict[str, int]:
    """Names to ids from the decathlon's {"1": "name"} or nnU-Net's {"name": 1}."""
    given = card.get("labels", {})
    if "background" in given:
        return {str(name): int(value) for name, value in given.items()}
    return {str(name): int(value) for value, name in given.items()}


def _refuse_used(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise DicomError(f"{out} is not empty; name a new folder or remove it")


def _unused(name: str, names: set[str]) -> str:
    name = name.strip("._") or "case"
    chosen = next(n for n in [name, *(f"{name}_{i}" for i in range(2, len(names) + 3))] if n not in names)
    names.add(chosen)
    return chosen


def _case_id(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def main(arguments: list[str] | None = None) -> int:
    """Command line: `dicom.py to-dicom FOLDER OUT` and `dicom.py to-nifti FOLDER OUT`."""
    parser = argparse.ArgumentParser(prog="dicom.py", description="NIfTI to DICOM series and segmentations, and back.")
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("to-dicom", help="decathlon-style folder to one study per case")
    back = commands.add_parser("to-nifti", help="DICOM files to a decathlon-style folder")
    for command in (there, back):
        command.add_argument("folder", type=Path)
        command.add_argument("out", type=Path, help="folder to make")
    there.add_argument("--modality", choices=sorted(STORAGE), help="default: the dataset's own, else MR")
    options = parser.parse_args(arguments)
    try:
        if options.command == "to-dicom":
            folder_to_dicom(options.folder, options.out, options.modality)
        else:
            folder_to_nifti(options.folder, options.out)
    except (DicomError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
