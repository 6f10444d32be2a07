# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The full-data line: the same recipe trained once on every label of the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.runner.cell import Cell
from eval.runner.client import LabelClient


class FullDataCell(Cell):
    """One round without queries: every pool label is uploaded whole, then trained on and measured."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rounds = 1

    def _query(self, client: LabelClient, round_: int) -> dict[str, Any]:
        """Every pool image as one region, without a query to the server."""
        regions = []
        for case in self.material.pool:
            label_xyz = self._truth(case.id).label_xyz
            region = {"image": case.id, "start": [0, 0, 0], "size": list(label_xyz.shape), "unit": "volume"}
            regions.append({**region, "query": None, "score": None, **self._inside(region)})
        return {"regions": regions}

    def _addressed(self, regions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"whole": True}
