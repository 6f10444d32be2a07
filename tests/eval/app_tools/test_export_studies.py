# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The labels of a project as an nnU-Net dataset: written, read back by ITK and by the referee, and refused ones."""

import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from eval.__main__ import main
from eval.protocol.dataset import load_truth, read_dataset
from tests.eval.answered import CLASSES, SHAPE, Studies, write


@pytest.fixture
def studies(tmp_path):
    return Studies(tmp_path / "studies")


def stored(path):
    return np.asarray(nib.load(path).dataobj)


def export(studies, out, *more):
    return main(["export", "--studies", str(studies.folder), "--nnunet", str(out), *more])


def test_partial_labels_come_out_with_the_ignore_label(studies, tmp_path):
    out = tmp_path / "nnUNet_raw" / "Dataset001_small"
    assert export(studies, out) == 0
    assert json.loads((out / "dataset.json").read_text()) == {
        "channel_names": {"0": "image"},
        "labels": {"background": 0, **CLASSES, "ignore": 3},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    newest = np.full(SHAPE, 3)
    newest[:3, :3, :3] = 0
    newest[:1, :3, :3] = 1
    np.testing.assert_array_equal(stored(out / "labelsTr" / "a.nii.gz"), newest)
    only_anterior = np.full(SHAPE, 3)
    only_anterior[:2, :3, :3] = 1
    np.testing.assert_array_equal(stored(out / "labelsTr" / "b.nii.gz"), only_anterior)
    for name in "ab":
        image = SimpleITK.ReadImage(out / "imagesTr" / f"{name}_0000.nii.gz")
        label = SimpleITK.ReadImage(out / "labelsTr" / f"{name}.nii.gz")
        assert image.GetSize() == label.GetSize() == SHAPE
        assert (image.GetSpacing(), image.GetOrigin(), image.GetDirection()) == (
            label.GetSpacing(),
            label.GetOrigin(),
            label.GetDirection(),
        )
    assert not list(out.parent.glob(".*"))


def test_the_referee_reads_the_dataset_back(studies, tmp_path):
    out = tmp_path / "dataset"
    assert export(studies, out) == 0
    dataset = read_dataset(out)
    assert dataset.labels == {"background": 0, **CLASSES} or dataset.labels == CLASSES
    truth = {case.id.removesuffix("_0000"): load_truth(case).label_xyz for case in dataset.cases}
    assert (truth["a"] == 255).sum() == np.prod(SHAPE) - 27
    assert (truth["a"] == 1).sum() == 9


def test_a_complete_label_needs_no_ignore_label(tmp_path):
    studies = Studies(tmp_path / "studies")
    full = np.zeros(SHAPE)
    full[0] = 2
    for name in "ab":
        studies.save(name, full, whole=True)
    (studies.folder / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}}))
    assert export(studies, tmp_path / "out") == 0
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert card["labels"] == {"background": 0, **CLASSES}
    assert card["channel_names"] == {"0": "CT"}
    np.testing.assert_array_equal(stored(tmp_path / "out" / "labelsTr" / "a.nii.gz"), full)


def test_labels_copied_in_by_hand_and_images_of_other_formats(studies, tmp_path):
    image = SimpleITK.GetImageFromArray(np.arange(60, dtype=np.float32).reshape(3, 4, 5) / 7)
    image.SetSpacing((1, 2, 3))
    SimpleITK.WriteImage(image, studies.folder / "c.nrrd")
    label = SimpleITK.GetImageFromArray(np.ones((3, 4, 5), np.uint8))
    label.CopyInformation(image)
    SimpleITK.WriteImage(label, studies.folder / "labels" / "final" / "c.nii.gz")
    assert export(studies, tmp_path / "out") == 0
    again = SimpleITK.ReadImage(tmp_path / "out" / "imagesTr" / "c_0000.nii.gz")
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(again), SimpleITK.GetArrayFromImage(image))
    assert again.GetSpacing() == (1, 2, 3)
    assert (stored(tmp_path / "out" / "labelsTr" / "c.nii.gz") == 1).all()


def test_names_and_headers_without_patients(studies, tmp_path):
    named = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4))
    named.header["descrip"] = b"Erika Muster"
    nib.save(named, studies.folder / "erika_muster.nii.gz")
    studies.save("erika_muster", np.ones(SHAPE), whole=True)
    out = tmp_path / "out"
    assert export(studies, out, "--deidentify") == 0
    files = sorted(path.name for path in out.rglob("*.nii.gz"))
    assert files == sorted(f"case_00{n}{end}" for n in (1, 2, 3) for end in (".nii.gz", "_0000.nii.gz"))
    headers = [nib.load(path).header["descrip"].tobytes().strip(b"\0") for path in out.rglob("*.nii.gz")]
    assert set(headers) == {b""}
    assert (stored(out / "labelsTr" / "case_003.nii.gz") == 1).all()


def test_refusals_leave_nothing_behind(studies, tmp_path, capsys):
    out = write(tmp_path / "used" / "x.nii.gz", np.zeros(SHAPE)).parent
    assert export(studies, out) == 2
    assert "is not an empty folder; name a new one" in capsys.readouterr().err
    assert main(["export", "--studies", str(tmp_path), "--nnunet", str(tmp_path / "new")]) == 2
    assert "name the studies folder that the server runs on" in capsys.readouterr().err
    studies.raw(studies.answers[0]).write_bytes(b"damaged")
    assert export(studies, tmp_path / "place" / "new") == 2
    assert "answer 1 is missing or changed; restore a backup" in capsys.readouterr().err
    assert list((tmp_path / "place").iterdir()) == []
    assert main(["export", "--studies", str(tmp_path), "--method", "random"]) == 2
    assert "found --method; leave it out" in capsys.readouterr().err
    assert main(["export"]) == 2
    assert "--studies DIR of a project" in capsys.readouterr().err
