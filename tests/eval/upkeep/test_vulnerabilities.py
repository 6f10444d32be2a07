# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Vulnerabilities: pip-audit's report parsed and judged, and the message if the advisory service is out of reach."""

import json
import sys

import pytest

from eval.upkeep import vulnerabilities
from eval.upkeep.vulnerabilities import Audit, Found, judged, known_of, main, read

REPORT = {
    "dependencies": [
        {"name": "fine", "version": "1.0", "vulns": []},
        {"name": "torch", "version": "2.13.0+cpu", "skip_reason": "Dependency not found on PyPI"},
        {
            "name": "weak",
            "version": "2.0",
            "vulns": [
                {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.1", "3.0"], "description": "long"},
                {"id": "PYSEC-2", "aliases": [], "fix_versions": [], "description": "long"},
            ],
        },
    ],
    "fixes": [],
}
UNKNOWN = json.dumps({"dependencies": REPORT["dependencies"][1:2]})
WEAK = Found("weak", "2.0", ("PYSEC-1", "CVE-1"), ("2.1", "3.0"))


def test_the_report_is_read():
    assert read(json.dumps(REPORT)) == Audit(2, 1, (WEAK, Found("weak", "2.0", ("PYSEC-2",), ())))


@pytest.mark.parametrize("text", ["", "ERROR: no network", "[]", '{"dependencies": 3}'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        read(text)


def test_a_reason_under_any_name_of_a_vulnerability_counts():
    problems, notes = judged(Audit(1, 0, (WEAK,)), {"CVE-1": "not reachable"})
    assert (problems, notes) == ([], [])
    problems, _ = judged(Audit(1, 0, (WEAK,)), {})
    assert problems == [
        "weak 2.0: PYSEC-1, fixed in 2.1, 3.0: take a newer version, or say in known_vulnerabilities.yaml why it does "
        "no harm here"
    ]
    assert "not fixed yet" in judged(Audit(1, 0, (WEAK._replace(fixed=()),)), {})[0][0]


def test_a_reason_that_outlived_its_vulnerability_is_told_when_all_was_looked_at():
    gone = "CVE-9 was not found any more; take it out of known_vulnerabilities.yaml"
    assert judged(Audit(3, 0, ()), {"CVE-9": "old"}) == ([], [gone])
    assert judged(Audit(3, 1, ()), {"CVE-9": "old"}) == ([], [])


def test_reasons_are_sentences(tmp_path):
    path = tmp_path / "known.yaml"
    path.write_text("CVE-1: only in a server that we do not start\n")
    assert known_of(path) == {"CVE-1": "only in a server that we do not start"}
    path.write_text("CVE-1:\n")
    with pytest.raises(ValueError, match="has no reason why CVE-1"):
        known_of(path)
    path.write_text("# nothing\n")
    assert known_of(path) == {}


def says(text):
    return sys.executable, "-c", f"print({text!r})"


def test_the_command_fails_on_what_has_no_reason_only(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vulnerabilities, "KNOWN", tmp_path / "known.yaml")
    (tmp_path / "known.yaml").write_text("CVE-1: not reachable\n")
    assert main(says(json.dumps(REPORT))) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("weak 2.0: PYSEC-2, not fixed yet")
    assert said[-1] == (
        "vulnerabilities: 2 packages looked at, 1 could not be looked up; 2 vulnerabilities, 1 of them without a reason"
    )
    (tmp_path / "known.yaml").write_text("CVE-1: not reachable\nPYSEC-2: neither\n")
    assert main(says(json.dumps(REPORT))) == 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            f"import sys; sys.stderr.write('No known'); print({UNKNOWN!r})",
            "it knows none of 1 packages",
        ),
        ("import sys; sys.exit('ERROR: no route to host')", "ERROR: no route to host"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_where_nobody_can_be_asked_it_says_why_and_goes_on(code, reason, capsys):
    assert main((sys.executable, "-c", code)) == 0
    assert capsys.readouterr().out == (
        f"vulnerabilities: nothing was audited, as the advisory service of PyPI cannot be asked from here ({reason})\n"
    )


def test_a_service_that_hangs_counts_as_out_of_reach(monkeypatch, capsys):
    monkeypatch.setattr(vulnerabilities, "_SECONDS", 0.2)
    assert main((sys.executable, "-c", "import time; time.sleep(30)")) == 0
    assert capsys.readouterr().out.endswith("cannot be asked from here (no answer in time)\n")
