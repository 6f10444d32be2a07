# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""nnU-Net's own trainer and plan for a number of minutes, then its predictions of the test cases.

Runs with the Python of an environment that holds nnunetv2 (`make bench-nnunet` makes it); nothing of this project is
imported. Prints one line of JSON with the iterations, samples and seconds of training.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

DATASET = "Dataset900_Pool"


def main(work: Path, minutes: float) -> None:
    """Train on `work/raw/DATASET` and write predictions of `work/test/*.nii.gz` to `work/predicted`."""
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(work / name)
    import numpy as np
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    extract_fingerprints([900], num_processes=2)
    plan_experiments([900])
    preprocess([900], configurations=["3d_fullres"], num_processes=[2])
    folder = work / "preprocessed" / DATASET
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    dataset = json.loads((folder / "dataset.json").read_text())
    plans["continue_training"] = False  # its trainer takes this answer of its command line from there
    trainer = nnUNetTrainer(plans, "3d_fullres", "all", dataset, torch.device("cpu"))
    trainer.initialize()
    trainer.on_train_start()
    trainer.network.train()
    began, iterations, times = time.perf_counter(), 0, []
    while time.perf_counter() - began < 60 * minutes:
        start = time.perf_counter()
        trainer.train_step(next(trainer.dataloader_train))
        times.append(time.perf_counter() - start)
        iterations += 1
    taken = time.perf_counter() - began
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        "nnUNetTrainer",
        None,
    )
    trainer.set_deep_supervision_enabled(False)
    (work / "predicted").mkdir(exist_ok=True)
    reader = SimpleITKIO()
    for path in sorted((work / "test").glob("*.nii.gz")):
        image, properties = reader.read_images([str(path)])
        label = predictor.predict_single_npy_array(image, properties, None, None, False)
        reader.write_seg(label, str(work / "predicted" / path.name), properties)
    batch = trainer.configuration_manager.batch_size
    patch = [int(n) for n in trainer.configuration_manager.patch_size]
    print(
        json.dumps(
            {
                "iterations": iterations,
                "batch": batch,
                "patch_zyx": patch,
                "seconds": taken,
                "seconds_an_iteration": float(np.median(times)),
            }
        ),
        flush=True,
    )
    for loader in multiprocessing.active_children():
        loader.kill()  # they wait for a queue for ever, and hold this process's output open
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
