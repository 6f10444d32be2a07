# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""From annotated images to a published ensemble: one pipeline for the server's task and for bundles on a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.models.checkpoints import Model, ModelStore
from lib.models.facts import ModelFacts
from lib.models.preprocessing import TrainingCase, network_image, network_label
from lib.models.recipe import Bundle, Recipe
from lib.partial_labels import UNLABELLED, ClasswiseLabels, LabelMap, possible_classes
from lib.pseudo_labels import fill_between
from lib.regions import Triple
from lib.storage.class_labels import load_classes
from lib.storage.volumes import Grid, load_image
from lib.training.ensemble import Job
from lib.training.structures import OnePiece, SmallestStructures


@dataclass(frozen=True)
class CaseSet:
    """The annotated images of a training, ready for the network.

    Args:
        cases: image and label of each.
        codes: codes of sets of possible classes that labels drawn class by class use.
        smallest_mm3: smallest annotated structure of every optional class, in mm^3.
        one_piece: ids of classes of one component (`OnePiece`).
    """

    cases: list[TrainingCase]
    codes: dict[int, int] = field(default_factory=dict)
    smallest_mm3: dict[str, float] = field(default_factory=dict)
    one_piece: tuple[int, ...] = ()

    @property
    def voxels(self) -> int:
        """Number of annotated voxels."""
        return sum(int((case.label_xyz != UNLABELLED).sum()) for case in self.cases)


@dataclass(frozen=True)
class Training:
    """Everything that fixes one training but its images."""

    bundle: Bundle
    """Bundle with the present plan."""
    store: ModelStore
    """Store that publishes the training."""
    classes: dict[str, int]
    """Class name -> id."""
    recipe: Recipe
    spacing: tuple[float, float, float] | None
    """Spacing in mm of the network's input; None for the spacing of each image."""
    members: int
    """Number of networks of the ensemble."""
    seed: int
    round: int
    start: tuple[str, int] | None = None
    """Digest and members of the training whose weights this one begins with; None for fresh weights."""
    ignored: frozenset[int] = frozenset()
    """Values of voxels without annotation, beside 255."""

    def build_cases(
        self,
        images: Mapping[str, Path],
        labels: Mapping[str, Path],
        classwise: Callable[[str, Triple], ClasswiseLabels | None] = lambda name, shape: None,
    ) -> CaseSet:
        """Read, check and resample the annotated images.

        Args:
            images, labels: files by image id; images without a label are left out.
            classwise: labels of an image in which only some classes were drawn; None for any other image.

        Raises:
            PatchwiseError: a file that cannot be used, in one sentence.
        """
        codes, smallest, pieces = dict[int, int](), SmallestStructures(self.classes), OnePiece(self.classes)

        def seen(mask_xyz: LabelMap, spacing: Sequence[float]) -> None:
            smallest.add(mask_xyz, spacing)
            pieces.add(mask_xyz)

        cases = [self._case(name, images[name], path, classwise, codes, seen) for name, path in sorted(labels.items())]
        return CaseSet(cases, codes, smallest.found_mm3(), pieces.found())

    def _case(
        self,
        name: str,
        image: Path,
        label: Path,
        classwise: Callable[[str, Triple], ClasswiseLabels | None],
        codes: dict[int, int],
        seen: Callable[[LabelMap, Sequence[float]], None],
    ) -> TrainingCase:
        volume, recipe = load_image(image), self.recipe
        grid = Grid(volume.shape, volume.affine, name, volume.stated)
        mask_xyz = load_classes(label, self.classes, grid, self.ignored)
        by_class = classwise(name, volume.shape)
        label_xyz = mask_xyz if by_class is None else by_class.encoded(codes)
        if by_class is None:
            # If only some classes were annotated, a missing class may still be present.
            seen(mask_xyz, volume.spacing)
        if recipe.pseudo_labels != "none":
            label_xyz = fill_between(label_xyz, recipe.pseudo_thickness, recipe.pseudo_axis, recipe.pseudo_labels)
        image_cxyz = network_image(volume, self.spacing, self.bundle.normalisation)
        return TrainingCase(name, image_cxyz, network_label(label_xyz, volume.spacing, self.spacing))

    def job(self, digest: str, splits: list[list[str]], codes: dict[int, int]) -> Job:
        """The job of the members' processes; `splits` names the images of each member."""
        plan = self.bundle.plan
        return Job(
            bundle=self.bundle.folder,
            store=self.store.folder,
            classes=len(self.classes),
            recipe=self.recipe,
            digest=digest,
            seed=self.seed,
            round=self.round,
            splits=splits,
            start=self.start,
            sets=possible_classes(codes, len(self.classes)) or None,
            plan=plan.model_dump(mode="json") if plan else None,
        )

    def publish(self, digest: str, data: CaseSet) -> Model:
        """Make the trained ensemble the current one of its bundle."""
        return self.store.publish(
            ModelFacts(
                digest=digest,
                round=self.round,
                bundle=self.bundle.name,
                members=self.members,
                classes=self.classes,
                recipe=self.recipe,
                spacing=self.spacing,
                plan=self.bundle.plan,
                start=self.start,
                smallest_mm3=data.smallest_mm3,
                one_piece=data.one_piece,
            )
        )


def training_splits(
    classes_by_case: Mapping[str, frozenset[int]], members: int, folds: int, rng: np.random.Generator
) -> list[list[str]]:
    """Training cases of each of `members` members: all but fold i modulo `folds`.

    Cases are assigned to folds class by class, the rarest class first, so that a class found in two cases or more is in
    every training split. With one fold, or fewer cases than two, every member trains on all cases. A split that would
    lose a class (which occurs in one case only) or all cases keeps all cases instead.

    Source: nnActive specification, section 7 (ensemble): folds over annotated images, rare classes spread first.
    """
    cases = sorted(classes_by_case)
    if folds < 2 or len(cases) < 2:
        return [list(cases) for _ in range(members)]
    held_out = _deal(cases, classes_by_case, folds, rng)
    everything = frozenset().union(*classes_by_case.values())
    splits = []
    for member in range(members):
        kept = [case for case in cases if held_out[case] != member % folds]
        complete = frozenset().union(*(classes_by_case[case] for case in kept)) == everything
        splits.append(kept if kept and complete else list(cases))
    return splits


def _deal(
    cases: Sequence[str], classes_by_case: Mapping[str, frozenset[int]], folds: int, rng: np.random.Generator
) -> dict[str, int]:
    """Fold of each case; folds differ in size by at most one over the cases dealt so far."""
    counts = {c: sum(c in classes_by_case[case] for case in cases) for c in set().union(*classes_by_case.values())}
    order: list[str] = []
    for label in sorted(counts, key=lambda c: (counts[c], c)):
        fresh = [case for case in cases if label in classes_by_case[case] and case not in order]
        order.extend(fresh[i] for i in rng.permutation(len(fresh)))
    rest = [case for case in cases if case not in order]
    order.extend(rest[i] for i in rng.permutation(len(rest)))
    return {case: position % folds for position, case in enumerate(order)}
