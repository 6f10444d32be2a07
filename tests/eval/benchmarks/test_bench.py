# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The command that runs benchmarks: rows are shown as they are measured, JSON is whole at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.__main__ import main
from eval.benchmarks import BENCHMARKS
from eval.errors import RefereeError
from eval.protocol.manifest import describe_machine, describe_versions

ROWS = [{"name": n, "ours_s": 0.002, "reference_s": 0.004, "ratio": 2.0, "bar": 1.5, "unit": "s"} for n in ("a", "b")]


def test_json_is_alone_on_standard_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(BENCHMARKS, "fake", lambda: iter(ROWS))
    assert main(["bench", "fake", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["rows"] == ROWS
    assert found["started"] <= found["finished"]
    assert found["versions"] == describe_versions()
    assert found["hardware"] == describe_machine()
    assert "2.00 ms" in shown.err
    assert main(["bench", "fake"]) == 0
    assert "4.00 ms" in capsys.readouterr().out


def test_a_row_outlives_a_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken():
        yield ROWS[0]
        raise RefereeError("no more")

    monkeypatch.setitem(BENCHMARKS, "fake", broken)
    assert main(["bench", "fake", "--json"]) == 2
    assert "2.0x (bar 1.5)" in capsys.readouterr().err
    assert main(["bench", "fake", "--json", str(tmp_path / "fake.json")]) == 2
    kept = json.loads((tmp_path / "fake.json").read_text())
    assert (kept["rows"], kept["finished"]) == (ROWS[:1], None)
