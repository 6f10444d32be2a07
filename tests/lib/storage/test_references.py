# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Files that keep their voxels in another file are refused in every spelling."""

from __future__ import annotations

import struct

import nibabel as nib
import numpy as np
import pytest

from lib.storage.volume_headers import ImageError, check_self_contained, check_volume_file

NRRD = b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n"


@pytest.mark.parametrize(
    "field",
    [
        b"data file: /etc/passwd",
        b"Data File: /etc/passwd",
        b"DATAFILE: x",
        b"dataFile : x",
        b"data  file: LIST",
        b"data\tfile: x",
        b"data file:=x",
        b" datafile: x",
        b"Line Skip: 1",
        b"BYTESKIP: -1",
        b"byte skip:-1",
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_nrrd_headers(tmp_path, field, end):
    for name in ("x.nrrd", "x.nhdr", "x.bin"):
        path = tmp_path / name
        path.write_bytes((NRRD + field + b"\n\n").replace(b"\n", end) + bytes(8))
        for check in (check_self_contained, *([check_volume_file] if name == "x.nrrd" else [])):
            with pytest.raises(ImageError, match="its header says"):
                check(path)


def test_comments_and_plain_files_pass(tmp_path):
    path = tmp_path / "x.nrrd"
    path.write_bytes(NRRD + b"# data file: none\nnote:=data file: x\n\n" + bytes(8))
    check_self_contained(path)
    assert check_volume_file(path) == 8
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), tmp_path / "x.nii.gz")
    nib.save(nib.Nifti2Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), tmp_path / "y.nii")
    for name in ("x.nii.gz", "y.nii"):
        check_self_contained(tmp_path / name)
        assert check_volume_file(tmp_path / name) == 8


@pytest.mark.parametrize(
    "text", ["ElementDataFile = ../x.raw", "elementdatafile=LIST", "  ElementDataFile = /etc/passwd"]
)
def test_meta_image_headers(tmp_path, text):
    path = tmp_path / "x.mha"
    path.write_text(f"ObjectType = Image\nNDims = 3\n{text}\n")
    with pytest.raises(ImageError, match="MetaImage"):
        check_self_contained(path)
    path.write_text("ObjectType = Image\nElementDataFile = LOCAL\nx")
    check_self_contained(path)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("magic", [b"ni1\0", b"\0\0\0\0"])
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.hdr"])
def test_halves_of_pairs(tmp_path, order, magic, name):
    header = nib.Nifti1Header(endianness=order)
    header.set_data_shape((2, 2, 2))
    raw = bytearray(header.binaryblock)
    raw[344:348] = magic
    assert struct.unpack(order + "i", raw[:4])[0] == 348
    with nib.openers.Opener(str(tmp_path / name), "wb") as stream:
        stream.write(bytes(raw) + bytes(12))
    with pytest.raises(ImageError, match="pair"):
        check_self_contained(tmp_path / name)
    if name != "x.hdr":
        with pytest.raises(ImageError, match="pair"):
            check_volume_file(tmp_path / name)
