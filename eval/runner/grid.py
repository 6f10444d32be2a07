# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A grid of studies: datasets x regimes x options in one file, every point of it a study with methods and seeds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from eval.errors import RefereeError
from eval.protocol.cell_filter import filtered_cells
from eval.protocol.dataset import Case, read_dataset
from eval.protocol.study import FULL_DATA, Expected, Method, Study, read_study, read_yaml, split_cases
from eval.records.tables import read_table

AXES = ("datasets", "regimes", "options")
# An optimiser step and the inference of a case on two CPU cores, measured; a study may state its own.
_CHECKPOINT_MB = 25.0
_SCORE_SHARE = 0.2


def load_grid(path: Path) -> list[Study]:
    """The studies of a file: one without axes, else one for every dataset, regime and option.

    An axis maps names to entries of a study, which replace those of the file; entries that are maps are merged. A
    dataset may have its own `regimes`, for its own budgets. `{dataset}` and `{regime}` in a text are replaced by the
    names. The name of a study of a grid consists of the file and its point: `nnactive_acdc_low`.

    Raises:
        RefereeError: missing file, broken YAML, an axis without entries, unusable entries.
    """
    content = read_yaml(path)
    studies = [read_study(point, path) for point in _points(content, path)]
    names = [study.name for study in studies]
    if len(set(names)) != len(names):
        raise RefereeError(f"{path}: two points of the grid are called {_twice(names)}; rename one")
    return studies


def forecast(study: Study, only: Collection[str] | None = None) -> dict[str, float]:
    """Expected hours (all cells or `only` some, by name; one after another), and GB of disk; NaN without the data.

    hours = trainings * members * steps * seconds per step, a fifth more for scoring and querying, and the test cases.
    The methods of a seed share the training of round 0.
    disk = moments of the pool (classes + 2 maps of 4 bytes per voxel), checkpoints of every round and answers.
    """
    members, steps = _sizes_of_training(study)
    lengths = {f"{m.label}_s{seed}": rounds for seed in study.seeds for m, rounds in study.lines}
    kept = [rounds for name, rounds in lengths.items() if only is None or name in only]
    tested, cells = sum(kept), len(kept)
    starting = [seed for seed in study.seeds for m in study.methods if only is None or f"{m.label}_s{seed}" in only]
    trainings = tested - (len(starting) - len(set(starting)))
    try:
        dataset = read_dataset(study.data)
        pool, test = split_cases(study, dataset)
    except RefereeError:
        return {"hours": float("nan"), "gb": float("nan"), "cells": cells}
    voxels = sum(_voxels(case) for case in pool)
    training = trainings * members * steps * study.expected.step_seconds * (1 + _SCORE_SHARE)
    testing = tested * members * len(test) * study.expected.case_seconds
    disk = cells * (voxels * (4 * (len(dataset.labels) + 2) + 1) + study.rounds * members * _CHECKPOINT_MB * 1e6)
    return {"hours": (training + testing) / 3600, "gb": disk / 1e9, "cells": cells}


def _voxels(case: Case) -> float:
    """Size of a scan, from its header alone."""
    return float(np.prod(nib.load(case.image).shape[:3], dtype=np.float64))  # type: ignore[attr-defined]


def _points(content: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    plain = {key: value for key, value in content.items() if key not in AXES}
    for dataset, of_dataset in _axis(content, "datasets", path):
        regimes = of_dataset.pop("regimes", content.get("regimes"))
        for regime, of_regime in _axis({"regimes": regimes} if regimes else {}, "regimes", path):
            for option, of_option in _axis(content, "options", path):
                name = "_".join(filter(None, [str(plain.get("name", "")), dataset, regime, option]))
                point = _merged(_merged(_merged(plain, of_dataset), of_regime), of_option)
                yield {**_filled(point, {"{dataset}": dataset, "{regime}": regime}), "name": name}


def _axis(content: Mapping[str, Any], axis: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Names and entries of an axis; one nameless point where the file has none."""
    if axis not in content:
        return [("", {})]
    entries = content[axis]
    if not isinstance(entries, dict) or not entries or not all(isinstance(e, dict) for e in entries.values()):
        raise RefereeError(f"{path.name}: {axis} must map names to entries of a study, found {entries!r}")
    return [(str(name), dict(entry)) for name, entry in entries.items()]


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _filled(value: Any, names: Mapping[str, str]) -> Any:
    """The same entries with `{dataset}` and `{regime}` in their texts replaced by the point's names."""
    if isinstance(value, Mapping):
        return {key: _filled(entry, names) for key, entry in value.items()}
    if isinstance(value, list):
        return [_filled(entry, names) for entry in value]
    if isinstance(value, str):
        for placeholder, name in names.items():
            value = value.replace(placeholder, name)
    return value


def _twice(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def calibrated(study: Study, run: Path) -> Study:
    """The study with the seconds per step and per case of a finished run on this machine.

    Seconds per step = training seconds / (trainings * members * steps of that run), likewise per tested case. The run
    must have the same bundle and crops.

    Raises:
        RefereeError: no run, no finished round, or a run of another bundle or crop.
    """
    if not (run / "study.yaml").is_file():
        raise RefereeError(f"{run} holds no study.yaml, so no run to calibrate with; name a run's folder")
    rounds = read_table(run, "rounds")
    then = read_study(read_yaml(run / "study.yaml"), run / "study.yaml")
    for what, mine, other in (
        ("bundle", study.bundle, then.bundle),
        ("crop", study.train.get("patch"), then.train.get("patch")),
        ("recipe", study.train.get("recipe"), then.train.get("recipe")),
    ):
        if mine != other:
            raise RefereeError(f"{run} trained with {what} {other}, {study.name} with {mine}; calibrate with its like")
    members, steps = _sizes_of_training(then)
    tested = read_table(run, "cases")["case"].nunique()
    seconds = Expected(
        step_seconds=float(rounds["train_s"].mean()) / (members * steps),
        case_seconds=float(rounds["test_s"].mean()) / (members * tested),
    )
    return study.model_copy(update={"expected": seconds})


def _sizes_of_training(study: Study) -> tuple[int, int]:
    """(members, steps of each), as the app sets them where a study does not."""
    return int(study.train.get("members", 5)), int(study.train.get("steps", 1000))


def plan(study: Study, only: Collection[str] | None = None) -> list[str]:
    """One line per cell, for `--dry-run`; `only` some, by name."""
    return [
        f"{m.label} seed {seed}: {_asked(study, m)}"
        for seed in study.seeds
        for m, _ in study.lines
        if only is None or f"{m.label}_s{seed}" in only
    ]


def _asked(study: Study, method: Method) -> str:
    """Text about the number and the size of the queries of a method's cell."""
    if method.label == FULL_DATA:
        return "1 round, every label of the pool"
    start = study.starting_budget.batch if study.starting_budget else 0
    batch = int({**study.query, **method.options}.get("batch", study.batch))
    per_round = [start] + [batch] * (study.rounds - 1)
    return f"{study.rounds} rounds, {sum(per_round)} regions ({' + '.join(map(str, per_round))})"


def plan_grid(studies: list[Study], only: str | None = None, calibration: Path | None = None) -> list[str]:
    """Every cell of every study, each study with its expected hours and disk, and the sum.

    `only` is the filter of `run`, `calibration` a finished run that provides the seconds.
    """
    lines, hours, gigabytes = [], 0.0, 0.0
    for given in studies:
        study = given if calibration is None else calibrated(given, calibration)
        kept = None if only is None else filtered_cells(only, study)
        expected = forecast(study, kept)
        hours, gigabytes = hours + expected["hours"], gigabytes + expected["gb"]
        lines += [f"{study.name}: data {study.data}", *plan(study, kept), f"expected: {_sizes(expected)}"]
        lines.append(
            f"at {study.expected.step_seconds:.3g} s per step and {study.expected.case_seconds:.3g} s per case"
        )
    if len(studies) > 1:
        lines.append(f"in all: {len(studies)} studies, {_sizes({'hours': hours, 'gb': gigabytes})}")
    return lines


def _sizes(expected: Mapping[str, float]) -> str:
    if np.isnan(expected["hours"]):
        return "hours and disk unknown, the data is not there"
    return f"{expected['hours']:.1f} hours one cell at a time, {expected['gb']:.1f} GB of disk"
