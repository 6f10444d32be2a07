# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Datasets: decathlon and nnU-Net cards, macOS companions, the split by hash."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.errors import RefereeError
from eval.protocol.dataset import content_digest, load_scan, read_dataset, split_by_hash


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
