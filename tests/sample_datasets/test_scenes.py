# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Scenes of a heart, kidneys and an abdomen: measured in the images, as a scanner's physicist would."""

import json
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation, binary_erosion, label

from eval.protocol.dataset import load_scan, read_dataset


def case(phantoms, name, index=0, **knobs):
    return phantoms.make_phantom(phantoms.PRESETS[name], 4, index, phantoms.Knobs(**knobs))


def inside(mask):
    """Voxels away from the soft edge, in plane."""
    return binary_erosion(mask, np.ones((3, 3, 1)))


@pytest.fixture(scope="module")
def abdomen(phantoms):
    return case(phantoms, "amos", pathology=0.0, variation=0.0)


def test_heart_is_nested_and_anisotropic(phantoms):
    phantom = case(phantoms, "acdc", pathology=0.0)
    x, y, z = nib.affines.voxel_sizes(phantom.affine)
    assert x == y == pytest.approx(1.5, rel=0.061)
    assert z == pytest.approx(9.0, rel=0.081)
    assert phantom.image_xyz.shape == (100, 100, 10)
    right, muscle, left = (phantom.label_xyz == k for k in (1, 2, 3))
    # In plane, the left cavity touches nothing but its muscle; the right ventricle touches the muscle only.
    rim = binary_dilation(left, np.ones((3, 3, 1))) & ~left
    assert np.array_equal(rim & muscle, rim)
    assert (binary_dilation(right, np.ones((3, 3, 1))) & muscle).any()
    assert not (binary_dilation(right, np.ones((3, 3, 1))) & left).any()
    assert label(muscle | left)[1] == 1
    # Below the cavity there is an apex of muscle alone, and the right ventricle lies on the patient's right.
    slices = np.flatnonzero(muscle.any(axis=(0, 1)))
    assert not left[:, :, slices[0]].any()
    assert np.argwhere(right)[:, 0].mean() > np.argwhere(left)[:, 0].mean() + 10
    image = phantom.image_xyz
    assert image[inside(left)].mean() > 1.6 * image[inside(muscle)].mean()


def test_thick_and_dilated_hearts_measure_as_such(phantoms):
    ratio = {}
    for index in range(24):
        phantom = case(phantoms, "acdc", index, pathology=1.0, spacing=(3.0, 3.0, 9.0))
        ratio.setdefault(phantom.findings[0], []).append(np.divide(*[(phantom.label_xyz == k).sum() for k in (2, 3)]))
    assert len(ratio) == 4
    assert np.median(ratio["thick myocardium"]) > 1.5 * np.median(ratio["dilated right ventricle"])
    assert np.median(ratio["dilated left ventricle"]) < 0.8 * np.median(ratio["dilated right ventricle"])


def test_kidneys_are_few_voxels_and_lesions_rarer(phantoms):
    share, with_tumour, with_cyst, sizes = [], 0, 0, []
    for index in range(12):
        phantom = case(phantoms, "kits", index, scale=0.45)
        counts = np.bincount(phantom.label_xyz.ravel(), minlength=4)
        share.append(counts[1:].sum() / counts.sum())
        with_tumour += counts[2] > 0
        with_cyst += counts[3] > 0
        assert ("tumour" in phantom.findings) == (counts[2] > 0)
        sizes += [counts[2] / counts[1]] if counts[2] else []
    assert 0.005 < np.mean(share) < 0.03
    assert 1 <= with_tumour < 9
    assert 1 <= with_cyst < 8
    assert np.median(sizes) < 0.25
    assert not (case(phantoms, "kits", 1, pathology=0.0).label_xyz > 1).any()


def test_hounsfield_units_of_tissues(phantoms, abdomen):
    image, labels = abdomen.image_xyz, abdomen.label_xyz
    assert image.dtype == np.int16
    assert np.median(image[:2]) == pytest.approx(-1000, abs=25)
    for name, hu in {"liver": 112, "spleen": 128, "aorta": 148, "bladder": 5, "pancreas": 92}.items():
        organ = inside(labels == phantoms.PRESETS["amos"].labels.index(name) + 1)
        assert image[organ].mean() == pytest.approx(hu, abs=0.15 * hu + 12), name
    assert (image > 250).sum() > 500  # bone
    assert np.quantile(image[20:70, 20:50], 0.2) < -60  # fat between the organs


def test_fifteen_organs_of_very_different_size_left_and_right(phantoms, abdomen):
    counts = np.bincount(abdomen.label_xyz.ravel(), minlength=16)
    assert counts[1:].min() > 40
    assert counts[6] == counts[1:].max()
    assert counts[6] > 100 * min(counts[11], counts[12])
    where = {k: np.argwhere(abdomen.label_xyz == k).mean(axis=0) for k in range(1, 16)}
    for right, left in ((2, 3), (11, 12), (6, 1), (9, 8)):
        assert where[right][0] > where[left][0] + 4
    assert where[6][2] > where[14][2] > where[15][2]  # liver above bladder above prostate


@pytest.mark.parametrize(("name", "of", "against"), [("acdc", 3, 2), ("amos", 6, 7), ("kits", 1, None)])
def test_difficulty_lowers_contrast_to_noise_and_leaves_the_patient(phantoms, name, of, against):
    measured, shapes = [], []
    for difficulty in (0.0, 0.25, 0.5, 1.0):
        spacing = (2.0, 2.0, 9.0) if name == "acdc" else (4.0, 4.0, 8.0)
        phantom = case(phantoms, name, difficulty=difficulty, pathology=0.0, spacing=spacing)
        shapes.append(phantom.label_xyz)
        image = phantom.image_xyz.astype(float)
        one = inside(phantom.label_xyz == of)
        # Muscle between skin and organs represents soft tissue if no second class is compared.
        other = (
            inside(phantom.label_xyz == against) if against else (image > 20) & (image < 90) & (phantom.label_xyz == 0)
        )
        noise = np.std(np.diff(image, axis=0)[one[1:] & one[:-1]])
        measured.append(abs(image[one].mean() - image[other].mean()) / noise)
    assert np.all(np.diff(measured) < 0), measured
    assert measured[0] > 2 * measured[-1]
    assert all(np.array_equal(shapes[0], other) for other in shapes[1:])


def test_grid_follows_spacing_shape_and_scale(phantoms):
    def grid(**knobs):
        phantom = case(phantoms, "acdc", variation=0.0, **knobs)
        return phantom.image_xyz.shape, [round(float(s), 3) for s in nib.affines.voxel_sizes(phantom.affine)]

    assert grid() == ((100, 100, 10), [1.5, 1.5, 9.0])
    assert grid(spacing=(3.0, 3.0, 10.0)) == ((50, 50, 9), [3.0, 3.0, 10.0])
    assert grid(shape=(50, 60, 9)) == ((50, 60, 9), [3.0, 2.5, 10.0])
    assert grid(shape=(40, 40, 6), spacing=(1.5, 1.5, 9.0)) == ((40, 40, 6), [1.5, 1.5, 9.0])
    assert grid(scale=0.5) == ((50, 50, 5), [3.0, 3.0, 18.0])


def test_slabs_do_not_show(phantoms, monkeypatch):
    whole = case(phantoms, "kits", spacing=(5.0, 5.0, 10.0))
    monkeypatch.setattr(sys.modules["phantom.scene"], "SLAB_VOXELS", 7_000)
    cut = case(phantoms, "kits", spacing=(5.0, 5.0, 10.0))
    assert np.array_equal(whole.label_xyz, cut.label_xyz)
    # Summing in another order may move a value over a rounding edge.
    assert np.abs(whole.image_xyz.astype(int) - cut.image_xyz).max() <= 1


def test_other_orientations_store_the_same_patient(phantoms):
    plain = case(phantoms, "acdc")
    flipped = case(phantoms, "acdc", orientation="LPS")
    assert nib.aff2axcodes(flipped.affine) == ("L", "P", "S")
    assert np.array_equal(flipped.image_xyz[::-1, ::-1], plain.image_xyz)
    corner = [plain.image_xyz.shape[0] - 1, plain.image_xyz.shape[1] - 1, 0, 1]
    assert flipped.affine @ corner == pytest.approx(plain.affine @ [0, 0, 0, 1])
    codes = {nib.aff2axcodes(case(phantoms, "acdc", i, orientation="mixed", scale=0.3).affine) for i in range(8)}
    assert len(codes) > 1


def test_scanners_differ_with_variation_only(phantoms):
    same = {
        tuple(nib.affines.voxel_sizes(case(phantoms, "acdc", i, variation=0.0, scale=0.3).affine)) for i in range(4)
    }
    other = {tuple(nib.affines.voxel_sizes(case(phantoms, "acdc", i, scale=0.3).affine)) for i in range(4)}
    assert (len(same), len(other)) == (1, 4)


def test_written_dataset_is_repeatable_and_read_by_the_referee(phantoms, tmp_path):
    wanted = ["--preset", "amos", "--spacing", "5,5,10", "--seed", "3", "--difficulty", "hard", "--pathology", "1"]
    assert phantoms.main([str(tmp_path / "a"), *wanted, "--cases", "2"]) == 0
    assert phantoms.main([str(tmp_path / "b"), *wanted, "--cases", "1"]) == 0
    for kind in ("imagesTr", "labelsTr"):
        first, again = (tmp_path / d / kind / "amos_001.nii.gz" for d in "ab")
        assert first.read_bytes() == again.read_bytes()
    dataset = read_dataset(tmp_path / "a")
    assert list(dataset.foreground.values()) == list(range(1, 16))
    assert load_scan(dataset.cases[0], dataset.labels).spacing == (5.0, 5.0, 10.0)
    card = json.loads((tmp_path / "a" / "dataset.json").read_text())
    assert card["modality"] == {"0": "CT"}
    assert all(len(found) == 1 for found in card["findings"].values())
    assert card["knobs"]["difficulty"] == 1.0


@pytest.mark.parametrize(
    "wrong", [["--difficulty", "2"], ["--spacing", "1,1"], ["--shape", "0,1,1"], ["--pathology", "0.5"]]
)
def test_unusable_options_are_refused(phantoms, tmp_path, wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        phantoms.main([str(tmp_path / "x"), *wrong])
    assert wrong[0] in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
