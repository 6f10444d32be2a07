# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Explanations of queries: the server's reasons and pictures, kept by the cells and shown in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.files import write_bytes
from eval.records.state import KEPT_PICTURES
from eval.runner.client import LabelClient


def keep_pictures(client: LabelClient, regions: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Download the pictures of a round's first regions into `folder`, if the server has any."""
    for region in regions[:KEPT_PICTURES]:
        picture = client.picture(int(region["query"]))
        if picture is not None:
            write_bytes(folder / f"{region['query']}.png", picture)
