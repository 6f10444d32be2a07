# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
import json

import nibabel as nib
import numpy as np
import pytest

from eval.__main__ import main
from eval.app_tools.planning.configurations import Score, deal, recommended
from eval.errors import RefereeError


def score(name, dice, seconds):
    return Score(name, dice, {}, seconds, 1)


def test_the_fastest_of_those_within_a_hundredth_is_recommended():
    assert recommended([score("a", 0.80, 9), score("b", 0.795, 5), score("c", 0.78, 1)]).bundle == "b"
    assert recommended([score("a", 0.80, 9), score("b", 0.789, 5)]).bundle == "a"


def test_images_of_a_subject_stay_in_one_fold():
    ids = [f"patient{n:03}_frame{k}" for n in range(7) for k in (1, 9)]
    folds = deal(ids, 3, r"(patient\d+)_", 0)
    assert sorted(n for fold in folds for n in fold) == ids
    assert sorted(map(len, folds)) == [4, 4, 6]
    people = [{name[:10] for name in fold} for fold in folds]
    assert not people[0] & people[1]
    assert not people[0] & people[2]
    assert not people[1] & people[2]
    assert deal(ids, 3, r"(patient\d+)_", 0) == folds
    assert deal(ids, 3, r"(patient\d+)_", 1) != folds


@pytest.mark.parametrize(
    ("ids", "folds", "subject", "sentence"),
    [
        (["a"], 2, None, "1 annotated subjects for 2 folds; annotate more images"),
        (["a_1", "a_2"], 2, "(.)_", "1 annotated subjects for 2 folds"),
        (["a", "b"], 1, None, "use --folds 2 or more"),
        (["a", "b"], 2, "(x)", "does not match the image id 'a'"),
        (["a", "b"], 2, "(", "must be a regular expression with a group"),
        (["a", "b"], 2, ".", "must be a regular expression with a group"),
    ],
)
def test_folds_that_cannot_be_made_are_refused(ids, folds, subject, sentence):
    with pytest.raises(RefereeError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        deal(ids, folds, subject, 0)


def test_every_configuration_is_compared_on_annotated_voxels(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for sub in ("imagesTr", "labelsTr"):
        (tmp_path / sub).mkdir()
    for i in range(2):
        label = np.zeros((24, 24, 20), np.uint8)
        label[6:18, 6:18, 5:15] = 1
        image = label * 50 + rng.normal(0, 1, label.shape)
        label[:4] = 255
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), tmp_path / "imagesTr" / f"c{i}.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / "labelsTr" / f"c{i}.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "block"}}))
    assert main(["configurations", str(tmp_path), "--steps", "12", "--memory", "4"]) == 0
    out = capsys.readouterr()
    lines = out.out.splitlines()
    assert lines[0].split() == ["bundle", "Dice", "block", "steps", "seconds"]
    found = {line.split()[0]: float(line.split()[1]) for line in lines[1:3]}
    assert set(found) == {"segmentation_dynunet_2d", "segmentation_dynunet_3d"}
    assert max(found.values()) > 0.5
    assert "2 annotated images in 2 folds" in out.out
    assert "recommended: --conf models segmentation_dynunet_" in out.out
    assert out.err.splitlines() == ["training segmentation_dynunet_2d", "training segmentation_dynunet_3d"]


def test_a_folder_that_is_missing_is_said(capsys):
    assert main(["configurations", "nowhere"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
