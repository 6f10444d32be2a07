# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`python -m eval configurations DIR`: train each kind of network shortly, compare them out of fold, recommend one."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.app_path import add_app
from eval.app_tools.planning.show_plan import BUNDLES, files_of
from eval.errors import RefereeError
from eval.metrics.segmentation import dice

if TYPE_CHECKING:
    from lib.models.preprocessing import TrainingCase
    from lib.models.recipe import Bundle
    from lib.planning.fingerprint import Fingerprint
    from lib.planning.planner import Budget
    from lib.training.pipeline import CaseSet

# Configurations whose Dice is this close to the best are equal; the one that trains faster is recommended.
EQUAL = 0.01
# Share of the quick recipe's steps in a comparison.
SHORT = 0.25


@dataclass(frozen=True)
class Score:
    """One configuration out of fold: mean Dice over classes, Dice by class name, seconds of training and steps."""

    bundle: str
    dice: float
    by_class: dict[str, float]
    seconds: float
    steps: int


@dataclass(frozen=True)
class Comparison:
    """Inputs that are the same for every configuration."""

    images: Mapping[str, Path]
    labels: Mapping[str, Path]
    classes: Mapping[str, int]
    ignored: frozenset[int]
    pool: Fingerprint
    budget: Budget
    folds: tuple[tuple[str, ...], ...]
    steps: int | None
    seed: int


def configurations_text(
    folder: Path,
    device: str = "cpu",
    memory: float | None = None,
    folds: int = 2,
    steps: int | None = None,
    subject: str | None = None,
    seed: int = 0,
    notice: Callable[[str], None] = lambda text: None,
) -> str:
    """Table of the configurations with their Dice out of fold, and a recommendation.

    Each configuration is trained on all but one fold of the annotated images and segments the images of that fold.
    Dice counts annotated voxels only. Configurations within 0.01 of the best are equal, and the fastest of them is
    recommended.

    Args:
        folder: decathlon-style, or a studies folder of the server.
        steps: of each training; default: a quarter of the quick recipe.
        subject: regular expression whose first group is the subject of an image id. Images of one subject stay in one
            fold. Default: every image is a subject.

    Raises:
        RefereeError: no such folder, fewer than two annotated subjects, an unusable pattern or label.
    """
    add_app()
    from lib.errors import PatchwiseError

    if not folder.is_dir():
        raise RefereeError(f"{folder}: no such folder; give a decathlon-style folder or a studies folder")
    try:
        inputs = _inputs(folder, device, memory, folds, steps, subject, seed)
        scores = []
        for name in _candidates(inputs.pool):
            notice(f"training {name}")
            scores.append(_score(inputs, name))
    except (PatchwiseError, ValueError) as error:
        raise RefereeError(str(error)) from error
    return _table(scores, inputs)


def recommended(scores: Sequence[Score]) -> Score:
    """The fastest of the scores within `EQUAL` of the best Dice."""
    best = max(score.dice for score in scores)
    return min((s for s in scores if s.dice >= best - EQUAL), key=lambda s: s.seconds)


def deal(ids: Sequence[str], folds: int, subject: str | None, seed: int) -> tuple[tuple[str, ...], ...]:
    """Folds of images, each subject in one of them, as even as subjects allow.

    Raises:
        RefereeError: fewer subjects than folds, or a pattern that is not usable or misses an id.
    """
    by_subject: dict[str, list[str]] = {}
    for name in sorted(ids):
        by_subject.setdefault(_subject(name, subject), []).append(name)
    if folds < 2 or len(by_subject) < folds:
        raise RefereeError(
            f"{len(by_subject)} annotated subjects for {folds} folds; annotate more images, or use --folds 2 or more"
        )
    order = np.random.default_rng(seed).permutation(sorted(by_subject))
    return tuple(tuple(n for s in order[fold::folds] for n in by_subject[str(s)]) for fold in range(folds))


def _subject(name: str, pattern: str | None) -> str:
    if pattern is None:
        return name
    try:
        found = re.match(pattern, name)
        return str(found[1]) if found else _unmatched(name, pattern)
    except (re.error, IndexError) as error:
        raise RefereeError(f"--subject {pattern!r} must be a regular expression with a group: {error}") from error


def _unmatched(name: str, pattern: str) -> str:
    raise RefereeError(f"--subject {pattern!r} does not match the image id {name!r}; change it so that it matches all")


def _inputs(
    folder: Path, device: str, memory: float | None, folds: int, steps: int | None, subject: str | None, seed: int
) -> Comparison:
    from lib.models.class_names import resolve_classes, unlabelled_values
    from lib.planning.fingerprint_reader import declared_modality, take_fingerprint
    from lib.planning.memory_budget import measure_budget

    images, labels, _ = files_of(folder)
    labels = {name: path for name, path in labels.items() if name in images}
    dealt = deal(list(labels), folds, subject, seed)
    ignored = unlabelled_values(folder)
    pool = take_fingerprint(images, labels, declared_modality(folder), ignored)
    classes = resolve_classes(None, folder, {})
    return Comparison(images, labels, classes, ignored, pool, measure_budget(device, memory), dealt, steps, seed)


def _candidates(pool: Fingerprint) -> list[str]:
    """Bundles worth a comparison: the anisotropic one only for slices that are thick enough."""
    from lib.planning.bundle_choice import BUNDLE_OF
    from lib.planning.resolution import ANISOTROPIC

    spacing = pool.median_spacing()
    thick = max(spacing) >= ANISOTROPIC * min(spacing)
    return [name for kind, name in BUNDLE_OF.items() if thick or kind != "3d_anisotropic"]


def _score(inputs: Comparison, name: str) -> Score:
    from lib.models.recipe import Bundle
    from lib.planning.planner import make_plan, names_sides

    bundle, outputs = Bundle(BUNDLES / name), len(inputs.classes) + 1
    plan = make_plan(inputs.pool, inputs.budget, bundle.configuration, outputs, sided=names_sides(inputs.classes))
    bundle = bundle.planned(plan)
    quick = bundle.recipe({"recipe": "quick"}).steps
    steps = inputs.steps or max(1, round(SHORT * quick))
    found: dict[str, list[float]] = {name: [] for name in inputs.classes}
    seconds = 0.0
    for held_out in inputs.folds:
        began = time.monotonic()
        predict = _trained(inputs, bundle, steps, [n for n in sorted(inputs.labels) if n not in held_out])
        seconds += time.monotonic() - began
        for measured in _measured(inputs, predict, held_out):
            for class_, value in measured.items():
                found[class_].append(value)
    by_class = {class_: float(np.nanmean(v)) if np.isfinite(v).any() else float("nan") for class_, v in found.items()}
    return Score(name, float(np.nanmean(list(by_class.values()))), by_class, seconds, steps)


def _trained(inputs: Comparison, bundle: Bundle, steps: int, names: Sequence[str]) -> Callable[[Any], Any]:
    """Train one network on `names`; return the function that segments a volume."""
    import torch

    from lib.models.checkpoints import ModelStore, choose_device
    from lib.prediction.posterior import Ensemble
    from lib.prediction.segmentation import segment
    from lib.training.pipeline import Training
    from lib.training.trainer import train_member

    assert bundle.plan is not None
    device = choose_device(inputs.budget.device)
    recipe = bundle.recipe({"recipe": "quick", "steps": steps})
    with tempfile.TemporaryDirectory() as folder:
        training = Training(
            bundle, ModelStore(Path(folder), bundle.name), dict(inputs.classes), recipe, bundle.plan.spacing, 1,
            inputs.seed, 0, ignored=inputs.ignored,
        )  # fmt: skip
        data: CaseSet = training.build_cases(inputs.images, {name: inputs.labels[name] for name in names})
    cases: list[TrainingCase] = data.cases
    torch.manual_seed(inputs.seed)
    network = bundle.network(len(inputs.classes), None, recipe.deep_supervision)
    train_member(network, cases, recipe, np.random.SeedSequence(inputs.seed), device)
    ensemble = Ensemble(
        [network],
        recipe.patch,
        bundle.divisor,
        bundle.plan.spacing,
        device,
        normalisation=bundle.normalisation,
        mirrored=recipe.mirror if recipe.mirror_predictions else (),
        precision=recipe.precision,
        shifts=recipe.shifts,
        single=data.one_piece,
    )
    return lambda volume: segment(ensemble, volume, len(inputs.classes) + 1, Path(tempfile.gettempdir()))


def _measured(inputs: Comparison, predict: Callable[[Any], Any], names: Sequence[str]) -> Iterator[dict[str, float]]:
    """Dice by class of every image, over its annotated voxels; NaN for a class in neither."""
    from lib.partial_labels import UNLABELLED
    from lib.storage.class_labels import load_classes
    from lib.storage.volumes import Grid, load_image

    for name in names:
        volume = load_image(inputs.images[name])
        grid = Grid(volume.shape, volume.affine, name, volume.stated)
        truth_xyz = load_classes(inputs.labels[name], dict(inputs.classes), grid, inputs.ignored)
        known = truth_xyz != UNLABELLED
        label_xyz = predict(volume)
        yield {c: dice(label_xyz[known] == v, truth_xyz[known] == v) for c, v in inputs.classes.items()}


def _table(scores: Sequence[Score], inputs: Comparison) -> str:
    heads = ("bundle", "Dice", *inputs.classes, "steps", "seconds")
    rows = [
        (s.bundle, f"{s.dice:.3f}", *(f"{s.by_class[c]:.3f}" for c in inputs.classes), str(s.steps), f"{s.seconds:.0f}")
        for s in scores
    ]
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)
    ]
    best = recommended(scores)
    others = ", ".join(f"{s.dice:.3f}" for s in scores if s is not best)
    images = len(inputs.labels)
    lines += [
        "",
        f"{images} annotated images in {len(inputs.folds)} folds; no network segmented images it was trained on.",
        f"recommended: --conf models {best.bundle} (Dice {best.dice:.3f} out of fold, the others {others}; "
        f"the fastest of those within {EQUAL:g})",
    ]
    return "\n".join(lines)
