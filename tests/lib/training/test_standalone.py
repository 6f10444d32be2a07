# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Every bundle outside of MONAI Label: metadata, network, training and inference on a decathlon-style folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import run, verify_metadata, verify_net_in_out

from lib.models.plan_files import read_plan
from lib.options import OptionError
from lib.training.standalone import FolderInference, listed
from tests.lib.training.studies import ROOT, phantoms
from tests.lib.training.test_bundles import BUNDLES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = phantoms(tmp_path_factory.mktemp("decathlon") / "data", "thick_slices")
    card = json.loads((made / "dataset.json").read_text())
    card["test"] = [card["training"].pop()["image"]]
    (made / "dataset.json").write_text(json.dumps(card))
    first = nib.load(made / card["training"][0]["label"])
    partial = np.asarray(first.dataobj).astype(np.uint8)
    partial[:20] = 255
    nib.save(nib.Nifti1Image(partial, first.affine), made / card["training"][0]["label"])
    return made


def configs(name: str) -> Path:
    return ROOT / "bundles" / name / "configs"


@pytest.mark.parametrize("name", BUNDLES)
def test_metadata_is_complete(name, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text((Path(__file__).parent / "metadata_schema.json").read_text())
    verify_metadata(meta_file=str(configs(name) / "metadata.json"), filepath=str(schema))
    version = json.loads((configs(name) / "metadata.json").read_text())
    assert version["version"] in version["changelog"]
    for file in ("LICENSE", "docs/README.md", "configs/train.json", "configs/inference.json", "configs/network.json"):
        assert (configs(name).parent / file).is_file()


@pytest.mark.parametrize("name", BUNDLES)
def test_networks_are_what_the_metadata_says(name):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs(name) / "metadata.json"),
        config_file=str(configs(name) / "network.json"),
        device="cpu",
        n=2,
    )


@pytest.mark.parametrize("name", BUNDLES)
def test_bundles_train_and_infer_on_a_folder(folder, tmp_path, name):
    common = {"bundle_root": str(configs(name).parent), "dataset_dir": str(folder), "device": "cpu"}
    meta = str(configs(name) / "metadata.json")
    run(
        config_file=str(configs(name) / "train.json"),
        meta_file=meta,
        **common,
        output_dir=str(tmp_path / "models"),
        recipe={"steps": 3},
        memory=4,
    )
    assert read_plan(tmp_path / "models" / f"plan_{name}.yaml").spacing[0] == pytest.approx(1)
    run(
        config_file=str(configs(name) / "inference.json"),
        meta_file=meta,
        **common,
        model_dir=str(tmp_path / "models"),
        output_dir=str(tmp_path / "eval"),
    )
    images, labels = listed(folder, "test")
    assert not labels
    ((image, path),) = images.items()
    found = nib.load(tmp_path / "eval" / f"{image}.nii.gz")
    assert found.shape == nib.load(path).shape
    assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1, 2}


@pytest.mark.slow
def test_the_command_line_needs_nothing_but_the_folder(folder, tmp_path):
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.json"]
    options = ["--dataset_dir", str(folder), "--output_dir", str(tmp_path / "models"), "--recipe", '{"steps": 2}']
    bundle = configs("segmentation_dynunet_3d").parent
    done = subprocess.run([*command, *options, "--device", "cpu"], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "models" / bundle.name).glob("*/member_0.pt"))


def test_what_is_missing_is_said_in_a_sentence(folder, tmp_path):
    bundle = str(configs("segmentation_dynunet_3d").parent)
    with pytest.raises(OptionError, match="no trained segmentation_dynunet_3d in"):
        FolderInference(bundle, str(folder), str(tmp_path), str(tmp_path)).run()
    with pytest.raises(OptionError, match="nothing is listed under 'validation'"):
        listed(folder, "validation")
    with pytest.raises(OptionError, match="not readable as a decathlon-style"):
        listed(tmp_path, "training")
