# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The MONAI Label train task: an ensemble of k members, each from scratch, on annotated voxels only."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monailabel.interfaces.tasks.train import TrainTask
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.errors import refuse
from lib.models.checkpoints import ModelStore, choose_device, trained_bundle
from lib.models.preprocessing import TrainingCase
from lib.models.recipe import Bundle, Recipe, RecipeError
from lib.options import AppOptions, problems
from lib.partial_labels import labelled_voxels
from lib.planning.plan_store import PlanStore
from lib.randomness import child_rng
from lib.storage.atomic_files import file_digest, read_json, text_digest, write_json
from lib.studies.datastore import PartialLabelDatastore
from lib.training.ensemble import Job, Layout, train_members
from lib.training.pipeline import Training, training_splits
from lib.training.progress_log import ProgressLog

logger = logging.getLogger(__name__)

GPU_WORKERS = 4  # members that share one GPU unless `--conf workers` sets another number


class TrainRequest(BaseModel):
    """Options of /train/{bundle} beside those of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    members: int = Field(ge=1, le=50, description="ensemble members")
    folds: int | None = Field(default=None, ge=1, le=50, description="folds over annotated images; default: members")
    seed: int = Field(default=0, ge=0, description="seed of folds, weights, crops and augmentation")
    round: int | None = Field(default=None, ge=0, description="round of this training; default: one after the last")
    replan: bool = Field(default=False, description="whether the plan is made anew from the pool as it is now")


# Keys that MONAI Label and its clients put into a training request and that do not change the training.
UPSTREAM_KEYS = frozenset(
    (
        *("model", "name", "pretrained", "device", "max_epochs", "early_stop_patience", "val_split", "client_id"),
        *("train_batch_size", "val_batch_size", "multi_gpu", "gpus", "dataset", "dataloader", "local_rank", "run_id"),
        *("tracking", "tracking_uri", "tracking_experiment_name", "tracking_run_name", "bundle_path"),
        *("train_random_seed", "val_random_seed"),
    )
)


class EnsembleTrainTask(TrainTask):
    """Training of one bundle; work, order and randomness depend only on the request and the labels.

    A repeated request on the same labels finds its finished members on disk, so an interrupted training continues and
    ends with the same weights.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: ModelStore,
        classes: dict[str, int],
        options: AppOptions,
        state: Path,
    ) -> None:
        super().__init__(str(bundle.metadata.get("description", bundle.name)))
        self.plans = PlanStore(bundle, options, state, classes)
        self.store = store
        self.classes = classes
        self.options = options
        self.progress_file = state / f"training_{bundle.name}.json"

    @property
    def bundle(self) -> Bundle:
        """The bundle as the plan in force has it."""
        return self.plans.bundle()

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Spacing in mm that the network works at; None for each image's own."""
        if self.options.spacing:
            x, y, z = self.options.spacing
            return x, y, z
        return self.bundle.plan.spacing if self.bundle.plan else None

    def info(self) -> dict[str, Any]:
        return {**super().info(), "labels": self.classes, "recipe": self.bundle.recipe({}).model_dump(mode="json")}

    def config(self) -> dict[str, Any]:
        """Options that clients show as a form and send back; of a list, the first entry is sent.

        Single options of the recipe are left out: if they were sent back, the crop would become one number, and all of
        them would override the plan and the chosen recipe.
        """
        return {"recipe": list(self.bundle.recipes), "members": self.options.members, "seed": 0}

    def stats(self) -> dict[str, Any]:
        """Of the last training that ended; of one that runs also `epoch` of `total_epochs`, which are per cent."""
        told = read_json(self.store.folder / "train_stats.json") or {}
        done = self.progress().get("fraction", 1)
        if done < 1:
            # Slicer's bar shows them, and nothing as long as there is a total time.
            told.pop("total_time", None)
            told |= {"epoch": round(100 * done), "total_epochs": 100}
        return told

    def parse(self, request: Mapping[str, Any]) -> tuple[TrainRequest, Recipe]:
        """Split a request into the task's options and the recipe's.

        Raises:
            RecipeError: unknown or unusable options.
        """
        given = {k: v for k, v in request.items() if k not in UPSTREAM_KEYS}
        own = {k: given.pop(k) for k in list(given) if k in TrainRequest.model_fields}
        try:
            wanted = TrainRequest.model_validate({"members": self.options.members, **own})
        except ValidationError as error:
            raise RecipeError(f"training option {problems(error)}") from error
        unknown = sorted(set(given) - {"recipe"} - set(Recipe.model_fields))
        if unknown:
            known = ", ".join([*TrainRequest.model_fields, "recipe", *Recipe.model_fields])
            raise RecipeError(f"unknown training option {', '.join(unknown)}; known options are {known}")
        recipe = self.bundle.recipe(given)
        if any(p < 1 or p % d for p, d in zip(recipe.patch, self.bundle.divisor, strict=True)):
            takes = f"{self.bundle.name} takes multiples of {self.bundle.divisor}"
            raise RecipeError(f"training option patch: {takes}, found {recipe.patch}")
        if recipe.learning_loss and recipe.compiled:
            raise RecipeError("learning_loss looks into the network while it runs: use compiled=false")
        if recipe.learning_loss and recipe.batch % 2:
            raise RecipeError(f"learning_loss compares pairs of crops: batch must be even, found {recipe.batch}")
        return wanted, recipe

    def progress(self) -> dict[str, Any]:
        """Member, step and estimated seconds left of the training that runs or ran last."""
        return read_json(self.progress_file) or {}

    def __call__(self, request: dict[str, Any], datastore: PartialLabelDatastore) -> dict[str, Any]:
        """Train and publish the ensemble; return MONAI Label's statistics.

        Raises:
            PatchwiseError: 4xx with a sentence: bad options, no annotation yet, an unreadable image.
        """
        wanted, recipe = self.parse(request)
        datastore.annotations.repair({i: datastore.image_path(i) for i in datastore.list_images()})
        started = time.time()
        labelled = datastore.get_labeled_images()
        left_out = datastore.unusable(labelled)
        labels = {i: Path(datastore.get_label_uri(i, "final")) for i in labelled if i not in left_out}
        if not labels:
            refuse(
                next(iter(left_out.values()), "nothing is annotated yet, so there is nothing to train on")
                + "; annotate a region of another image first",
                409,
            )
        self.plans.ensure({i: datastore.image_path(i) for i in datastore.pool()[0]}, labels, wanted.replan)
        wanted, recipe = self.parse({**request, "replan": False})
        wanted = self._with_round(wanted, recipe, datastore, labels)
        digest = self._digest(wanted, recipe, datastore, labels)
        training = self._training(wanted, recipe, datastore.annotations.ignored)
        images = {i: datastore.image_path(i) for i in labels}
        data = training.build_cases(images, labels, datastore.annotations.classwise)
        if not data.voxels:
            refuse("the labels of this project hold no annotated voxel; annotate a region first", 409)
        job = training.job(digest, self._splits(wanted, data.cases), data.codes)
        self._train_members(job, data.cases, self._devices(request))
        training.publish(digest, data)
        stats = self._stats(digest, wanted, len(data.cases), time.time() - started)
        write_json(self.store.folder / "train_stats.json", stats)
        datastore.ledger.record_round(int(wanted.round or 0), self.bundle.name, digest, wanted.model_dump(), stats)
        return stats

    def _with_round(
        self, wanted: TrainRequest, recipe: Recipe, datastore: PartialLabelDatastore, labels: Mapping[str, Path]
    ) -> TrainRequest:
        """The request with its round: as given, the current model's where nothing changed since, else the next."""
        current = self.store.current()
        if wanted.round is not None or current is None:
            return wanted.model_copy(update={"round": wanted.round or 0})
        same = wanted.model_copy(update={"round": current.round})
        unchanged = self._digest(same, recipe, datastore, labels) == current.digest
        return same if unchanged else wanted.model_copy(update={"round": current.round + 1})

    def _devices(self, request: Mapping[str, Any]) -> list[str]:
        """Devices of this training: one, or several with MONAI Label's `multi_gpu` and `gpus`.

        Raises:
            PatchwiseError: a GPU that this machine does not have.
        """
        device = choose_device(self.options.device)
        if device.type != "cuda" or not request.get("multi_gpu"):
            return [str(device)]
        found, asked = torch.cuda.device_count(), str(request.get("gpus") or "all")
        wanted = range(found) if asked == "all" else [int(n) for n in asked.split(",") if n.strip().isdigit()]
        if not wanted or max(wanted) >= found:
            refuse(f"gpus: {asked!r} asks for GPUs this machine does not have; it has {found}, numbered from 0")
        return [f"cuda:{number}" for number in wanted]

    def _digest(
        self, wanted: TrainRequest, recipe: Recipe, datastore: PartialLabelDatastore, labels: Mapping[str, Path]
    ) -> str:
        inputs: dict[str, Any] = {i: (datastore.image_digest(i), file_digest(path)) for i, path in labels.items()}
        options = wanted.model_dump(mode="json"), recipe.model_dump(mode="json"), self.spacing
        start = self._start(wanted, recipe)
        return text_digest(self.bundle.fingerprint(), self.classes, options, inputs, start)

    def _training(self, wanted: TrainRequest, recipe: Recipe, ignored: frozenset[int]) -> Training:
        return Training(
            bundle=self.bundle,
            store=self.store,
            classes=self.classes,
            recipe=recipe,
            spacing=self.spacing,
            members=wanted.members,
            seed=wanted.seed,
            round=int(wanted.round or 0),
            start=self._start(wanted, recipe),
            ignored=ignored,
        )

    def _splits(self, wanted: TrainRequest, cases: list[TrainingCase]) -> list[list[str]]:
        """Images of each member."""
        present = {
            case.name: frozenset(np.unique(case.label_xyz.numpy()).tolist()) & frozenset(self.classes.values())
            for case in cases
            if labelled_voxels(case.label_xyz.numpy())
        }
        rng = child_rng(wanted.seed, wanted.round, "folds")
        return training_splits(present, wanted.members, wanted.folds or wanted.members, rng)

    def _start(self, wanted: TrainRequest, recipe: Recipe) -> tuple[str, int] | None:
        """Digest and number of members of the training that provides the initial weights; None for fresh weights.

        For the round of the current model, the result is the initial training of that model.
        """
        last = self.store.current() if recipe.start == "last" else None
        if last is None:
            return None
        if last.round == wanted.round:
            return last.facts.start
        if last.facts.classes != self.classes:
            known = ", ".join(last.facts.classes)
            refuse(f"start: the last model has other classes ({known}) than this project; use start=scratch", 409)
        if trained_bundle(last, self.plans.base).fingerprint() != self.bundle.fingerprint():
            refuse("start: the last model was trained by another plan than the one in force; use start=scratch", 409)
        return last.digest, last.facts.members

    def _train_members(self, job: Job, cases: list[TrainingCase], devices: list[str]) -> None:
        members = len(job.splits)
        done = self.store.finished_members(job.digest, members)
        if done:
            logger.info("members %s of %d are trained already", ", ".join(str(m + 1) for m in done), members)
        threads = self.options.threads or torch.get_num_threads()
        workers = self.options.workers or (threads if devices == ["cpu"] else GPU_WORKERS)
        layout = Layout.of(members, devices, threads, workers)
        board = ProgressLog(members, done, self.progress_file)
        pending = [member for member in range(members) if member not in done]
        train_members(job, cases, pending, layout, self.store.folder / job.digest[:16] / "job", board.report)

    def _stats(self, digest: str, wanted: TrainRequest, cases: int, seconds: float) -> dict[str, Any]:
        progress = self.progress()
        return {
            "model": digest,
            "round": wanted.round,
            "members": wanted.members,
            "annotated_images": cases,
            "total_time": round(seconds, 2),
            "train": {"loss": progress.get("loss")},
        }
