# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Decompression bombs, and archives and names that write elsewhere."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.system.conftest import BUNDLE, Client
from tests.system.hostile.helpers import (
    MIB,
    RAW,
    Watched,
    form,
    header,
    image,
    raw_form,
    sentence_of,
    surroundings,
    zeros,
)

NRRD = b"NRRD0004\ntype: unsigned char\ndimension: 3\nsizes: 500 500 2000\nencoding: gzip\n"
BOMBS = [
    (
        "declared.nii.gz",
        lambda: gzip.compress(header((30000, 30000, 30000))),
        r"30000 x 30000 x 30000 voxels, at most 6",
    ),
    ("promised.nii.gz", lambda: gzip.compress(header((800, 800, 800)) + b"\0" * 999), r"declares 488.3 MiB of voxels"),
    (
        "unpacking.nii.gz",
        lambda: zeros(header((1024, 1024, 500)), 500 * MIB),
        r"unpack to 500 MiB are not a scan",
    ),
    ("flat.nii.gz", lambda: gzip.compress(header((32000, 16000))), r"its header says 32000 x 16000"),
    ("far.nii.gz", lambda: zeros(header((8, 8, 8), vox_offset=2**30), 64 * MIB), r"voxels at byte 1.07374e"),
    ("negative.nii.gz", lambda: gzip.compress(header((-5, 4, 4))), r"found shape \(-5, 4, 4\)"),
    ("axes.nii", lambda: header((4, 4, 4), dim=[77, 4, 4, 4, 4, 4, 4, 4]), r"77 axes|not readable as NIfTI"),
    ("nowhere.nii", lambda: header((4, 4, 4), srow_x=[np.nan] * 4) + bytes(64), r"no size or place; repair the affine"),
    ("complex.nii", lambda: header((4, 4, 4), np.complex64) + bytes(512), r"are not intensities"),
    ("empty.nii.gz", lambda: b"", r"not readable as NIfTI"),
    ("noise.nrrd", lambda: b"NRRD0004\n" + b"x" * 5 * MIB, r"not readable as NRRD"),
    ("elsewhere.nrrd", lambda: NRRD.replace(b"gzip", b"raw\ndata file: /etc/passwd") + b"\n", r"says 'data file'"),
    ("growing.nrrd", lambda: NRRD + b"\n" + zeros(b"", 520 * MIB), r"holds more voxels than"),
    ("lacking.nrrd", lambda: NRRD + b"\n" + gzip.compress(bytes(99)), r"declares 476.8 MiB"),
]


@pytest.mark.parametrize(("name", "make", "sentence"), BOMBS, ids=[name for name, _, _ in BOMBS])
def test_bombs_cost_nothing(client: Client, place: Path, phantoms: Path, name: str, make: Any, sentence: str):
    """As an image, as an image of a session, as one to infer on, and as a label: refused each time, memory stays."""
    content = make()
    assert len(content) < 6 * MIB
    before, process = surroundings(place), client.process  # type: ignore[attr-defined]
    at_rest, seen = process.memory_info().rss, []
    for method, path, field in (
        ("PUT", "/datastore/image?image=bomb", "file"),
        ("PUT", "/session/", "files"),
        ("POST", f"/infer/{BUNDLE}", "file"),
        ("PUT", f"/datastore/label?image={image(phantoms)}&tag=original", "label"),
        ("PUT", f"/datastore/label?image={image(phantoms)}", "label"),
    ):
        with Watched(process) as watched:
            reply = client.http.request(method, path, **form(content, name, field=field))
        seen.append(watched.most)
        assert reply.status_code == 400, f"{path}: {reply.text}"
        told = sentence_of(reply)
        assert re.search(sentence, told) or (field == "label" and "has shape" in told), f"{path}: {told}"
    assert (max(seen) - at_rest) / MIB < 300
    assert surroundings(place) == before


def test_file_names_and_archives_that_write_elsewhere(client: Client, place: Path):
    before = surroundings(place)
    scan = gzip.compress(header((4, 4, 4)) + bytes(64))
    for name in ("..", "a/..", "x" * 300 + ".nii.gz", "a\0.nii.gz", "/"):
        reply = client.http.put("/session/", content=raw_form("files", name, scan), headers=RAW)
        assert reply.status_code in (400, 422), name
        assert sentence_of(reply)
    archives = {"a.zip": io.BytesIO(), "b.tar": io.BytesIO(), "c.zip": io.BytesIO()}
    with zipfile.ZipFile(archives["a.zip"], "w") as packed:
        packed.writestr("../../outside.nii.gz", b"mine")
    with tarfile.open(fileobj=archives["b.tar"], mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../../outside.nii.gz"))
    with zipfile.ZipFile(archives["c.zip"], "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.nii", bytes(MIB))
        packed.filelist[0].file_size = 2_202_009_600
    told = []
    for name, content in archives.items():
        reply = client.http.put("/session/?uncompress=true", files={"files": (name, content.getvalue())})
        assert reply.status_code in (400, 413)
        told.append(sentence_of(reply))
    assert "holds a file called '../../outside.nii.gz'; name files inside of it only" in told[0]
    assert "is not a ZIP archive; send one .zip file" in told[1]
    assert "holds 1 files of 2,202,009,600 bytes, at most 10000 of 2,147,483,648 are unpacked" in told[2]
    assert surroundings(place) == before
