# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Cells on a Dask scheduler with two worker processes: one is killed inside a round, and no result is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest
from distributed import LocalCluster

from eval.__main__ import main
from eval.errors import RefereeError
from eval.protocol.study import load_study
from eval.runner.run import Options, start_run
from tests.eval.conftest import ROOT
from tests.eval.runner.test_run import numbers


@pytest.fixture
def scheduler(tmp_path):
    """Address of a scheduler with two workers, each a process of its own."""
    with LocalCluster(n_workers=0, dashboard_address=None, host="127.0.0.1") as cluster:
        command = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address, "--nthreads", "1"]
        command += ["--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path / "dask")]
        command += ["--preload", str(ROOT / "tests" / "eval" / "dask_preload.py")]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        log = open(tmp_path / "workers.log", "wb")  # noqa: SIM115
        workers = [subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT) for _ in range(2)]
        try:
            yield cluster.scheduler_address
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            log.close()


def kill_worker_in_round_1(out, killed):
    """Kill the process that runs random_s1 once its second round has begun and is not over."""
    cell = out / "cells" / "random_s1"
    while not killed:
        time.sleep(0.02)
        state, worker = cell / "state.json", cell / "worker.json"
        if state.exists() and worker.exists():
            steps = json.loads(state.read_text())["steps"]
            if "1.annotate" in steps and "1.test" not in steps:
                killed.append(json.loads(worker.read_text())["process"])
                os.kill(killed[0], signal.SIGKILL)


@pytest.mark.slow
def test_a_lost_workers_cell_goes_on_elsewhere(write_study, stand_in, scheduler, tmp_path):
    path = write_study()
    start_run(load_study(path), tmp_path / "whole", Options(quiet=True))
    out, killed = tmp_path / "out", []
    killer = threading.Thread(target=kill_worker_in_round_1, args=(out, killed), daemon=True)
    killer.start()
    assert main(["run", str(path), "--out", str(out), "--scheduler", scheduler, "--quiet"]) == 0
    killer.join(5)
    assert killed
    assert json.loads((out / "cells" / "random_s1" / "worker.json").read_text())["process"] != killed[0]
    for name, table in numbers(tmp_path / "whole").items():
        pd.testing.assert_frame_equal(table, numbers(out)[name])
    assert json.loads((out / "manifest.json").read_text())["finished"] is not None


@pytest.mark.slow
def test_an_interrupted_run_goes_on(write_study, stand_in, scheduler, tmp_path, capsys):
    path, out = write_study(), tmp_path / "out"
    start_run(load_study(path), tmp_path / "whole", Options(quiet=True))
    command = [sys.executable, "-m", "eval", "run", str(path), "--out", str(out), "--scheduler", scheduler, "--quiet"]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    states = [out / "cells" / f"{method}_s1" / "state.json" for method in ("random", "power_pe")]
    while not any(s.exists() and "0.test" in json.loads(s.read_text())["steps"] for s in states):
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)  # as Ctrl-C, which a shell may have switched off
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert f"`python -m eval resume {out} --scheduler {scheduler}` goes on" in said
    assert "Traceback" not in said
    assert not all("2.test" in json.loads(s.read_text())["steps"] for s in states if s.exists())
    assert main(["resume", str(out), "--scheduler", scheduler, "--quiet"]) == 0
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out
    for name, table in numbers(tmp_path / "whole").items():
        pd.testing.assert_frame_equal(table, numbers(out)[name])


def test_unusable_schedulers_are_refused(write_study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eval.runner.cluster.Client", refuse)
    arguments = ["run", str(write_study()), "--out", str(tmp_path / "out"), "--scheduler", "tcp://127.0.0.1:1"]
    assert main([*arguments, "--quiet"]) == 2
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in capsys.readouterr().err
    assert main([*arguments, "--workers", "2"]) == 2
    assert "leave --workers and --server out" in capsys.readouterr().err


def refuse(*_, **__):
    raise OSError("connection refused")


def test_one_worker_a_cell(tmp_path):
    from eval.runner.cluster import _mine

    with _mine(tmp_path / "cell"), pytest.raises(RefereeError, match="cell is still run by"), _mine(tmp_path / "cell"):
        pass
