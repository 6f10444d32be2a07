# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Which cells of a study a filter such as `seed=1,method=power_pe` keeps."""

from __future__ import annotations

from eval.errors import RefereeError
from eval.protocol.study import Study

_KEYS = ("method", "seed")


def filtered_cells(text: str, study: Study) -> frozenset[str]:
    """Names (`method_sSEED`) of the cells that a filter such as `seed=1,method=power_pe` keeps.

    Values of one key are alternatives, keys must all hold: `seed=1,seed=2,method=random` are two cells.

    Raises:
        RefereeError: another key, or a method or seed that the study does not have.
    """
    wanted: dict[str, set[str]] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in _KEYS or not value:
            raise RefereeError(f"--only takes method=NAME and seed=NUMBER, separated by commas, found {part!r}")
        wanted.setdefault(key, set()).add(value)
    there = {"method": [m.label for m, _ in study.lines], "seed": [str(seed) for seed in study.seeds]}
    for key, values in wanted.items():
        unknown = sorted(values - set(there[key]))
        if unknown:
            raise RefereeError(f"--only names {key} {unknown[0]}, but {study.name} has {', '.join(there[key])}")
    return frozenset(
        f"{method}_s{seed}"
        for method in there["method"]
        for seed in there["seed"]
        if method in wanted.get("method", {method}) and seed in wanted.get("seed", {seed})
    )
