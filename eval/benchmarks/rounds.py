# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""What a round costs: training five members at once or in five calls, and scoring a pool with them.

Training is timed on the real server, in seconds of wall time, because what it saves is start-ups and idle cores. Both
need a machine without other work.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray

from eval.benchmarks import Row
from eval.benchmarks.timing import ratio, row
from eval.client import LabelClient
from eval.oracle import to_nifti
from eval.server import PROJECT, ServerProcess
from lib.images import load_image
from lib.posterior import Ensemble
from lib.training.cases import network_image
from lib.training.recipe import Bundle
from lib.uncertainty import Moments

BUNDLE = "segmentation_dynunet_3d"
MEMBERS = 5
STEPS = 150
CASES = 12
FIRST_STEP_SECONDS = 10.0


def run() -> Iterator[Row]:
    """Rows of a round, each as it is measured."""
    with tempfile.TemporaryDirectory() as folder:
        images, labels = phantoms(Path(folder) / "pool", CASES)
        yield scoring_row(images)
        yield from training_rows(Path(folder), images, labels)


def phantoms(folder: Path, cases: int) -> tuple[list[Path], list[Path]]:
    """Paths of generated images and of their labels."""
    sys.path.insert(0, str(PROJECT / "sample-datasets"))
    try:
        from phantoms import PRESETS, make_dataset
    finally:
        sys.path.pop(0)
    make_dataset(folder, PRESETS["hippocampus"], cases, 1)
    return sorted((folder / "imagesTr").glob("*.nii.gz")), sorted((folder / "labelsTr").glob("*.nii.gz"))


def scoring_row(images: list[Path]) -> Row:
    """Moments of every image of a pool: one read and streamed sums, against a window sweep a member and sums after."""
    bundle = Bundle(PROJECT / "bundles" / BUNDLE)
    recipe = bundle.recipe({})
    torch.manual_seed(0)
    networks = [bundle.network(2).eval() for _ in range(MEMBERS)]
    ensemble = Ensemble(networks, recipe.patch, bundle.divisor, None, torch.device("cpu"))

    def ours() -> list[NDArray[np.float32]]:
        found = []
        for path in images:
            moments = Moments.from_members(ensemble.members(load_image(path)))
            found.append(moments.mutual_information())
        return found

    def plain() -> list[NDArray[np.float32]]:
        stacks: list[list[NDArray[np.float32]]] = [[] for _ in images]
        for network in networks:
            for number, path in enumerate(images):
                image = network_image(load_image(path), None)[None]
                with torch.inference_mode():
                    logits = sliding_window_inference(image, recipe.patch, 1, network, overlap=0.5, mode="gaussian")
                assert isinstance(logits, torch.Tensor)
                stacks[number].append(torch.softmax(logits[0], dim=0).numpy())
        return [_information(np.stack(stack)) for stack in stacks]

    return ratio(f"scoring {len(images)} images with {MEMBERS} members", ours, plain, 2.5, 3, 3)


def _information(probs_mcxyz: NDArray[np.float32]) -> NDArray[np.float32]:
    def entropy(p: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        return np.asarray(-np.sum(p * np.log(np.clip(p, 1e-12, None)), axis=axis))

    return np.asarray(entropy(probs_mcxyz.mean(0), 0) - entropy(probs_mcxyz, 1).mean(0))


def training_rows(folder: Path, images: list[Path], labels: list[Path]) -> Iterator[Row]:
    """Five members in one call and in five calls, and the seconds until the first step of the former."""
    studies = folder / "studies"
    studies.mkdir()
    for path in images:
        (studies / path.name).symlink_to(path)
    (studies / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "anterior": 1, "posterior": 2}}))
    threads = psutil.cpu_count(logical=False) or 1
    server = ServerProcess(studies, {"threads": threads}, log=folder / "server.log", threads=threads)
    server.start()
    try:
        client = LabelClient(server.url)
        for path in labels:
            image = nib.load(path)
            assert isinstance(image, nib.Nifti1Image)
            label = to_nifti(np.asarray(image.dataobj).astype(np.uint8), np.asarray(image.affine))
            client.save(path.name.removesuffix(".nii.gz"), label, {"whole": True})
        together, apart, waits = [], [], []
        for seed in (1, 2):
            began = time.time()
            client.train(BUNDLE, {"members": MEMBERS, "steps": STEPS, "seed": seed})
            together.append(time.time() - began)
            waits.append(client.info()["patchwise"]["training"][BUNDLE]["started"] - began)
            began = time.time()
            for member in range(MEMBERS):
                client.train(BUNDLE, {"members": 1, "steps": STEPS, "seed": 100 * seed + member})
            apart.append(time.time() - began)
    finally:
        server.stop()
    yield row(f"training {MEMBERS} members of {STEPS} steps", _median(together), _median(apart), 1.2)
    yield row("first step after the call", _median(waits), FIRST_STEP_SECONDS, 1.0)


def _median(values: list[float]) -> float:
    return statistics.median(values)
