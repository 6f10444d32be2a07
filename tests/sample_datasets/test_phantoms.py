# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Phantoms: seeded, valid as a dataset, and neither empty nor trivial."""

import hashlib

import nibabel as nib
import numpy as np
import pytest

from eval.protocol.dataset import content_digest, load_scan, read_dataset


def test_same_seed_same_bytes_and_a_longer_set_starts_alike(phantoms, tmp_path):
    preset = phantoms.PRESETS["hippocampus"]
    phantoms.make_dataset(tmp_path / "a", preset, cases=3, seed=7)
    phantoms.make_dataset(tmp_path / "b", preset, cases=2, seed=7)
    phantoms.make_dataset(tmp_path / "c", preset, cases=1, seed=8)
    for kind in ("imagesTr", "labelsTr"):
        for name in ("hippocampus_001", "hippocampus_002"):
            first = (tmp_path / "a" / kind / f"{name}.nii.gz").read_bytes()
            assert first == (tmp_path / "b" / kind / f"{name}.nii.gz").read_bytes()
    image = "imagesTr/hippocampus_001.nii.gz"
    assert content_digest(tmp_path / "a" / image) != content_digest(tmp_path / "c" / image)


@pytest.mark.parametrize("name", ["hippocampus", "thick_slices"])
def test_cases_hold_both_structures_side_by_side(phantoms, name):
    preset = phantoms.PRESETS[name]
    image, label, spacing = phantoms.make_case(np.random.default_rng(3), preset)
    assert image.shape == label.shape
    assert image.dtype == np.float32
    assert spacing == preset.spacing
    assert set(np.unique(label)) == {0, 1, 2}
    assert 0.01 < (label > 0).mean() < 0.12
    touching = (label[:, :-1] == 2) & (label[:, 1:] == 1)  # the anterior part lies at higher y
    assert touching.any()
    assert not ((label[:, :-1] == 1) & (label[:, 1:] == 2)).any()
    # No threshold solves it: the structures are brighter than the rest only on average.
    inside, outside = image[label > 0], image[label == 0]
    assert np.median(inside) > np.median(outside)
    assert np.quantile(outside, 0.99) > np.quantile(inside, 0.10)


def test_dataset_is_read_by_the_referee(phantoms, tmp_path):
    assert phantoms.main([str(tmp_path / "d"), "--cases", "2", "--seed", "5"]) == 0
    dataset = read_dataset(tmp_path / "d")
    assert dataset.labels == {"background": 0, "anterior": 1, "posterior": 2}
    scan = load_scan(dataset.cases[0], dataset.labels)
    assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")
    assert scan.spacing == (1.0, 1.0, 1.0)


def test_folder_in_use_is_refused(phantoms, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    assert phantoms.main([str(tmp_path), "--cases", "1"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.txt"]


@pytest.mark.parametrize(
    ("name", "image", "label"),
    [
        ("hippocampus", "48bbf01d1f077ed7", "f96d761652499fa3"),
        ("thick_slices", "647edcf476951f2c", "6b67144e6b70dd37"),
    ],
)
def test_bytes_of_the_tube_presets_stay_what_studies_were_run_on(phantoms, tmp_path, name, image, label):
    """SHA-256 of the first files of seed 7, as first released; compression may differ with another zlib."""
    assert phantoms.main([str(tmp_path / "d"), "--preset", name, "--cases", "1", "--seed", "7"]) == 0
    for kind, start in (("imagesTr", image), ("labelsTr", label)):
        digest = hashlib.sha256((tmp_path / "d" / kind / f"{name}_001.nii.gz").read_bytes()).hexdigest()
        assert digest.startswith(start)


def test_difficulty_turns_the_tubes_too(phantoms):
    preset, knobs = phantoms.PRESETS["hippocampus"], phantoms.Knobs
    easy, hard = (phantoms.tuned(preset, knobs(difficulty=d)) for d in (0.0, 1.0))
    assert easy.contrast == pytest.approx((0.54, 0.33))
    assert hard.noise == pytest.approx(0.06)
    assert (easy.lookalikes, hard.lookalikes) == (0, 4)
    fine = phantoms.make_phantom(preset, 1, 0, knobs(spacing=(0.8, 0.8, 0.8)))
    assert nib.affines.voxel_sizes(fine.affine) == pytest.approx(0.8)
    assert abs(fine.image_xyz.shape[0] - 36 / 0.8) <= 2.1
