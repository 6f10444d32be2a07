# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The demonstration: phantoms (or DATA=<folder>), a short study through the real server, a table and a report."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.__main__ import main as referee
from eval.runner.server import PROJECT

CASES, SEED = 24, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the data where needed, run the study, print table and report path; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.demo", description="Three rounds of two methods, minutes.")
    parser.add_argument("--out", type=Path, default=PROJECT / ".demo", help="folder for data and results")
    parser.add_argument("--study", type=Path, default=PROJECT / "eval" / "studies" / "demo.yaml")
    # One process per core with one thread each is faster than one process with all cores.
    parser.add_argument("--workers", default=str(min(2, os.cpu_count() or 1)), help="methods at a time")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    if not os.environ.get("DATA"):
        os.environ["DATA"] = str(phantoms(options.out / "data"))
    results = options.out / "run"
    # A demonstration always starts from an empty folder; permanent results come from `python -m eval run`.
    shutil.rmtree(results, ignore_errors=True)
    command = ["run", str(options.study), "--out", str(results), "--workers", options.workers]
    return referee([*command, *(["--quiet"] if options.quiet else [])])


def phantoms(folder: Path) -> Path:
    """The phantom dataset, generated once."""
    if not (folder / "dataset.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        script = PROJECT / "sample-datasets" / "phantoms.py"
        command = [sys.executable, str(script), str(folder), "--cases", str(CASES), "--seed", str(SEED)]
        subprocess.run(command, check=True)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
