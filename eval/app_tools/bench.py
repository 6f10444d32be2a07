# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`python -m eval bench`: rows as they are measured, and a file of them with versions and hardware."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.errors import RefereeError
from eval.files import write_json
from eval.protocol.manifest import describe_run, now


def bench(name: str, target: str | None, cases: int, seed: int) -> None:
    """Run a benchmark, or `fuzz`; `target` is a file, '-' for stdout, or None for text.

    A file is written after every row, with `finished` null until the last one: an interrupted run keeps its rows.

    Raises:
        RefereeError: no such benchmark, a requirement is missing, or a fuzzed case failed.
    """
    from eval.benchmarks import BENCHMARKS

    if name == "fuzz":
        _fuzz(target, cases, seed)
        return
    if name not in BENCHMARKS:
        raise RefereeError(f"no benchmark {name}; there are {', '.join(sorted([*BENCHMARKS, 'fuzz']))}")
    found: dict[str, Any] = {**describe_run(), "finished": None, "rows": []}
    rows = tqdm(BENCHMARKS[name](), desc=f"bench {name}", unit="row", leave=False)
    for row in rows:
        found["rows"].append(row)
        factor, unit = (1e3, "ms") if row["unit"] == "s" else (1, row["unit"])
        sizes = f"{row['ours_s'] * factor:10.2f} {unit:<3} {row['reference_s'] * factor:10.2f} {unit:<3}"
        shown = sys.stderr if target else sys.stdout
        rows.write(f"{row['name']:<56} {sizes} {row['ratio']:7.1f}x (bar {row['bar']:g})", file=shown)
        if target and target != "-":
            write_json(Path(target), found)
    _write(target, {**found, "finished": now()})


def _fuzz(target: str | None, cases: int, seed: int) -> None:
    from eval.app_path import add_app

    add_app()
    from eval.fuzzing.run import fuzz, fuzz_text

    about = describe_run()
    found = fuzz(cases, seed)
    if target != "-":
        sys.stdout.write(fuzz_text(found) + "\n")
    _write(target, {**about, "finished": now(), **found})
    if found["failed"]:
        raise RefereeError(f"{found['failed']} of {found['cases']} cases failed; see their examples with --json FILE")


def _write(target: str | None, value: Any) -> None:
    """JSON on stdout for '-', else into a file."""
    if target == "-":
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
    elif target:
        write_json(Path(target), value)
