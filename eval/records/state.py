# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`state.json` of a trial: the results of its finished steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.files import read_json, write_json

STEPS = ("score", "query", "annotate", "train", "test")
# Regions of a round whose pictures are fetched, and shown in the report.
KEPT_PICTURES = 4


class State:
    """Results of finished steps, by round and step; written whole and atomically after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = read_json(path) or {"sessions": {}, "steps": {}}

    def get(self, round_: int, step: str) -> dict[str, Any] | None:
        """Result of a step, or None if it was not finished."""
        found: dict[str, Any] | None = self.content["steps"].get(f"{round_}.{step}")
        return found

    def put(self, round_: int, step: str, result: Mapping[str, Any]) -> None:
        """Record a finished step."""
        self.content["steps"][f"{round_}.{step}"] = dict(result)
        self.save()

    def save(self) -> None:
        """Write the present state."""
        write_json(self.path, self.content)
