# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import yaml

from eval.__main__ import main
from tests.eval.protocol.test_dataset import nnunet


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "imagesTr").mkdir(parents=True)
    for i in range(3):
        image = nib.Nifti1Image(rng.normal(100, 9, (36, 50, 35)).astype(np.float32), np.eye(4))
        nib.save(image, tmp_path / "data" / "imagesTr" / f"c{i}.nii.gz")
    return tmp_path / "data"


def test_a_plan_is_printed_and_written(folder, tmp_path, capsys):
    out = tmp_path / "plan.yaml"
    assert main(["plan", str(folder), "--memory", "4", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "36 (36-36) x 50 (50-50) x 35 (35-35) voxels" in text
    assert "40 x 48 x 40" in text
    assert yaml.safe_load(out.read_text())["features"] == [24, 48, 96]


def test_class_names_decide_about_mirror_images(folder, tmp_path, capsys):
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(160, 150, 140)).astype(np.float32), np.eye(4))
    for path in (folder / "imagesTr").iterdir():
        nib.save(image, path)
    out = tmp_path / "plan.yaml"
    for names, mirror in (("kidney", [0, 1, 2]), ("left kidney", [])):
        (folder / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": names}}))
        assert (
            main(["plan", str(folder), "--bundle", "segmentation_dynunet_3d", "--memory", "4", "--out", str(out)]) == 0
        )
        assert yaml.safe_load(out.read_text())["mirror"] == mirror


def test_class_names_that_cannot_be_used_are_an_error(folder, capsys):
    (folder / "dataset.json").write_text("{")
    assert main(["plan", str(folder), "--memory", "4"]) == 2
    assert "dataset.json: not readable as a decathlon-style dataset.json" in capsys.readouterr().err


def test_a_gpu_of_another_machine_can_be_planned_for(folder, capsys):
    assert main(["plan", str(folder), "--device", "cuda", "--memory", "8", "--bundle", "segmentation_dynunet_2d"]) == 0
    assert "40 x 56 x 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "no such folder"),
        (["data", "--bundle", "nothing"], "no bundle nothing"),
        (["data/imagesTr/empty"], "no image of the pool can be read"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(folder, tmp_path, capsys, monkeypatch, arguments, message):
    (folder / "imagesTr" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_images_and_labels_of_nnunet_are_paired(tmp_path, capsys):
    """By the rows of the plan: foreground is annotated, so the percentiles are those of the structures."""
    folder = nnunet(tmp_path / "d", ignore=3)
    assert main(["plan", str(folder), "--memory", "4"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    paired = rows["annotated foreground"]
    assert "none" not in paired
    for path in list((folder / "imagesTr").iterdir()):
        path.rename(path.with_name(path.name.replace("_0000", "")))
    assert main(["plan", str(folder), "--memory", "4"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert rows["annotated foreground"] == paired


def test_a_label_that_cannot_be_used_is_named(tmp_path, capsys):
    folder = nnunet(tmp_path / "d")
    values = np.full((24, 20, 16), 0.5, np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), folder / "labelsTr" / "c1.nii.gz")
    assert main(["plan", str(folder), "--memory", "4"]) == 2
    assert "c1.nii.gz: label values must be whole numbers from 0 to 255, found 0.5" in capsys.readouterr().err
