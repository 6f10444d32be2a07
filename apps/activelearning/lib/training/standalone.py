# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Training and inference on a decathlon-style folder without a server, for `python -m monai.bundle run`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lib.models.checkpoints import ModelStore, choose_device
from lib.models.class_names import resolve_classes, unlabelled_values
from lib.models.recipe import Bundle
from lib.options import AppOptions, OptionError
from lib.planning.plan_store import PlanStore
from lib.prediction.loading import load_ensemble
from lib.prediction.segmentation import segment
from lib.storage.atomic_files import file_digest, text_digest
from lib.storage.dataset_folder import paired_files
from lib.storage.volumes import load_image, save_label
from lib.training.ensemble import Layout, train_members
from lib.training.pipeline import Training
from lib.training.trainer import Progress

logger = logging.getLogger(__name__)


class FolderTraining:
    """Train one bundle on the images that dataset.json lists under "training"; 255 in a label map is not annotated.

    Write `<output_dir>/plan_<bundle>.yaml` and `<output_dir>/<bundle>/`, the checkpoints in the server's layout.

    Args:
        bundle_root: folder of the bundle.
        dataset_dir: decathlon-style folder.
        output_dir: folder of plan and checkpoints.
        recipe: options that override network.json, e.g. {"steps": 20000}.
        members: networks of the ensemble.
        plan, memory, device: see the server's options.
    """

    def __init__(
        self,
        bundle_root: str,
        dataset_dir: str,
        output_dir: str,
        recipe: Mapping[str, Any] | None = None,
        members: int = 1,
        seed: int = 0,
        plan: str = "auto",
        memory: float | None = None,
        device: str = "auto",
    ) -> None:
        self.bundle = Bundle(Path(bundle_root).resolve())
        self.dataset = Path(dataset_dir)
        self.output = Path(output_dir)
        self.recipe = dict(recipe or {})
        self.members = members
        self.seed = seed
        self.options = AppOptions(plan=plan, memory=memory, device=device)

    def run(self) -> Path:
        """Train and store the ensemble; return its folder.

        Raises:
            ValueError: a file or option that cannot be used, in one sentence.
        """
        classes = resolve_classes(None, self.dataset, self.bundle.metadata)
        images, labels = listed(self.dataset, "training")
        plans = PlanStore(self.bundle, self.options, self.output, classes, self.dataset)
        bundle = plans.ensure(images, labels)
        spacing = bundle.plan.spacing if bundle.plan else None
        recipe = bundle.recipe(self.recipe)
        store = ModelStore(self.output, bundle.name)
        ignored = unlabelled_values(self.dataset)
        training = Training(bundle, store, classes, recipe, spacing, self.members, self.seed, 0, ignored=ignored)
        data = training.build_cases(images, labels)
        inputs = {name: (file_digest(images[name]), file_digest(path)) for name, path in labels.items()}
        digest = text_digest(bundle.fingerprint(), recipe.model_dump(mode="json"), classes, self.seed, inputs)
        job = training.job(digest, [sorted(labels)] * self.members, data.codes)
        layout = Layout.of(self.members, [str(choose_device(self.options.device))], torch.get_num_threads(), 1)
        pending = sorted(set(range(self.members)) - set(store.finished_members(digest, self.members)))
        train_members(job, data.cases, pending, layout, self.output / "job", _report)
        return training.publish(digest, data).folder


class FolderInference:
    """Segment images of a decathlon-style folder with a trained bundle: `<output_dir>/<id>.nii.gz`, class ids.

    Args:
        model_dir: the `output_dir` of the training.
        section: list of dataset.json whose images are segmented.
    """

    def __init__(
        self,
        bundle_root: str,
        dataset_dir: str,
        model_dir: str,
        output_dir: str,
        section: str = "test",
        device: str = "auto",
    ) -> None:
        self.bundle = Bundle(Path(bundle_root).resolve())
        self.dataset = Path(dataset_dir)
        self.store = ModelStore(Path(model_dir), self.bundle.name)
        self.output = Path(output_dir)
        self.section = section
        self.device = choose_device(device)

    def run(self) -> list[Path]:
        """Write a label map on the grid of each image; return the files.

        Raises:
            ValueError: there is no finished training, or an image cannot be read.
        """
        model = self.store.current()
        if model is None:
            raise OptionError(f"no trained {self.bundle.name} in {self.store.folder.parent}; run train.json first")
        ensemble = load_ensemble(self.store, model, self.bundle, self.device)
        images, _ = listed(self.dataset, self.section)
        written = []
        for name, path in images.items():
            volume = load_image(path)
            label_xyz = segment(ensemble, volume, 1 + len(model.facts.classes), self.store.folder)
            written.append(self.output / f"{name}.nii.gz")
            save_label(written[-1], label_xyz, volume.affine)
            logger.info("segmented %s", name)
        return written


def listed(folder: Path, section: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and labels by id of a decathlon-style or nnU-Net folder; test images have no labels.

    Raises:
        OptionError: no readable dataset.json, or nothing listed.
    """
    images, labels = paired_files(folder, section)
    if not images:
        card = folder / "dataset.json"
        raise OptionError(f"{card}: nothing is listed under {section!r}; list images there, or name another section")
    return images, labels


def _report(member: int, progress: Progress) -> None:
    logger.info("member %d step %d of %d, loss %.4f", member + 1, progress.step, progress.steps, progress.loss)
