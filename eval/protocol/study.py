# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A study: which data, methods, seeds and recipe; the validated form of STUDY.yaml."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from eval.errors import RefereeError
from eval.metrics.cost import MINUTES
from eval.protocol.annotator_profiles import Oracle
from eval.protocol.dataset import Case, Dataset
from eval.protocol.dataset import split_by_hash as hash_split

AUTO = "auto"  # the bundle that the server takes for the pool
FULL_DATA = "full_data"  # the cell that learns from every label of the pool


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(_Part):
    """One query method with its own options, and the name it has in tables."""

    name: str
    label: str = ""
    options: dict[str, Any] = {}
    score: bool | None = None
    queries_from: tuple[Path, str] | None = Field(default=None, description="replay (folder of a run, method) instead")

    @model_validator(mode="after")
    def _labelled(self) -> Method:
        if not self.label:
            object.__setattr__(self, "label", self.name)
        if not self.label.replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise ValueError(f"method label {self.label!r} may hold letters, digits, '_', '-' and '.' only")
        return self


def _method(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _oracle(value: Any) -> Any:
    return {"profile": value} if isinstance(value, str) else value


class Split(_Part):
    """Test cases by hash of their ids (`test_fraction`), or by name (`test`, and optionally `pool`)."""

    test_fraction: float | None = Field(default=None, gt=0, lt=1)
    test: tuple[str, ...] = ()
    pool: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=2, description="use only this many cases, by hash of their ids")

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        if (self.test_fraction is None) == (not self.test):
            raise ValueError("split needs either test_fraction or a list of test cases")
        return self


class StartingBudget(_Part):
    """Selection of round 0; the same for every method of a seed."""

    method: str = "starting_budget"
    batch: int = Field(ge=1)
    options: dict[str, Any] = {}


class Minutes(_Part):
    """Linear model of annotation time: region + slice * slices with foreground + mm * border drawn.

    `recorded` takes the times of the server's ledger instead, for studies that people answer.
    """

    region: float = Field(default=MINUTES["region"], ge=0)
    slice: float = Field(default=MINUTES["slice"], ge=0)
    mm: float = Field(default=MINUTES["mm"], ge=0)
    recorded: bool = False


class Expected(_Part):
    """Assumptions of `--dry-run`; they change nothing else. Measured on two CPU cores."""

    step_seconds: float = Field(default=0.6, gt=0, description="an optimiser step of one member")
    case_seconds: float = Field(default=0.2, gt=0, description="inference of one case by one member")


class Server(_Part):
    """Start of servers: `--conf` pairs and environment, in addition to the study's own settings."""

    conf: dict[str, Any] = {}
    env: dict[str, str] = {}
    start_seconds: float = Field(default=180, gt=0)


class Study(_Part):
    """Study that `python -m eval run` replays; see `eval/studies`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    about: str = ""
    data: Path
    split: Split
    bundle: str = AUTO
    unit: Literal["patch", "slice", "volume"] = "patch"
    size: tuple[int, int, int] | None = None
    starting_budget: StartingBudget | None = None
    rounds: int = Field(ge=1, description="trainings: the starting budget's and one after every query")
    batch: int = Field(default=1, ge=1, description="regions per round")
    methods: tuple[Annotated[Method, BeforeValidator(_method)], ...]
    full_data: bool = Field(default=False, description="also train once on every label of the pool, for each seed")
    seeds: tuple[int, ...] = Field(min_length=1)
    train: dict[str, Any] = {}
    score: dict[str, Any] = {}
    uncertainty: str = "predictive_entropy"
    query: dict[str, Any] = {}
    surface_tolerance: float = Field(default=1.0, ge=0, description="mm that the surface Dice forgives")
    slice_axis: Literal[0, 1, 2] = Field(default=2, description="axis of the slices of 2D Dice and slice costs")
    minutes: Minutes = Minutes()
    hints_per_class: int = Field(default=8, ge=1)
    oracle: Annotated[Oracle, BeforeValidator(_oracle)] = Oracle()
    published: str = Field(default="", description="paper/dataset/regime of eval/published that this repeats")
    factors: dict[str, tuple[str, ...]] = Field(default={}, description="factors of the methods: name to labels")
    expected: Expected = Expected()
    server: Server = Server()

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        labels = [method.label for method in self.methods]
        if len(set(labels)) != len(labels):
            raise ValueError(f"methods {labels} share a name; give each its own label")
        if FULL_DATA in labels:
            raise ValueError(f"{FULL_DATA} is the name of the full-data line; give the method another label")
        if not labels and not self.full_data:
            raise ValueError("a study needs methods, or full_data: true")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds {list(self.seeds)} must be different and not negative")
        if labels and (self.starting_budget is None or "batch" not in self.model_fields_set):
            raise ValueError("methods need a starting_budget and a batch; add both")
        unknown = sorted({m for methods in self.factors.values() for m in methods} - set(labels))
        if unknown:
            raise ValueError(f"factors name {unknown[0]}, which is not a method of the study; its methods are {labels}")
        if labels and self.unit == "patch" and (self.size is None or min(self.size) < 1):
            raise ValueError("unit patch needs size: three whole numbers of voxels")
        return self

    @property
    def lines(self) -> tuple[tuple[Method, int], ...]:
        """Every curve of the study with its number of trainings; the full-data line comes last and has one."""
        full = ((Method(name=FULL_DATA), 1),) if self.full_data else ()
        return (*((method, self.rounds) for method in self.methods), *full)


def load_study(path: Path) -> Study:
    """Read and validate a file with one study; `data` is resolved against DATA, the file's folder, then the cwd.

    Raises:
        RefereeError: missing file, broken YAML, unknown or unusable entries, each in one sentence.
    """
    return read_study(read_yaml(path), path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The entries of a study's file.

    Raises:
        RefereeError: missing file, broken YAML, or no entries.
    """
    if not path.is_file():
        raise RefereeError(f"study {path} does not exist; ready-made ones are in eval/studies")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RefereeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RefereeError(f"{path} must hold `name: value` entries, found {type(content).__name__}")
    return content


def read_study(content: dict[str, Any], path: Path) -> Study:
    """Validate the entries of a study that `path` holds.

    Raises:
        RefereeError: unknown or unusable entries, each in one sentence.
    """
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise RefereeError("; ".join(_sentence(path, problem) for problem in error.errors())) from error
    return study.model_copy(update={"data": _data_folder(study.data, path)})


def save_study(study: Study) -> str:
    """The resolved study as YAML; `load_study` reads it back."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def split_cases(study: Study, dataset: Dataset) -> tuple[list[Case], list[Case]]:
    """(pool, test) cases of the study.

    Raises:
        RefereeError: a listed case that the dataset does not hold.
    """
    by_id = {case.id: case for case in dataset.cases}
    ids = list(by_id)
    for case_id in (*study.split.test, *study.split.pool):
        if case_id not in by_id:
            near = difflib.get_close_matches(case_id, ids, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RefereeError(f"split names case {case_id}, which {dataset.root} does not hold{hint}")
    if study.split.limit is not None and study.split.limit < len(ids):
        ids = hash_split(ids, study.split.limit / len(ids))[1]
    if study.split.test_fraction is not None:
        pool, test = hash_split(ids, study.split.test_fraction)
    else:
        test = sorted(study.split.test)
        pool = sorted(study.split.pool or set(ids) - set(test))
    return [by_id[i] for i in pool], [by_id[i] for i in test]


def _data_folder(data: Path, study_path: Path) -> Path:
    override = os.environ.get("DATA")
    if override:
        inside = Path(override) / data.name  # a grid has many datasets, so DATA may hold them all
        return (inside if data.name and inside.is_dir() else Path(override)).resolve()
    project = Path(__file__).resolve().parents[2]
    for base in (study_path.resolve().parent, Path.cwd(), project):
        if (base / data).is_dir():
            return (base / data).resolve()
    return (Path.cwd() / data).resolve()


def _sentence(path: Path, problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "study"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), Study.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known ones are {', '.join(Study.model_fields)}"
        return f"{path.name}: {where} is not an entry of a study; {hint}"
    if problem["type"] == "missing":
        return f"{path.name}: {where} is missing; add it"
    return f"{path.name}: {where}: {problem['msg'].removeprefix('Value error, ')}, found {problem['input']!r}"
