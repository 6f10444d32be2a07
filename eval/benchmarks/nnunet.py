# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""This project's quick recipe against nnU-Net's own trainer and plan: same cases, same CPU, same minutes.

`make bench-nnunet` makes an environment with nnU-Net and runs this. DATA names another decathlon folder, MINUTES a
shorter time than 22.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from eval.benchmarks import Row
from eval.benchmarks.nnunet_driver import DATASET
from eval.benchmarks.timing import row
from eval.errors import RefereeError
from eval.metrics.segmentation import dice
from eval.protocol.dataset import Case, read_dataset, split_by_hash
from eval.runner.server import PROJECT
from lib.models.preprocessing import TrainingCase, network_image, network_label
from lib.models.recipe import Bundle
from lib.prediction.posterior import Ensemble
from lib.storage.volumes import load_image, load_label
from lib.training.trainer import train_member

MINUTES = 22.0
BUNDLE = "segmentation_dynunet_3d"


def run() -> Iterator[Row]:
    """Samples per second and Dice after the same minutes.

    Raises:
        RefereeError: no Python with nnU-Net was named, or its run failed.
    """
    python = os.environ.get("NNUNET_PYTHON")
    if not python:
        raise RefereeError("NNUNET_PYTHON names no Python that has nnU-Net; `make bench-nnunet` sets one up")
    minutes = float(os.environ.get("MINUTES", MINUTES))
    labels, pool, test = real_scans()
    with tempfile.TemporaryDirectory() as folder:
        theirs, their_dice = nnunet(Path(folder), python, minutes, labels, pool, test)
    ours, our_dice = patchwise(labels, pool, test)
    theirs_per_second = theirs["iterations"] * theirs["batch"] / theirs["seconds"]
    name = f"sample of a training step (batch {theirs['batch']}, {theirs['patch_zyx']} there)"
    yield row(name, 1 / ours["samples_a_second"], 1 / theirs_per_second, 10.0)
    quality = {"unit": "Dice", "ours_s": round(our_dice, 4), "reference_s": round(their_dice, 4)}
    name = f"test Dice after {ours['minutes']:.1f} minutes, there {theirs['seconds'] / 60:.1f}"
    yield {"name": name, **quality, "ratio": round(our_dice / 0.86, 3), "bar": 1.0}


def nnunet(
    work: Path, python: str, minutes: float, labels: dict[str, int], pool: Sequence[Case], test: Sequence[Case]
) -> tuple[dict[str, Any], float]:
    """Report of nnU-Net's driver, and the mean foreground Dice of its predictions."""
    raw = work / "raw" / DATASET
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    (work / "test").mkdir()
    for case in pool:
        (raw / "imagesTr" / f"{case.id}_0000.nii.gz").symlink_to(case.image.resolve())
        (raw / "labelsTr" / f"{case.id}.nii.gz").symlink_to(case.label.resolve())
    for case in test:
        (work / "test" / f"{case.id}.nii.gz").symlink_to(case.image.resolve())
    card = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": len(pool), "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(card))
    driver = Path(__file__).with_name("nnunet_driver.py")
    done = subprocess.run([python, str(driver), str(work), str(minutes)], capture_output=True, text=True)
    if done.returncode:
        raise RefereeError(f"nnU-Net ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts, mean_dice(labels, test, [_labels(work / "predicted" / f"{case.id}.nii.gz") for case in test])


def patchwise(labels: dict[str, int], pool: Sequence[Case], test: Sequence[Case]) -> tuple[dict[str, float], float]:
    """Samples per second and minutes of the quick recipe, and the mean foreground Dice of its predictions."""
    bundle = Bundle(PROJECT / "bundles" / BUNDLE)
    recipe = bundle.recipe({"recipe": "quick"})
    cases = [training_case(case) for case in pool]
    torch.manual_seed(0)
    network = bundle.network(len(labels) - 1)
    began = time.perf_counter()
    train_member(network, cases, recipe, np.random.SeedSequence(0), torch.device("cpu"))
    taken = time.perf_counter() - began
    ensemble = Ensemble([network], recipe.patch, bundle.divisor, None, torch.device("cpu"))
    predicted = [ensemble.mean(load_image(case.image)).argmax(axis=0).astype(np.uint8) for case in test]
    facts = {"samples_a_second": recipe.steps * recipe.batch / taken, "minutes": taken / 60}
    return facts, mean_dice(labels, test, predicted)


def real_scans() -> tuple[dict[str, int], list[Case], list[Case]]:
    """Classes, pool and test cases of the decathlon's hippocampus task as studies split it, or of the folder DATA."""
    dataset = read_dataset(Path(os.environ.get("DATA", PROJECT.parent / "shared" / "data" / "Task04_Hippocampus")))
    cases = {case.id: case for case in dataset.cases}
    pool, test = ([cases[i] for i in ids] for ids in split_by_hash(cases, 0.25))
    return dataset.labels, pool, test


def training_case(case: Case) -> TrainingCase:
    """A case with its label, prepared for a network without a plan."""
    volume, label = load_image(case.image), load_label(case.label)
    label_xyz = network_label(label.array_xyz, volume.spacing, None)
    return TrainingCase(case.id, network_image(volume, None), label_xyz)


def mean_dice(labels: dict[str, int], test: Sequence[Case], predicted: Sequence[NDArray[np.uint8]]) -> float:
    """Mean over classes of means over cases."""
    means = []
    for value in sorted(v for v in labels.values() if v):
        found = [dice(p == value, _labels(case.label) == value) for case, p in zip(test, predicted, strict=True)]
        means.append(np.nanmean(found))
    return float(np.mean(means))


def _labels(path: Path) -> NDArray[np.uint8]:
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return np.asarray(image.dataobj).astype(np.uint8)
