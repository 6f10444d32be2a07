# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Plans as YAML files: a complete one that was made, or some decisions of an administrator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lib.models.plan import Plan, PlanError, checked
from lib.storage.atomic_files import write_atomic


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan as YAML, atomically."""
    text = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, width=120, default_flow_style=None)
    write_atomic(path, lambda stream: stream.write(text.encode()))


def read_yaml(path: Path) -> dict[str, Any]:
    """Fields of a plan file, of all or of some decisions.

    Raises:
        PlanError: unreadable, or holding fields that no plan has.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"{path}: not readable as a plan ({error}); repair the file or delete it") from error
    if not isinstance(content, dict):
        raise PlanError(f"{path}: expected the fields of a plan, found {type(content).__name__}")
    unknown = sorted(map(str, set(content) - set(Plan.model_fields)))
    if unknown:
        raise PlanError(
            f"{path}: {', '.join(unknown)} is not a field of a plan; fields are {', '.join(Plan.model_fields)}"
        )
    return content


def read_plan(path: Path) -> Plan:
    """A complete plan of a YAML file.

    Raises:
        PlanError: unreadable or incomplete.
    """
    return checked(read_yaml(path), path)
