# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Options of the app (`--conf NAME VALUE`): one validated model, listed by /info and the app's README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lib.errors import PatchwiseError, listed_problems


def _names(value: Any) -> Any:
    """Accept 'a,b', a JSON list or a list."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    return json.loads(text) if text.startswith("[") else [v.strip() for v in text.split(",") if v.strip()]


def _numbers(value: Any) -> Any:
    """Accept '20,20,20', '20x20x20' or a JSON list."""
    return _names(value.replace("x", ",")) if isinstance(value, str) else value


def _classes(value: Any) -> Any:
    """Accept a JSON object {name: id}, or names in the order of their ids 1, 2, ..."""
    if isinstance(value, str) and value.strip().startswith("{"):
        value = json.loads(value)
    if isinstance(value, dict):
        return {str(k): v for k, v in value.items()}
    names = _names(value)
    if not isinstance(names, list):
        return names
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ValueError(f"class {twice!r} is named twice, expected each name once; remove one")
    return {name: i for i, name in enumerate(names, start=1)}


def _object(value: Any) -> Any:
    """Accept a JSON object."""
    return json.loads(value) if isinstance(value, str) and value.strip().startswith("{") else value


_Origin = Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9_.\-]+(:\d{1,5})?$")]
_Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$")]


class OptionError(PatchwiseError, ValueError):
    """An option of the app that cannot be used; one sentence an option."""


class AppOptions(BaseModel):
    """Options of `--conf`; any other option is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Annotated[list[str], BeforeValidator(_names)] = Field(
        default=["auto"],
        min_length=1,
        description="network recipes (folders of `bundles`) to load; 'auto' takes the one that suits the images",
    )
    bundles: Path | None = Field(default=None, description="folder of the bundles; default: `bundles` of this project")
    labels: Annotated[dict[str, int] | None, BeforeValidator(_classes)] = Field(
        default=None, description="class names: 'a,b,c' for ids 1, 2, 3 or a JSON object; default: dataset.json"
    )
    spacing: Annotated[list[float] | None, BeforeValidator(_numbers)] = Field(
        default=None, min_length=3, max_length=3, description="spacing in mm the network works at; default: the pool's"
    )
    plan: str = Field(
        default="auto",
        min_length=1,
        description="'auto' plans from the pool, 'bundle' does not, or a YAML file of a plan",
    )
    memory: float | None = Field(
        default=None, gt=0, le=100_000, description="memory of a training step in GiB, for the plan; default: measured"
    )
    methods: Annotated[list[str] | None, BeforeValidator(_names)] = Field(
        default=None, description="query methods that clients list: 'all' or names; every method works by name"
    )
    members: int = Field(default=5, ge=1, le=50, description="ensemble members per training")
    batch: int = Field(default=20, ge=1, le=10_000, description="regions per batch for single-region requests")
    size: Annotated[list[int], BeforeValidator(_numbers)] = Field(
        default=[32, 32, 32], min_length=3, max_length=3, description="patch in voxels if a request has none"
    )
    lease_minutes: float = Field(default=60, gt=0, le=100_000, description="minutes for which a client holds a region")
    double_share: float = Field(
        default=0,
        ge=0,
        le=1,
        description="share of the regions with a second reading, to measure inter-rater agreement",
    )
    idle_minutes: float = Field(
        default=5, gt=0, le=1000, description="longest time between two requests of a client that counts as work"
    )
    forwarded_header: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9-]+$",
        description="header in which a trusted proxy sends a client's address, e.g. X-Forwarded-For; default: none",
    )
    upload_mib: int = Field(
        default=2048, ge=1, le=1_000_000, description="limit of an upload and of an unpacked ZIP archive in MiB"
    )
    origins: Annotated[list[_Origin], BeforeValidator(_names)] = Field(
        default=[],
        description="origins of other web pages that may use the server, e.g. https://ohif.example.org; default: none",
    )
    hosts: Annotated[list[_Host], BeforeValidator(_names)] = Field(
        default=[], description="additional names of the server, beside localhost, its addresses and the machine's name"
    )
    body_idle_seconds: float = Field(
        default=30, ge=0.1, le=3600, description="longest pause of a client that sends a request or reads a response"
    )
    body_seconds: float = Field(default=3600, ge=1, le=100_000, description="longest time of receiving a request")
    state: Path | None = Field(
        default=None,
        description="folder for copies and all state if --studies is a DICOMweb server; default: in the user's cache",
    )
    poll_seconds: float = Field(default=3, ge=0.5, le=3600, description="time between two queries of a DICOMweb server")
    store_segmentations: bool = Field(
        default=True, description="store saved labels on the DICOMweb server too, as DICOM segmentations"
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="device of the networks")
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads of a training; 0 leaves it to torch")
    workers: int = Field(
        default=0, ge=0, le=64, description="members trained side by side on a device; 0: one per CPU thread, 4 per GPU"
    )
    keep_moments: int = Field(default=1, ge=1, le=1000, description="rounds for which cached moments stay on disk")
    auto_score: bool = Field(
        default=True,
        description="whether the pool is scored by itself after a training, and new images when a query meets them",
    )
    auto_rounds: bool = Field(
        default=False, description="whether an answered batch starts training, scoring and the choice of the next batch"
    )
    auto_method: str | None = Field(
        default=None, description="query method of the batches that auto_rounds chooses; default: the first one listed"
    )
    auto_train: Annotated[dict[str, Any], BeforeValidator(_object)] = Field(
        default={}, description="request of auto_rounds for a training, a JSON object as for POST /train/{bundle}"
    )
    budget_minutes: float | None = Field(
        default=None, gt=0, description="annotation budget in minutes; the progress page shows the used share"
    )
    stop_gain: float = Field(
        default=0.005, gt=0, lt=1, description="least gain in Dice for which another batch is recommended"
    )
    stop_batches: int = Field(
        default=3, ge=2, le=1000, description="batches that must be measured before the page advises to stop"
    )


# Keys that MONAI Label itself adds to an app's configuration.
_UPSTREAM_KEYS = frozenset({"server_mode", "use_pretrained_model", "auto_update_scoring"})


def parse_options(conf: dict[str, Any]) -> AppOptions:
    """Validated options from `--conf` pairs.

    Raises:
        OptionError: unknown options and unusable values, all of them in one message.
    """
    given = {k: v for k, v in conf.items() if k not in _UPSTREAM_KEYS}
    try:
        return AppOptions.model_validate(given)
    except json.JSONDecodeError as error:
        raise OptionError(f"--conf holds JSON that cannot be read: {error}") from error
    except ValidationError as error:
        raise OptionError("; ".join(_sentence(problem) for problem in error.errors())) from error


def describe_options(options: AppOptions) -> dict[str, dict[str, Any]]:
    """Every option with its value and meaning, as /info lists it."""
    values = options.model_dump(mode="json")
    return {
        name: {"value": values[name], "description": field.description or ""}
        for name, field in AppOptions.model_fields.items()
    }


def problems(error: ValidationError) -> str:
    """Problems found by a pydantic model, as one line: field, expected value, found value."""
    return listed_problems(error.errors())


def _sentence(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"]) or "conf"
    if problem["type"] == "extra_forbidden":
        known = ", ".join(AppOptions.model_fields)
        return f"--conf {name} is not an option of this app; known options are {known}"
    return f"--conf {name}: {problem['msg']}, found {problem['input']!r}"
