# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Refusals name the file as it was sent, and voxels without annotation stay unlabelled."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml

from eval.__main__ import main
from lib.partial_labels import UNLABELLED
from tests.eval.protocol.test_dataset import nnunet, scaled
from tests.system.conftest import TINY_STUDY
from tests.system.files.conftest import INFO, save, scan, stored, truth

TRUTH = truth(scan())
IGNORED = TRUTH.copy()
IGNORED[:4] = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory, serve):
    folder = tmp_path_factory.mktemp("sentences") / "studies"
    for name in ("case", "other"):
        save(folder / f"{name}.nii.gz", scan(), np.eye(4))
    card = {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}
    (folder / "dataset.json").write_text(json.dumps(card))
    save(folder / "labels" / "final" / "other.nii.gz", IGNORED, np.eye(4))
    return serve(folder)


def test_refusals_name_the_sent_file(world, tmp_path):
    moved = np.eye(4)
    moved[0, 3] = 5
    sent = {
        "moved.nii.gz": lambda path: save(path, TRUTH, moved),
        "small.nii.gz": lambda path: save(path, TRUTH[1:], np.eye(4)),
        "halves.nii.gz": lambda path: save(path, TRUTH / np.float32(2), np.eye(4)),
        "no volume.nii.gz": lambda path: path.write_bytes(b"nothing"),
        "seven.of.nine.nii.gz": lambda path: save(path, TRUTH * np.uint8(7), np.eye(4)),
    }
    for name, write in sent.items():
        write(tmp_path / name)
        for tag in ("final", "original"):
            reply = world.http.put(
                "/datastore/label",
                params={"image": "case", "tag": tag},
                data={"params": json.dumps({"whole": True})},
                files={"label": (name, (tmp_path / name).read_bytes())},
            )
            if tag == "final" or reply.status_code != 200:
                assert reply.status_code == 400, (name, reply.text)
                assert reply.json()["detail"].startswith(f"{name}: "), reply.text
    reply = world.http.put("/datastore/", files={"file": ("my_scan.nii.gz", b"nothing")})
    assert reply.json()["detail"].startswith("my_scan.nii.gz: ")


def test_labels_by_slope_are_taken(world, tmp_path):
    scaled(tmp_path / "l.nii", TRUTH.astype(np.int16) * 100, 0.01)
    reply = world.submit("case", tmp_path / "l.nii", INFO, whole=True)
    assert reply.status_code == 200, reply.text
    np.testing.assert_array_equal(stored(world.studies, "case"), TRUTH)


@pytest.mark.parametrize("info", [None, [*INFO, {"name": "ignore", "idx": 3}]], ids=["values", "names"])
def test_ignored_voxels_are_unlabelled(world, tmp_path, info):
    reply = world.submit("case", save(tmp_path / "l.nii.gz", IGNORED, np.eye(4)), info, whole=True)
    assert reply.status_code == 200, reply.text
    expected = np.where(IGNORED == 3, TRUTH, IGNORED)
    np.testing.assert_array_equal(stored(world.studies, "case"), expected)
    reply = world.submit("other", tmp_path / "l.nii.gz", info, whole=True)
    assert reply.status_code == 200, reply.text
    np.testing.assert_array_equal(
        np.asarray(nib.load(world.studies / "labels" / "final" / "other.nii.gz").dataobj),
        np.where(IGNORED == 3, UNLABELLED, IGNORED),
    )


def test_a_training_takes_them_too_and_names_a_bad_label(world):
    assert world.train().status_code == 200
    bad = save(world.studies / "labels" / "final" / "third.nii.gz", TRUTH * np.uint8(7), np.eye(4))
    save(world.studies / "third.nii.gz", scan(), np.eye(4))
    reply = world.train(seed=1)
    assert reply.status_code == 400
    assert "third.nii.gz: label values [7, 14] are not known" in reply.text
    bad.unlink()


@pytest.mark.slow
def test_a_study_of_a_dataset_with_ignored_voxels_runs(tmp_path):
    data = nnunet(tmp_path / "data", ignore=3)
    for number in range(4, 8):
        for place, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
            shutil.copy(data / place / f"c{number - 4}{suffix}.nii.gz", data / place / f"c{number}{suffix}.nii.gz")
        image = nib.load(data / "imagesTr" / f"c{number}_0000.nii.gz")
        values = np.asarray(image.dataobj) + np.int16(number)
        nib.save(nib.Nifti1Image(values, np.eye(4)), data / "imagesTr" / f"c{number}_0000.nii.gz")
    study = {**TINY_STUDY, "data": str(data), "size": [6, 6, 6], "methods": ["random"]}
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({**study, "train": {"members": 1, "recipe": "quick", "steps": 2}})
    )
    assert main(["run", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    cases = pd.read_csv(tmp_path / "run" / "cases.csv")
    assert set(cases["class"]) == {"a", "b"}
