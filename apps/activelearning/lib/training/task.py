# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The MONAI Label train task: an ensemble of k members, each from scratch, on annotated voxels only."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monailabel.interfaces.tasks.train import TrainTask
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.datastore import PartialLabelDatastore
from lib.errors import refuse, speaking_errors
from lib.files import file_digest, read_json, text_digest, write_json
from lib.images import check_same_grid, load_image, load_label
from lib.models import ModelStore, choose_device
from lib.options import AppOptions, problems
from lib.partial_labels import UNLABELLED, check_values, labelled_voxels
from lib.pseudo_labels import fill_between
from lib.randomness import child_rng, child_seed
from lib.training.cases import TrainingCase, network_image, network_label
from lib.training.folds import training_splits
from lib.training.learned_loss import fresh_head
from lib.training.planner_store import PlanStore
from lib.training.recipe import Bundle, Recipe, RecipeError
from lib.training.trainer import Progress, train_member

logger = logging.getLogger(__name__)


class TrainRequest(BaseModel):
    """What /train/{bundle} takes beside the recipe's own options."""

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
    """Trains one bundle. Work, order and randomness follow from the request and the labels alone.

    The same request on the same labels finds its finished members on disk, so a training that was killed goes on where
    it stopped and ends in the same weights.
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
        self.plans = PlanStore(bundle, options, state, len(classes) + 1)
        self.store = store
        self.classes = classes
        self.options = options
        self.progress_file = state / f"training_{bundle.name}.json"

    @property
    def bundle(self) -> Bundle:
        """The bundle as the plan in force has it."""
        return self.plans.bundle()

    @property
    def spacing(self) -> Sequence[float] | None:
        """Spacing in mm that the network works at; None for each image's own."""
        return self.options.spacing or (self.bundle.plan.spacing if self.bundle.plan else None)

    def info(self) -> dict[str, Any]:
        return {**super().info(), "labels": self.classes}

    def config(self) -> dict[str, Any]:
        """What clients show as a form: only what changes a training of this task."""
        return {"members": self.options.members, "seed": 0, **self.bundle.recipe({}).model_dump(mode="json")}

    def stats(self) -> dict[str, Any]:
        return read_json(self.store.folder / "train_stats.json") or {}

    def parse(self, request: Mapping[str, Any]) -> tuple[TrainRequest, Recipe]:
        """Splits a request into the task's options and the recipe's.

        Raises:
            RecipeError: unknown or unusable options.
        """
        given = {k: v for k, v in request.items() if k not in UPSTREAM_KEYS}
        own = {k: given.pop(k) for k in list(given) if k in TrainRequest.model_fields}
        try:
            wanted = TrainRequest.model_validate({"members": self.options.members, **own})
        except ValidationError as error:
            raise RecipeError(f"training option {problems(error)}") from error
        unknown = sorted(set(given) - set(Recipe.model_fields))
        if unknown:
            known = ", ".join([*TrainRequest.model_fields, *Recipe.model_fields])
            raise RecipeError(f"unknown training option {', '.join(unknown)}; known options are {known}")
        recipe = self.bundle.recipe(given)
        if any(p < 1 or p % d for p, d in zip(recipe.patch, self.bundle.divisor, strict=True)):
            takes = f"{self.bundle.name} takes multiples of {self.bundle.divisor}"
            raise RecipeError(f"training option patch: {takes}, found {recipe.patch}")
        if recipe.learning_loss and recipe.batch % 2:
            raise RecipeError(f"learning_loss compares pairs of crops: batch must be even, found {recipe.batch}")
        return wanted, recipe

    def progress(self) -> dict[str, Any]:
        """Member, step and estimated seconds left of the training that runs or ran last."""
        return read_json(self.progress_file) or {}

    def __call__(self, request: dict[str, Any], datastore: PartialLabelDatastore) -> dict[str, Any]:
        """Trains and publishes the ensemble; answers MONAI Label's statistics.

        Raises:
            HTTPException: 4xx with a sentence: bad options, no annotation yet, an unreadable image.
        """
        with speaking_errors():
            wanted, recipe = self.parse(request)
            datastore.annotations.repair({i: datastore.image_path(i) for i in datastore.list_images()})
            started = time.time()
            labels = {i: Path(datastore.get_label_uri(i, "final")) for i in datastore.get_labeled_images()}
            if not labels:
                refuse("nothing is annotated yet, so there is nothing to train on; annotate a region first", 409)
            self.plans.ensure({i: datastore.image_path(i) for i in datastore.list_images()}, labels, wanted.replan)
            wanted, recipe = self.parse({**request, "replan": False})
            wanted = self._with_round(wanted, recipe, datastore, labels)
            digest = self._digest(wanted, recipe, datastore, labels)
            cases = [self._case(i, datastore.image_path(i), path, recipe) for i, path in sorted(labels.items())]
            voxels = sum(int((case.label_xyz != UNLABELLED).sum()) for case in cases)
            if not voxels:
                refuse("the labels of this project hold no annotated voxel; annotate a region first", 409)
            self._train_members(wanted, recipe, digest, cases)
        facts = {
            "round": int(wanted.round or 0),
            "bundle": self.bundle.name,
            "members": wanted.members,
            "classes": self.classes,
            "recipe": recipe.model_dump(mode="json"),
            "spacing": self.spacing,
            "plan": self.bundle.plan.model_dump(mode="json") if self.bundle.plan else None,
        }
        self.store.publish(digest, facts)
        stats = self._stats(digest, wanted, len(cases), time.time() - started)
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

    def _digest(
        self, wanted: TrainRequest, recipe: Recipe, datastore: PartialLabelDatastore, labels: Mapping[str, Path]
    ) -> str:
        inputs = {i: (datastore.image_digest(i), file_digest(path)) for i, path in labels.items()}
        options = wanted.model_dump(mode="json"), recipe.model_dump(mode="json"), self.spacing
        return text_digest(self.bundle.fingerprint(), self.classes, options, inputs)

    def _case(self, name: str, image: Path, label: Path, recipe: Recipe) -> TrainingCase:
        volume, mask = load_image(image), load_label(label)
        check_same_grid(mask, volume.shape, volume.affine, name)
        check_values(mask.array_xyz, self.classes)
        label_xyz, wanted, grey = mask.array_xyz, self.spacing, self.bundle.normalisation
        if recipe.pseudo_labels != "none":
            label_xyz = fill_between(label_xyz, recipe.pseudo_thickness, recipe.pseudo_axis, recipe.pseudo_labels)
        image_cxyz = network_image(volume, wanted, grey)
        return TrainingCase(name, image_cxyz, network_label(label_xyz, volume.spacing, wanted))

    def _train_members(self, wanted: TrainRequest, recipe: Recipe, digest: str, cases: list[TrainingCase]) -> None:
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        present = {
            case.name: frozenset(np.unique(case.label_xyz.numpy()).tolist()) - {0, UNLABELLED}
            for case in cases
            if labelled_voxels(case.label_xyz.numpy())
        }
        rng = child_rng(wanted.seed, wanted.round, "folds")
        splits = training_splits(present, wanted.members, wanted.folds or wanted.members, rng)
        begun = time.time()
        for member, split in enumerate(splits):
            if self.store.member_path(digest, member).is_file():
                logger.info("member %d of %d is trained already", member + 1, wanted.members)
                continue
            chosen = [case for case in cases if case.name in set(split)]
            self._member(wanted, recipe, digest, member, chosen, begun)

    def _member(
        self,
        wanted: TrainRequest,
        recipe: Recipe,
        digest: str,
        member: int,
        cases: list[TrainingCase],
        begun: float,
    ) -> None:
        seed = child_seed(wanted.seed, wanted.round, "member", member)
        weights_seed, crops_seed = seed.spawn(2)
        # Networks draw their weights from torch's global generator; forking keeps the process as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(weights_seed.generate_state(1, np.uint64)[0]) >> 1)
            network = self.bundle.network(len(self.classes), recipe.dropout or None)
            taps = self.bundle.layers("loss_taps") if recipe.learning_loss else []
            head = fresh_head(network, taps, self.bundle.divisor) if recipe.learning_loss else None

        def report(progress: Progress) -> None:
            done = (member + progress.step / progress.steps) / wanted.members
            self._report(member, wanted.members, progress, (time.time() - begun) * (1 - done) / max(done, 1e-9))

        device = choose_device(self.options.device)
        weights = train_member(network, cases, recipe, crops_seed, device, report, head, taps)
        self.store.save_member(digest, member, weights, head.cpu().state_dict() if head else None)

    def _report(self, member: int, members: int, progress: Progress, seconds_left: float) -> None:
        logger.info(
            "member %d/%d step %d/%d loss %.4f, about %.0f s left",
            member + 1, members, progress.step, progress.steps, progress.loss, seconds_left,
        )  # fmt: skip
        state = {
            "member": member + 1,
            "members": members,
            "step": progress.step,
            "steps": progress.steps,
            "loss": progress.loss,
            "seconds_left": round(seconds_left, 1),
        }
        write_json(self.progress_file, state)

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
