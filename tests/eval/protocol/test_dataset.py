# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Datasets: decathlon and nnU-Net cards, macOS companions, the split by hash."""

import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.errors import RefereeError
from eval.protocol.dataset import UNLABELLED, content_digest, load_scan, load_truth, read_dataset, split_by_hash
from lib.storage.dataset_folder import paired_files
from lib.storage.volumes import ImageError, load_label


def test_split_of_the_real_dataset(real_data):
    dataset = read_dataset(real_data / "Task04_Hippocampus")
    pool, test = split_by_hash([case.id for case in dataset.cases], 0.25)
    assert (len(pool), len(test)) == (156, 52)
    assert dataset.labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    scan = load_scan(dataset.cases[0], dataset.labels)
    assert scan.spacing == (1.0, 1.0, 1.0)


def test_split_by_hand():
    # SHA-256: "b" starts with 3e, "c" with 2e, "a" with ca, "d" with 18.
    assert split_by_hash(["a", "b", "c", "d"], 0.5) == (["a", "b"], ["c", "d"])


@given(st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=30, unique=True), st.floats(0.1, 0.9))
def test_split_is_a_partition_whatever_the_order(ids, fraction):
    pool, test = split_by_hash(ids, fraction)
    assert sorted(pool + test) == sorted(ids)
    assert len(test) == round(fraction * len(ids))
    assert split_by_hash(ids[::-1], fraction) == (pool, test)


def test_macos_companions_are_skipped(data):
    (data / "imagesTr" / "._hippocampus_001.nii.gz").write_bytes(b"junk")
    (data / "labelsTr" / "._hippocampus_001.nii.gz").write_bytes(b"junk")
    card = json.loads((data / "dataset.json").read_text())
    card["training"].append({"image": "./imagesTr/._hippocampus_001.nii.gz", "label": "./labelsTr/._x.nii.gz"})
    (data / "dataset.json").write_text(json.dumps(card))
    listed = [case.id for case in read_dataset(data).cases]
    del card["training"]
    (data / "dataset.json").write_text(json.dumps(card))
    found = [case.id for case in read_dataset(data).cases]
    assert listed == found == [f"hippocampus_00{i}" for i in range(1, 7)]


def test_labels_may_be_listed_by_name(data):
    card = json.loads((data / "dataset.json").read_text())
    card["labels"] = {"background": 0, "tail": 2, "head": 1}
    (data / "dataset.json").write_text(json.dumps(card))
    assert read_dataset(data).labels == {"background": 0, "head": 1, "tail": 2}


@pytest.mark.parametrize(
    "labels", [None, {"0": "background"}, {"0": "a", "x": "b"}, {"0": "a", "255": "b"}, ["a", "b"]]
)
def test_unusable_labels_are_refused(data, labels):
    card = json.loads((data / "dataset.json").read_text())
    card["labels"] = labels
    (data / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(RefereeError, match=r"dataset\.json"):
        read_dataset(data)


def test_listed_file_that_is_not_there(data):
    (data / "labelsTr" / "hippocampus_002.nii.gz").unlink()
    with pytest.raises(RefereeError, match=r"hippocampus_002\.nii\.gz, listed in dataset\.json, does not exist"):
        read_dataset(data)


def test_content_digest_sees_values_only(data, tmp_path):
    import nibabel as nib

    source = data / "imagesTr" / "hippocampus_001.nii.gz"
    volume = nib.load(source)
    values = np.asarray(volume.dataobj)
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), tmp_path / "copy.nii")
    assert content_digest(source) == content_digest(tmp_path / "copy.nii")
    values[0, 0, 0] += 1
    nib.save(nib.Nifti1Image(values, volume.affine), tmp_path / "other.nii")
    assert content_digest(source) != content_digest(tmp_path / "other.nii")


def nnunet(folder, ignore=None, suffix="_0000", slope=None):
    """A folder as nnU-Net has it, with four cases and no list in dataset.json."""
    for place in ("imagesTr", "labelsTr"):
        (folder / place).mkdir(parents=True)
    labels = {"background": 0, "a": 1, "b": 2} | ({"ignore": ignore} if ignore else {})
    card = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 4, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(card))
    for number in range(4):
        values = np.random.default_rng(number).normal(0, 20, (24, 20, 16)).astype(np.int16)
        values[2:8, 2:8, 2:8], values[14:20, 10:16, 8:14] = 400, -400
        label_xyz = np.where(values == 400, 1, np.where(values == -400, 2, 0)).astype(np.uint8)
        if ignore:
            label_xyz[:3] = ignore
        nib.save(nib.Nifti1Image(values, np.eye(4)), folder / "imagesTr" / f"c{number}{suffix}.nii.gz")
        nib.save(nib.Nifti1Image(label_xyz, np.eye(4)), folder / "labelsTr" / f"c{number}.nii.gz")
    return folder


def scaled(path, values, slope, inter=0.0):
    """A label whose header scales what it stores."""
    content = bytearray(nib.Nifti1Image(values, np.eye(4)).to_bytes())
    content[112:120] = np.array([slope, inter], np.float32).tobytes()
    path.write_bytes(gzip.compress(bytes(content)) if path.suffix == ".gz" else bytes(content))


def test_an_ignored_label_is_unlabelled(tmp_path):
    dataset = read_dataset(nnunet(tmp_path / "d", ignore=3))
    assert dataset.labels == {"background": 0, "a": 1, "b": 2}
    for scan in (load_scan(dataset.cases[0], dataset.labels), load_truth(dataset.cases[0])):
        assert (scan.label_xyz[:3] == UNLABELLED).all()
        assert set(np.unique(scan.label_xyz[3:])) == {0, 1, 2}


@pytest.mark.parametrize(
    ("stored", "slope", "inter"), [(100, 0.01, 0), (10, 0.1, 0), (3, 1 / 3, 0), (2, 0.5, 0), (7, 1 / 7, 0)]
)
def test_whole_numbers_up_to_the_rounding_of_a_slope_are_taken(tmp_path, stored, slope, inter):
    """By the referee and by the server alike; what is further off is refused by both with all its digits."""
    folder = nnunet(tmp_path / "d")
    expected = load_truth(read_dataset(folder).cases[0]).label_xyz
    path = folder / "labelsTr" / "c0.nii.gz"
    scaled(path, expected.astype(np.int16) * stored, slope, inter)
    dataset = read_dataset(folder)
    np.testing.assert_array_equal(load_scan(dataset.cases[0], dataset.labels).label_xyz, expected)
    np.testing.assert_array_equal(load_truth(dataset.cases[0]).label_xyz, expected)
    np.testing.assert_array_equal(load_label(path).array_xyz, expected)
    scaled(path, expected.astype(np.int16), 0.9999)
    with pytest.raises(RefereeError, match=r"c0.nii.gz holds label value 0.99989"):
        load_scan(dataset.cases[0], dataset.labels)
    with pytest.raises(ImageError, match=r"c0.nii.gz: label values must be whole numbers .* found 0, 0.99989"):
        load_label(path)


def test_the_referee_and_the_app_pair_the_same_files(tmp_path, data):
    by_name = nnunet(tmp_path / "names")
    plain = nnunet(tmp_path / "plain", suffix="")
    (by_name / "imagesTr" / "._c0_0000.nii.gz").write_bytes(b"macOS")
    for extra in ("imagesTr/c0_0001.nii.gz", "imagesTr/lonely_0000.nii.gz", "labelsTr/lone.nii.gz"):
        shutil.copy(by_name / "labelsTr" / "c0.nii.gz", by_name / extra)
    for extra in ("imagesTr/C9.NII.GZ", "labelsTr/c1.txt"):
        (by_name / extra).touch()
    for folder in (data, by_name, plain):
        cases = read_dataset(folder).cases
        images, labels = paired_files(folder)
        assert {case.id: case.label.resolve() for case in cases} == {i: p.resolve() for i, p in labels.items()}
        assert {case.id: case.image.resolve() for case in cases} == {i: images[i].resolve() for i in labels}
    unused = [sentence.partition(":")[0] for sentence in read_dataset(by_name).unused]
    assert unused == [
        *("imagesTr/C9.NII.GZ", "imagesTr/c0_0001.nii.gz", "imagesTr/lonely_0000.nii.gz"),
        *("labelsTr/c1.txt", "labelsTr/lone.nii.gz"),
    ]
    assert read_dataset(plain).unused == ()
