# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The whole loop through the real server, killed at several points: the finished numbers stay the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml

from tests.system.conftest import ROOT, TINY_STUDY

SECONDS = ["score_s", "query_s", "annotate_s", "train_s", "test_s"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    path = tmp_path_factory.mktemp("study") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY_STUDY, "data": str(phantoms)}))
    return path


def referee(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "eval", *arguments, "--quiet"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def uninterrupted(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "uninterrupted"
    # Relative, as a person types it.
    finish(referee("run", str(study), "--out", os.path.relpath(out, ROOT)))
    return out


def tables(out: Path) -> list[pd.DataFrame]:
    rounds, cases, queries = (pd.read_csv(out / f"{name}.csv") for name in ("rounds", "cases", "queries"))
    return [rounds.drop(columns=SECONDS), cases, queries]


def test_two_rounds_through_the_real_server(uninterrupted: Path, phantoms: Path) -> None:
    rounds, cases, queries = tables(uninterrupted)
    assert rounds["regions"].tolist() == [6, 10]
    assert rounds["voxels"].tolist() == [6 * 12**3, 10 * 12**3]
    assert set(cases["class"]) == {"anterior", "posterior"}
    assert cases.groupby("round")["case"].nunique().tolist() == [2, 2]
    expected = cases.groupby(["round", "class"])["dice"].mean().groupby("round").mean()
    np.testing.assert_allclose(rounds["mean_dice"], expected, atol=1e-9)
    truth = {p.name[:-7]: np.asarray(nib.load(p).dataobj) for p in (phantoms / "labelsTr").glob("*.nii.gz")}
    pool = set(queries["image"])
    assert not pool & set(cases["case"])
    for row in queries.itertuples():
        cut = truth[row.image][row.x : row.x + row.dx, row.y : row.y + row.dy, row.z : row.z + row.dz]
        assert row.foreground_voxels == int((cut > 0).sum())
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["data"]["test"]["cases"] == 2
    assert (uninterrupted / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_methods_of_a_seed_start_with_members_that_were_trained_once(study: Path, tmp_path: Path) -> None:
    content = {**yaml.safe_load(study.read_text()), "methods": ["random", "power_pe"], "rounds": 1}
    both = tmp_path / "both.yaml"
    both.write_text(yaml.safe_dump(content))
    finish(referee("run", str(both), "--out", str(tmp_path / "out"), "--workers", "1"))
    trained = {
        path.parent.name: json.loads(path.read_text())["steps"]["0.train"]
        for path in (tmp_path / "out" / "cells").glob("*/state.json")
    }
    assert {name: step["shared"] for name, step in trained.items()} == {"random_s1": False, "power_pe_s1": True}
    assert trained["random_s1"]["model"]["digest"] == trained["power_pe_s1"]["model"]["digest"]
    rounds = pd.read_csv(tmp_path / "out" / "rounds.csv").set_index("method")
    assert rounds["mean_dice"].nunique() == 1
    assert rounds["train_s"].isna().to_dict() == {"random": False, "power_pe": True}


def test_ground_truth_outside_of_the_regions_never_enters_the_server(uninterrupted: Path) -> None:
    (studies,) = (uninterrupted / "cells").glob("*/studies")
    queries = pd.read_csv(uninterrupted / "queries.csv")
    for path in (studies / "labels" / "final").glob("*.nii.gz"):
        label = np.asarray(nib.load(path).dataobj)
        asked = np.zeros(label.shape, bool)
        for row in queries[queries["image"] == path.name[:-7]].itertuples():
            asked[row.x : row.x + row.dx, row.y : row.y + row.dy, row.z : row.z + row.dz] = True
        assert np.array_equal(label != 255, asked)


def processes(out: Path, *words: str) -> list[psutil.Process]:
    """Processes of this run's server and its children whose command line holds all `words`."""
    notes = list((out / "cells").glob("*/server.pid.json"))
    if not notes:
        return []
    group = json.loads(notes[0].read_text())["group"]
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if os.getpgid(process.pid) == group and all(word in line for word in words):
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def steps_done(out: Path) -> list[str]:
    states = list((out / "cells").glob("*/state.json"))
    return list(json.loads(states[0].read_text())["steps"]) if states else []


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "the moment to kill at did not come"
        time.sleep(0.02)


TRAINER = ("interfaces.utils.app", "-m train")
SERVER = ("start_server",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "victim"),
    [
        pytest.param("0.annotate", "trainer", id="trainer in its first round"),
        pytest.param("0.query", "server", id="server while answers are saved"),
        pytest.param("1.query", "referee", id="referee after the second query"),
        pytest.param("0.train", "everything", id="everything while testing"),
    ],
)
def test_killed_and_resumed_the_numbers_are_the_same(
    study: Path, uninterrupted: Path, tmp_path: Path, after: str, victim: str
) -> None:
    out = tmp_path / "killed"
    run = referee("run", str(study), "--out", str(out))
    try:
        wait_for(lambda: after in steps_done(out) or run.poll() is not None)
        if victim == "trainer":
            wait_for(lambda: any((out / "cells").glob("*/studies/.patchwise/models/*/*/member_0.pt")))
            for process in processes(out, *TRAINER):
                process.send_signal(signal.SIGKILL)
        if victim in ("server", "everything"):
            for process in processes(out, *SERVER):
                process.send_signal(signal.SIGKILL)
        if victim in ("referee", "everything"):
            os.killpg(run.pid, signal.SIGKILL)
        output = run.communicate(timeout=300)[0]
        assert run.returncode != 0
        assert "Traceback" not in output, output[-3000:]
        before = len(steps_done(out))
        finish(referee("resume", str(out)))
    finally:
        for process in processes(out):
            process.kill()
    assert before >= 2
    for ours, expected in zip(tables(out), tables(uninterrupted), strict=True):
        pd.testing.assert_frame_equal(ours, expected, check_exact=True)
    for server in processes(out):
        pytest.fail(f"left behind: {server.cmdline()}")
