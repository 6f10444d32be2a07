# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pytest

from eval.annotate import main, studies_of
from eval.runner.server import PROJECT


def dataset(folder: Path) -> Path:
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
        nib.save(nib.Nifti1Image(np.zeros((30, 30, 30), np.int16), np.eye(4)), folder / sub / "a.nii.gz")
    (folder / "dataset.json").write_text('{"labels": {"0": "background", "1": "organ"}}')
    return folder


def test_a_dataset_is_served_from_links_without_its_labels(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data")
    for _ in range(2):
        assert studies_of(data, tmp_path / "studies") == tmp_path / "studies"
    assert sorted(p.name for p in (tmp_path / "studies").iterdir()) == ["a.nii.gz", "dataset.json"]


def test_a_folder_of_scans_is_served_itself(tmp_path: Path) -> None:
    assert studies_of(tmp_path, tmp_path / "studies") == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "none: no such folder; give a folder of NIfTI or NRRD scans" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_is_served_until_interrupted(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data")
    command = [
        sys.executable,
        "-m",
        "eval.annotate",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "--no-browser",
    ]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    address = process.stdout.readline().removeprefix("annotate: ").strip()
    page = httpx.get(address)
    assert page.status_code == 200
    assert re.search("<title>Patchwise – annotate</title>", page.text)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    time.sleep(0.2)
    with pytest.raises(httpx.TransportError):
        httpx.get(address)
