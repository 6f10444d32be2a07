# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Explanations of chosen regions: pictures and sentences of a run's last queries."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eval.files import read_json
from eval.records.state import KEPT_PICTURES


def reasons_of(folder: Path, pictures: bool, name: Callable[[str], str] = str) -> list[dict[str, Any]]:
    """Method, picture (as a data address, or None) and sentence of the last round's first regions of every cell.

    `name` returns the displayed name of an image.
    """
    found = []
    for cell in sorted((folder / "cells").glob("*")):
        steps = (read_json(cell / "state.json") or {}).get("steps", {})
        rounds = sorted(int(key.split(".")[0]) for key in steps if key.endswith(".query"))
        if not rounds or rounds[-1] == 0:
            continue
        for region in steps[f"{rounds[-1]}.query"]["regions"][:KEPT_PICTURES]:
            path = cell / "pictures" / f"{region['query']}.png"
            shown = None
            if pictures and path.is_file():
                shown = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            found.append({"cell": cell.name, "round": rounds[-1], "picture": shown, "sentence": sentence(region, name)})
    return found


def sentence(region: Mapping[str, Any], name: Callable[[str], str] = str) -> str:
    """One line about a region: rank, place, score, predicted classes, runner-up, as far as the server reported them."""
    reason = region.get("reason") or {}
    parts = [f"{name(region['image'])} at {tuple(region['start'])}, rank {reason.get('rank', '?')}"]
    if reason.get("uncertainty"):
        parts.append(f"{reason['uncertainty'].replace('_', ' ')} {region['score']:.3f}")
    for key in ("area", "stream", "class"):
        if reason.get(key) not in (None, ""):
            parts.append(f"{key} {reason[key]}")
    predicted = reason.get("predicted") or reason.get("classes") or {}
    if isinstance(predicted, Mapping) and predicted:
        parts.append("predicted " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in predicted.items()))
    runner_up = reason.get("runner_up")
    if runner_up:
        parts.append(f"next best {name(runner_up['image'])} with {runner_up['score']:.3f}")
    return "; ".join(parts)
