# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Random damaged and hostile input: for readers of files in this process, and for a separate server over HTTP.

Half of the cases go to the readers of volumes and segmentations. The other half goes to the server: its OpenAPI
description, damaged uploads, bodies of any bytes, and requests written byte by byte. A case fails if the server returns
5xx or refuses without a sentence, if a reader raises any other error than one with a clear message, or if either grows
by more than 300 MiB. It also fails if a foreign page is served.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from eval.benchmarks.rounds import phantoms
from eval.fuzzing.http import Asker, fuzz_bodies, fuzz_openapi, fuzz_uploads
from eval.fuzzing.readers import fuzz_segmentations, fuzz_volumes
from eval.fuzzing.tally import Tally
from eval.fuzzing.wire import fuzz_identifiers, fuzz_wire
from eval.runner.server import ServerProcess

IMAGES = 6


def fuzz(cases: int, seed: int) -> dict[str, Any]:
    """Run `cases` cases over all surfaces; return counts, times and examples of failures.

    Raises:
        RefereeError: the server does not start, or schemathesis is not installed.
    """
    began = time.perf_counter()
    tallies = [fuzz_volumes(cases * 3 // 10, seed), fuzz_segmentations(cases * 2 // 10, seed)]
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as asker:
        tenth = cases // 10
        tallies += [fuzz_bodies(asker, tenth, seed), fuzz_uploads(asker, tenth, seed)]
        tallies += [fuzz_wire(asker, tenth, seed), fuzz_identifiers(asker, tenth // 2, seed)]
        tallies.append(fuzz_openapi(asker, cases - sum(tally.cases for tally in tallies), seed))
    return summary(tallies, seed, time.perf_counter() - began)


def summary(tallies: list[Tally], seed: int, seconds: float) -> dict[str, Any]:
    """All surfaces together."""
    return {
        "cases": sum(tally.cases for tally in tallies),
        "failed": sum(tally.failed for tally in tallies),
        "seed": seed,
        "seconds": round(seconds, 1),
        "surfaces": [tally.to_json() for tally in tallies],
    }


def fuzz_text(found: dict[str, Any]) -> str:
    """One line per surface, then the failures."""
    lines = []
    for one in found["surfaces"]:
        ends = ", ".join(f"{count} {name}" for name, count in one["outcomes"].items())
        memory = f"{one['memory_mib']:6.0f} MiB"
        lines.append(f"{one['surface']:<24} {one['cases']:>6} cases {one['seconds']:>7.1f} s {memory}  {ends}")
        lines += [f"  {failure['kind']}: {failure['detail']}" for failure in one["failures"]]
    return "\n".join([*lines, f"{found['cases']} cases, {found['failed']} failed, {found['seconds']:.0f} s"])


@contextmanager
def served(folder: Path) -> Iterator[Asker]:
    """Start a server on a few phantoms in `folder` and yield its client; nothing is trained."""
    scans, _ = phantoms(folder / "phantoms", IMAGES)
    studies = folder / "studies"
    studies.mkdir()
    for scan in scans:
        scan.rename(studies / scan.name)
    (studies / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "anterior": 1, "posterior": 2}}))
    conf = {"members": 2, "batch": 4, "size": "12,12,12", "methods": "all", "upload_mib": 64}
    server = ServerProcess(studies, conf, log=folder / "server.log", threads=1)
    server.start()
    try:
        assert server.process is not None
        yield Asker(server.url, psutil.Process(server.process.pid))
    finally:
        server.stop()
