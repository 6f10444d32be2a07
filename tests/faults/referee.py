# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A referee that runs a tiny study beside everything else, is killed, and resumes: its numbers stay the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from eval.runner.server import stop_leftover
from tests.system.conftest import ROOT, TINY_STUDY

TABLES = ("rounds", "cases", "queries")


class BackgroundStudy:
    """One run after the other, each compared with an undisturbed run.

    Args:
        folder: folder for the runs.
        data: a decathlon folder.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        folder.mkdir()
        self.folder, self.runs, self.kills = folder, 0, 0
        self.study = folder / "tiny.yaml"
        self.study.write_text(yaml.safe_dump({**TINY_STUDY, "data": str(data)}))
        process = self._start("run", str(self.study), "--out", str(folder / "reference"))
        assert process.wait(timeout=600) == 0, Path(f"{self._out()}.log").read_text()[-2000:]
        self.process = self._next()

    def strike(self, rng: np.random.Generator) -> list[str]:
        """Kill the referee, with its server or without, and let it resume; start the next run after a success."""
        if self.process.poll() is not None:
            problems = self.compare()
            self.process = self._next()
            return problems
        self.kills += 1
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        out = self._out()
        if rng.random() < 0.5:
            for note in out.glob("cells/*/server.pid.json"):
                stop_leftover(note)
        again = (
            ["resume", str(out)] if (out / "manifest.json").exists() else ["run", str(self.study), "--out", str(out)]
        )
        self.process = self._start(*again)
        return []

    def finish(self) -> list[str]:
        """Wait for the present run; return its differences from the undisturbed one."""
        self.process.wait(timeout=900)
        return self.compare()

    def stop(self) -> None:
        """End the present run, if any, and its server."""
        self.process.kill()
        self.process.wait()
        for note in self._out().glob("cells/*/server.pid.json"):
            stop_leftover(note)

    def compare(self) -> list[str]:
        """Every wrong number of the finished run."""
        out = self._out()
        if self.process.returncode:
            return [f"{out}: the referee ended with {self.process.returncode}; see {out}.log"]
        found = []
        for name in TABLES:
            one, two = (pd.read_csv(path / f"{name}.csv") for path in (self.folder / "reference", out))
            kept = [column for column in one.columns if not column.endswith("_s")]
            if not one[kept].equals(two[kept]):
                found.append(f"{out / name}.csv differs from that of the undisturbed run")
        return found

    def _out(self) -> Path:
        return self.folder / f"run_{self.runs}"

    def _next(self) -> subprocess.Popen[bytes]:
        self.runs += 1
        return self._start("run", str(self.study), "--out", str(self._out()))

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with open(f"{self._out()}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "eval", *arguments, "--quiet"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
