# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The readers of volumes and segmentations on damaged files: each returns, or raises an error with a clear message."""

from __future__ import annotations

import base64
import gzip
import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import psutil
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from eval.fuzzing.tally import Tally, drive, resident_mib, where
from lib.dicom.segmentations import read_segmentation, referenced_series, write_segmentation
from lib.dicom.series import series_grid
from lib.errors import PatchwiseError
from lib.regions import Region
from lib.storage.volumes import Grid, check_image, check_label_file, image_geometry, load_image, load_label

SHAPE = (5, 4, 3)
CLASSES = {"anterior": 1, "posterior": 2}
_GRID = Grid(SHAPE, np.eye(4), "case")
READERS: dict[str, Callable[[Path], object]] = {
    "load_image": load_image,
    "load_label": load_label,
    "load_label of an image": lambda path: load_label(path, like=_GRID),
    "check_image": lambda path: check_image(path, uploaded=True),
    "check_label_file": lambda path: check_label_file(path, _GRID),
    "image_geometry": image_geometry,
}
# Fields of headers, so that most damage is where it is read, not in the voxels.
_HEADER_BYTES = 400

Edit = tuple[str, float, bytes]
_NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**15 - 1, -(2**15), 2**31 - 1, -(2**31)]).map(
        lambda n: n.to_bytes(4, "little", signed=True)
    ),
    st.sampled_from([np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-40, 0.0]).map(lambda x: np.float32(x).tobytes()),
    st.integers(-(2**15), 2**15 - 1).map(lambda n: n.to_bytes(2, "little", signed=True)),
    st.binary(min_size=1, max_size=16),
)
EDITS: st.SearchStrategy[list[Edit]] = st.lists(
    st.tuples(st.sampled_from(["set", "set", "set", "insert", "cut", "drop"]), st.floats(0, 1), _NUMBERS), max_size=4
)


def volumes() -> dict[str, bytes]:
    """Small valid files of every kind that is read."""
    values_xyz = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    label_xyz = (values_xyz % 3).astype(np.uint8)
    scaled = nib.Nifti1Image(values_xyz.astype(np.float32), np.eye(4))
    scaled.header.set_slope_inter(2.0, 1.0)
    found = {
        "scan.nii": nib.Nifti1Image(values_xyz, np.eye(4)).to_bytes(),
        "label.nii.gz": nib.Nifti1Image(label_xyz, np.eye(4)).to_bytes(),
        "scaled.nii.gz": scaled.to_bytes(),
        "second.nii.gz": nib.Nifti2Image(values_xyz, np.eye(4)).to_bytes(),
        "swapped.nii": nib.Nifti1Image(
            values_xyz.astype(">i2"), np.eye(4), nib.Nifti1Header(endianness=">")
        ).to_bytes(),
    }
    fields = {"space": "left-posterior-superior", "space directions": np.eye(3), "space origin": [0, 0, 0]}
    with tempfile.TemporaryDirectory() as folder:
        for encoding in ("raw", "gzip", "bzip2"):
            path = Path(folder) / f"{encoding}.nrrd"
            nrrd.write(str(path), label_xyz, {**fields, "encoding": encoding})
            found[path.name] = path.read_bytes()
    return found


def damaged(content: bytes, edits: list[Edit], packed_after: bool) -> bytes:
    """`content` with every edit made; where it is to be packed afterwards the header is meant, else any byte."""
    made = bytearray(content)
    for kind, place, value in edits:
        span = min(len(made), _HEADER_BYTES) if packed_after else len(made)
        at = int(place * max(0, span - 1))
        if kind == "cut":
            del made[int(place * len(made)) :]
        elif kind == "drop":
            del made[at : at + len(value)]
        else:
            made[at : at + (len(value) if kind == "set" else 0)] = value
    return bytes(made)


def fuzz_volumes(wanted: int, number: int) -> Tally:
    """Damaged NIfTI and NRRD files through every reader."""
    tally, valid = Tally("NIfTI and NRRD readers"), volumes()
    cases = st.tuples(st.sampled_from(sorted(valid)), st.sampled_from(sorted(READERS)), EDITS, st.integers(0, 3))
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in valid.items():  # imports at first use are not caused by the file
            path = Path(folder) / name
            path.write_bytes(pack(name, content, content, [], whole=True))
            load_image(path)

        def one(case: tuple[str, str, list[Edit], int]) -> None:
            name, reader, edits, kind = case
            # Three of four are packed after the damage, so that it is not the packing that is refused.
            content = damaged(valid[name], edits, packed_after=kind > 0)
            content = pack(name, content, valid[name], edits, whole=kind > 0)
            path = Path(folder) / name
            path.write_bytes(content)
            before = resident_mib(process)
            _read(tally, lambda: READERS[reader](path), {"file": name, "reader": reader, **shown(content)})
            tally.grown_mib.append(resident_mib(process) - before)

        drive(tally, cases, wanted, number, one)
    tally.check_memory()
    return tally


def pack(name: str, content: bytes, valid: bytes, edits: list[Edit], whole: bool) -> bytes:
    """Bytes of the file: compressed if its name ends with .gz, damaged before or after."""
    if not name.endswith(".gz"):
        return content
    if whole:
        return gzip.compress(content, 1)
    return damaged(gzip.compress(valid, 1), edits, packed_after=False)


def shown(content: bytes) -> dict[str, str]:
    """A file as text that gives it back."""
    return {"base64": base64.b64encode(content[:4000]).decode()}


def fuzz_segmentations(wanted: int, number: int) -> Tally:
    """Damaged DICOM segmentations through their reader."""
    headers = series()
    label_xyz = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 3).astype(np.uint8)
    stream = io.BytesIO()
    write_segmentation(label_xyz, CLASSES, headers, 1).save_as(stream)
    affine, uid = series_grid(headers).affine, str(headers[0].SeriesInstanceUID)
    tally, process = Tally("DICOM SEG reader"), psutil.Process()
    edit = st.tuples(
        st.lists(st.integers(0, 60), min_size=1, max_size=6),
        st.one_of(
            st.none(),
            st.integers(-(2**31), 2**31 - 1),
            st.sampled_from([0, 1, 2, 8, 16, 512, 65535, "", "1.2.3", "FRACTIONAL", "1e400", "nan", [], [1, 2], b""]),
            st.text(max_size=20),
            st.binary(max_size=64),
            st.lists(st.floats(), max_size=7),
        ),
    )
    cases = st.lists(edit, max_size=4)

    def one(case: list[tuple[list[int], Any]]) -> None:
        item = dcmread(io.BytesIO(stream.getvalue()))
        told = [_change(item, path, value) for path, value in case]
        before = resident_mib(process)
        example = {"changes": told}
        _read(tally, lambda: (referenced_series(item), _read_seg(item, uid, affine)), example)
        tally.grown_mib.append(resident_mib(process) - before)

    drive(tally, cases, wanted, number, one)
    tally.check_memory()
    return tally


def _read_seg(item: Dataset, uid: str, affine: Any) -> object:
    return read_segmentation(item, uid, SHAPE, affine, CLASSES, [Region("case", (0, 0, 0), (2, 2, 2))])


def _read(tally: Tally, read: Callable[[], object], example: Mapping[str, Any]) -> None:
    try:
        read()
    except PatchwiseError as error:
        if "\n" in str(error) or not str(error):
            tally.fail("not one sentence", dict(example), str(error)[:200])
        else:
            tally.outcomes["refused in a sentence"] += 1
    except Exception as error:
        tally.fail("another exception", dict(example), where(error))
    else:
        tally.outcomes["read"] += 1


def _change(item: Dataset, path: list[int], value: Any) -> str:
    """Follow `path` through the elements of nested items and change the value of the last one, or remove it."""
    place = ""
    for step in path:
        elements = list(item)
        if not elements:
            return place
        element = elements[step % len(elements)]
        place += f"/{element.keyword or element.tag}"
        if element.VR == "SQ" and len(element.value) and step != path[-1]:
            item = element.value[step % len(element.value)]
            continue
        if value is None:
            del item[element.tag]
        else:
            try:
                element.value = value
            except Exception:
                # pydicom itself refuses some values of some types; no file can hold those.
                return f"{place}: refused {value!r:.60}"
        return f"{place} = {value!r:.60}"
    return place


def series() -> list[Dataset]:
    """Headers of an MR series of the shape of the volumes."""
    found = []
    study, uid = generate_uid(), generate_uid()
    for k in range(SHAPE[2]):
        item = Dataset()
        item.file_meta = FileMetaDataset()
        item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        item.is_little_endian, item.is_implicit_VR = True, False
        item.SOPClassUID, item.SOPInstanceUID = MRImageStorage, generate_uid()
        item.StudyInstanceUID, item.SeriesInstanceUID, item.FrameOfReferenceUID = study, uid, UID("1.2.3")
        item.Modality, item.PatientID, item.PatientName, item.SeriesNumber = "MR", "case", "Case^One", 1
        item.Rows, item.Columns, item.InstanceNumber = SHAPE[1], SHAPE[0], k + 1
        item.PixelSpacing, item.SliceThickness = [1.0, 1.0], 1.0
        item.ImageOrientationPatient, item.ImagePositionPatient = [1.0, 0, 0, 0, 1.0, 0], [0.0, 0.0, float(k)]
        item.BitsAllocated = item.BitsStored = 16
        item.HighBit, item.PixelRepresentation, item.SamplesPerPixel = 15, 0, 1
        item.PhotometricInterpretation = "MONOCHROME2"
        found.append(item)
    return found
