# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest

from eval.__main__ import main
from eval.app_tools import doctor
from eval.app_tools.doctor import findings
from eval.app_tools.doctor_studies import studies_findings
from eval.app_tools.project import LEDGER
from lib.ledger.schema import SCHEMA_VERSION
from lib.models.plan_files import write_plan
from lib.planning.fingerprint_reader import take_fingerprint
from lib.planning.memory_budget import measure_budget
from lib.planning.planner import make_plan
from tests.eval.answered import Studies


@pytest.fixture
def studies(tmp_path):
    return Studies(tmp_path / "studies")


def about(studies):
    return {f.check: f for f in studies_findings(studies.folder)}


def test_a_healthy_folder_is_told_line_by_line(studies, capsys):
    before = {p: p.read_bytes() for p in studies.folder.rglob("*") if p.is_file() and "sqlite" not in p.name}
    assert main(["doctor", str(studies.folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True
    found = {row["check"]: (row["state"], row["found"]) for row in said["findings"]}
    assert found["images"] == ("ok", "2 can be used")
    assert found["ledger"] == ("ok", f"schema {SCHEMA_VERSION}")
    assert found["labels"] == ("ok", "2 from 3 answers (0 withdrawn), all equal their rebuild")
    assert found["plan"][1].startswith("none yet")
    assert {name for name in found if name in ("monai", "torch", "monailabel")} == {"monai", "torch", "monailabel"}
    after = {p: p.read_bytes() for p in studies.folder.rglob("*") if p.is_file() and "sqlite" not in p.name}
    assert before == after


def test_a_table_says_what_to_do_below_what_is_wrong(studies, capsys):
    (studies.folder / "broken.nii.gz").write_bytes(b"no image")
    assert main(["doctor", str(studies.folder)]) == 2
    said = capsys.readouterr()
    lines = said.out.splitlines()
    number = next(n for n, line in enumerate(lines) if line.startswith("problem  images"))
    assert "1 cannot: broken.nii.gz" in lines[number]
    assert lines[number + 1].strip() == "-> repair or remove them: they are left out of queries, scorings and trainings"
    assert said.err.startswith("1 problems, first: images")


def test_a_plan_is_told_and_one_that_does_not_fit_is_a_problem(studies):
    images = {p.name[:-7]: p for p in studies.folder.glob("*.nii.gz")}
    plan = make_plan(take_fingerprint(images, {}, None), measure_budget("cpu", 4.0))
    path = studies.folder / ".patchwise" / "plan_net.yaml"
    write_plan(plan, path)
    found = about(studies)["plan of net"]
    assert (found.state, found.found.split(" at ")[0]) == (
        "ok",
        f"{plan.batch} crops of {' x '.join(map(str, plan.patch))}",
    )
    write_plan(plan.model_copy(update={"estimate_gib": 5.0}), path)
    assert about(studies)["plan of net"].state == "problem"
    path.write_text("patch: [1")
    assert about(studies)["plan of net"].advice == "delete it, and the next training makes it again"


def test_a_wrong_label_and_a_damaged_ledger_are_problems(studies):
    label = np.asarray(nib.load(studies.label).dataobj).copy()
    label[0, 0, 0] = 2
    nib.save(nib.Nifti1Image(label, np.eye(4)), studies.label)
    found = about(studies)["labels"]
    assert found.state == "problem"
    assert "1 problems, first" in found.found
    assert "1 voxels differ" in found.found
    for name in ("-wal", "-shm"):
        studies.folder.joinpath(f"{LEDGER}{name}").unlink(missing_ok=True)
    (studies.folder / LEDGER).write_bytes(b"SQLite format 3\0" + bytes(4096))
    assert about(studies)["ledger"].state == "problem"


def test_no_folder_no_room_and_what_a_kill_left(studies, tmp_path, monkeypatch):
    assert [f.state for f in studies_findings(tmp_path / "none")] == ["problem"]
    left = studies.folder / "labels" / "final" / ".tmp-1-a.nii.gz"
    left.write_bytes(b"")
    assert "leftovers" not in about(studies)  # it may be in use
    os.utime(left, (time.time() - 7200,) * 2)
    assert about(studies)["leftovers"].found == "1 temporary files, first .tmp-1-a.nii.gz"
    usage = type(doctor.shutil.disk_usage(tmp_path))(10, 10, 0)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert about(studies)["cached moments"].state == "problem"
    assert {f.check: f.state for f in findings()}["disk"] == "problem"


def test_a_port_that_is_taken_and_a_package_of_another_version(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert {f.check: f.state for f in findings(port=port)}[f"port {port}"] == "warning"
    assert {f.check: f.state for f in findings(port=port)}[f"port {port}"] == "ok"
    monkeypatch.setattr(doctor, "describe_versions", lambda: {"packages": {"monai": "0.1", "torch": None}})
    found = {f.check: f for f in findings()}
    assert (found["monai"].state, found["torch"].state) == ("problem", "problem")
    assert found["monai"].advice.startswith("install monai==1.")


@pytest.mark.parametrize(("host", "auth", "warned"), [("0.0.0.0", "", 1), ("0.0.0.0", "true", 0), ("127.0.0.1", "", 0)])
def test_a_server_that_is_open_to_all_is_warned_of(host, auth, warned):
    code = "import socket, sys; s = socket.socket(); s.bind((sys.argv[2], 0)); s.listen()\n"
    code += "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, "monailabel", host]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "MONAI_LABEL_AUTH_ENABLE": auth}
    ) as server:
        port = int(server.stdout.readline())
        found = [f for f in doctor._open_to_all() if f":{port}," in f.found]
        server.communicate()
    assert [f.state for f in found] == ["warning"] * warned
