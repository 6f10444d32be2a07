# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Bad images among good ones: the good ones are asked about, scored and learned from, and the bad ones are named."""

from __future__ import annotations

import shutil

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from eval.app_tools.doctor_studies import studies_findings
from tests.system.files.conftest import AFFINE, BUNDLE, save, scan, seg_nrrd, truth

GOOD = ["good0", "good1", "good2"]


def with_nan(value):
    values = scan(9).astype(np.float32)
    values[:2] = value
    return values


def rgb(path):
    voxels = np.zeros((6, 5, 4), np.dtype([(c, "u1") for c in "RGB"]))
    nib.save(nib.Nifti1Image(voxels, AFFINE), path)


def truncated(path):
    save(path, scan(8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def sheared(path):
    shear = np.eye(4)
    shear[0, 1] = 0.3
    image = nib.Nifti1Image(scan(8), shear @ AFFINE)
    nib.save(image, path)


BAD = {
    "channels.nii.gz": lambda path: save(path, np.stack([scan(4)] * 4, -1)),
    "colours.nii.gz": rgb,
    "flat.nii.gz": lambda path: save(path, scan(4)[..., 0]),
    "nan.nii.gz": lambda path: save(path, with_nan(np.nan)),
    "inf.nii.gz": lambda path: save(path, with_nan(np.inf)),
    "empty.nii.gz": lambda path: path.touch(),
    "half.nii.gz": truncated,
    "half.nii": truncated,
    "noise.nrrd": lambda path: path.write_bytes(b"NRRD0004\n" + b"x" * 500),
    "vectors.nrrd": lambda path: nrrd.write(
        str(path), np.stack([scan(3)] * 2), {"kinds": ["vector", *["domain"] * 3], "space dimension": 3,
        "space directions": np.vstack([[np.nan] * 3, np.eye(3)])}
    ),
    "sheared.nii.gz": sheared,
    "two.nii.gz": lambda path: nib.save(nib.Nifti2Image(scan(3), AFFINE), path),
    "header.mha": lambda path: path.write_bytes(b"ObjectType = Image\nNDims = 3\nElementDataFile = x.raw\n"),
}  # fmt: skip
UNUSED = {
    "UPPER.NII.GZ": lambda path: shutil.move(save(path.with_name("u.nii.gz"), scan()), path),
    "good0.nrrd": lambda path: nrrd.write(str(path), scan(7), {"spacings": [1, 1, 1]}),
    "good1.seg.nrrd": lambda path: seg_nrrd(path, truth(scan(1)), [("a", 1, 0), ("b", 2, 0)]),
    "pair.img": lambda path: nib.save(nib.Nifti1Pair(scan(), AFFINE), path),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, serve):
    folder = tmp_path_factory.mktemp("pool") / "studies"
    for number, name in enumerate(GOOD):
        save(folder / f"{name}.nii.gz", scan(number))
        save(folder / "labels" / "final" / f"{name}.nii.gz", truth(scan(number)))
    for name, write in (BAD | UNUSED).items():
        write(folder / name)
    # An annotated image that went bad later.
    save(folder / "labels" / "final" / "nan.nii.gz", truth(scan(9)))
    return serve(folder)


def test_the_good_images_go_on(world):
    assert world.train().status_code == 200
    scored = world.score()
    assert scored.status_code == 200, scored.text
    assert scored.json()["images"] == len(GOOD)
    for method in ("random", "predictive_entropy", "power_pe", "typiclust", "bald"):
        asked = world.ask(method, batch=3, n_per_image=1, size=[6, 6, 6], request_id=method)
        assert asked.status_code == 200, asked.text
        assert {region["image"] for region in asked.json()["regions"]} <= set(GOOD)
        assert len(asked.json()["regions"]) == 3


def test_each_bad_image_is_named_everywhere(world):
    world.score()
    named = world.info()["left_out"]
    assert sorted(named) == sorted([*BAD, *UNUSED, "pair.hdr"])
    assert all(sentence.startswith(f"{name}: ") for name, sentence in named.items())
    assert world.http.get("/patchwise/progress").json()["left_out"] == named
    log = world.log.read_text()
    for name in named:
        assert log.count(f"left out: {name}: ") == 1, name
    found = " ".join(finding.found for finding in studies_findings(world.studies))
    assert all(f"{name}: " in found for name in named)


def test_a_request_that_names_a_bad_image_gets_its_sentence(world):
    region = {"image": "nan", "start": [0, 0, 0], "size": [4, 4, 4]}
    reply = world.ask("precomputed", batch=1, regions=[region])
    assert reply.status_code == 400
    assert "nan.nii.gz: 640 voxels are NaN or infinite" in reply.json()["detail"]


def test_a_repaired_image_comes_back(world):
    save(world.studies / "channels.nii.gz", scan(4))
    try:
        assert "channels.nii.gz" not in world.info()["left_out"]
        asked = world.ask("random", batch=30, n_per_image=1, size=[6, 6, 6], client_id="bob").json()
        assert "channels" in {region["image"] for region in asked["regions"]}
    finally:
        BAD["channels.nii.gz"](world.studies / "channels.nii.gz")


def test_a_server_of_bad_images_alone_says_so(tmp_path, serve):
    save(tmp_path / "studies" / "nan.nii.gz", with_nan(np.nan))
    client = serve(tmp_path / "studies")
    reply = client.ask("random", batch=1, size=[6, 6, 6])
    assert reply.status_code == 409
    assert "nan.nii.gz: 640 voxels are NaN or infinite" in reply.json()["detail"]


@pytest.mark.parametrize("shape", [(8, 8, 8), (1, 1, 1), (3, 40, 2), (64, 64, 1)])
def test_small_images_are_padded(small, tmp_path, shape):
    name = "x".join(map(str, shape))
    affine = np.diag([-1.0, -1, 1, 1])
    save(small.studies / f"{name}.nii.gz", scan(5, shape), affine)
    found = small.infer(BUNDLE, name, tmp_path)
    assert found.GetSize() == shape
    assert set(np.unique(sitk.GetArrayFromImage(found))) <= {0, 1, 2}
    assert small.score().json()["left_out"] == {}
    asked = small.ask("predictive_entropy", batch=9, n_per_image=1, size=[6, 6, 6], request_id=name)
    assert asked.status_code == 200, asked.text


@pytest.fixture(scope="module")
def small(tmp_path_factory, serve):
    """A server whose network was trained on images of 64 x 64 x 48 voxels."""
    folder, affine = tmp_path_factory.mktemp("small") / "studies", np.diag([-1.0, -1, 1, 1])
    for number in range(2):
        values = scan(number, (64, 64, 48))
        save(folder / f"s{number}.nii.gz", values, affine)
        save(folder / "labels" / "final" / f"s{number}.nii.gz", truth(values), affine)
    client = serve(folder)
    assert client.train().status_code == 200
    return client
