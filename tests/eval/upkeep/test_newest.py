# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Newest versions: requirements loosened, output of pip and pytest parsed, and the result of the command."""

import json
import sys
from pathlib import Path

import pytest

from eval.upkeep import newest
from eval.upkeep.newest import Moved, failed, loosened, main, moved, passed, to_text, unresolved, without_builds

UV = "  \u00d7 No solution found:\n  \u2570\u2500\u25b6 Because a==2 needs b<1 and you require b>=2, no."
JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.lib.test_units" name="test_fine"/>
<testcase classname="tests.lib.test_units" name="test_odd[1]"><failure message="assert">trace</failure></testcase>
<testcase classname="tests.lib.test_units" name="test_late"><error message="fixture">trace</error></testcase>
<testcase classname="" name="tests.eval.runner.test_run"><error message="collection failure">trace</error></testcase>
<testcase classname="tests.lib.annotator.test_captions" name="test_skipped"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("numpy==1.26.4", "numpy"),
        ("setuptools<81", "setuptools"),
        ("highdicom>=0.22,<0.23", "highdicom>=0.22"),
        ("dask[distributed]>=2024.1", "dask[distributed]>=2024.1"),
        ("tqdm~=4.66", "tqdm>=4.66"),
        ("tomli!=2.0; python_version < '3.11'", 'tomli; python_version < "3.11"'),
        ("Torch==2.13.0", "Torch==2.13.0"),
    ],
)
def test_pins_and_caps_go_and_floors_stay(line, expected):
    assert loosened([line], kept=["torch"]) == [expected]


def test_versions_beyond_what_is_asked_for_come_first():
    versions = {"numpy": "2.4.0", "pandas": "2.3.1", "pyyaml": "6.1", "elsewhere": "1"}
    assert moved(["pandas>=2.0", "numpy==1.26.4", "PyYAML", "absent>1"], versions) == [
        Moved("numpy", "==1.26.4", "2.4.0", True),
        Moved("pandas", ">=2.0", "2.3.1", False),
        Moved("PyYAML", "any", "6.1", False),
    ]


def test_a_lock_file_loses_torch_and_its_gpu_libraries():
    lock = ["# made", "numpy==2.4.0", "nvidia-cublas==13.1", "torch==2.13.0", "torchvision==0.28.0", "triton==3.7", ""]
    assert without_builds([*lock, "cuda-bindings==13", "dask[distributed]==3", "torchmetrics==1"]) == [
        "numpy==2.4.0",
        "dask[distributed]==3",
        "torchmetrics==1",
    ]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", None),
        (
            f"import sys; sys.exit({UV!r})",
            "no set of newest versions: Because a==2 needs b<1 and you require b>=2, no.",
        ),
        (
            "import sys; sys.exit('ERROR: No matching distribution found for c>9')",
            "no set of newest versions: c>9 could not be resolved",
        ),
        ("import sys; sys.exit(3)", "no set of newest versions: it says nothing"),
    ],
)
def test_why_a_step_failed_is_a_sentence(code, expected):
    assert newest._failed([sys.executable, "-c", code], 60) == expected


def test_a_step_without_an_end_is_named():
    found = newest._failed([sys.executable, "-c", "import time; time.sleep(30)"], 0.3)
    assert found.startswith("no environment within 0.005 minutes: ")


def test_pip_names_what_it_cannot_resolve():
    conflict = (
        "INFO: pip is looking at multiple versions of a\n"
        "ERROR: Cannot install monailabel and pydicom>=3 because these package versions have conflicting "
        "dependencies.\n"
    )
    assert unresolved(conflict) == ["monailabel and pydicom>=3"]
    missing = (
        "ERROR: Could not find a version that satisfies the requirement patchwork>=9 (from versions: none)\n"
        "ERROR: No matching distribution found for patchwork>=9\n"
    )
    assert unresolved(missing) == ["patchwork>=9"]
    assert unresolved("ERROR: Failed building wheel for lmdb\n") == ["lmdb"]
    assert unresolved("ERROR: Failed to build 'lmdb' when getting requirements\n")[0].startswith("'lmdb'")
    assert unresolved("Killed\n") == []


def test_failures_are_told_by_file():
    assert failed(JUNIT) == {
        "tests/eval/runner/test_run.py": ["(not importable)"],
        "tests/lib/test_units.py": ["test_odd[1]", "test_late"],
    }
    assert passed(JUNIT) == 1


def test_the_table_lines_up():
    rows = [Moved("numpy", "==1.26.4", "2.4.0", True), Moved("dask", ">=1", "3", False)]
    assert to_text(rows, {"tests/a.py": ["test_b", "test_c"]}, 7).splitlines() == [
        "numpy  ==1.26.4  ->  2.4.0",
        "dask   >=1       ->  3  (within)",
        "",
        "7 tests passed, 2 failed",
        "tests/a.py: 2",
        "    test_b",
        "    test_c",
    ]


@pytest.fixture
def made(monkeypatch):
    """Replacements of the steps that take minutes; a test sets their results."""
    asked = {}

    def use(reason=None, junit=JUNIT):
        monkeypatch.setattr(newest, "required", lambda path: ["numpy==1.26.4", "torch==2.13.0"])
        monkeypatch.setattr(newest, "FILES", ("requirements.txt",))

        def install(folder, requirements, kept, seconds):
            asked["requirements"] = requirements
            return reason

        monkeypatch.setattr(newest, "_install", install)
        monkeypatch.setattr(newest, "_versions", lambda python: {"numpy": "2.4.0", "torch": "2.13.0"})
        monkeypatch.setattr(newest, "_tests", lambda python, seconds, paths: junit)
        return asked

    return use


def test_failed_tests_make_it_one(made, capsys):
    asked = made()
    assert main(["--torch", "kept"]) == 1
    assert asked["requirements"] == ["numpy", "torch==2.13.0"]
    assert "numpy  ==1.26.4  ->  2.4.0" in capsys.readouterr().out


def test_all_passed_makes_it_zero_and_json_says_the_same(made, capsys):
    asked = made(junit='<testsuites><testcase classname="tests.a" name="b"/></testsuites>')
    assert main(["--torch", "newest", "--json"]) == 0
    assert asked["requirements"] == ["numpy", "torch"]
    said = json.loads(capsys.readouterr().out)
    assert said["packages"][0] == {"package": "numpy", "asked": "==1.26.4", "newest": "2.4.0", "beyond": True}
    assert (said["passed"], said["failed"]) == (1, {})
    assert said["command"].startswith("python -m eval.upkeep.newest")


def test_no_environment_or_no_end_makes_it_two(made, capsys):
    made(reason="no set of newest versions: monailabel and pydicom could not be resolved")
    assert main([]) == 2
    assert capsys.readouterr().out == "no set of newest versions: monailabel and pydicom could not be resolved\n"
    assert main(["--json"]) == 2
    assert "monailabel" in json.loads(capsys.readouterr().out)["unresolved"]
    made(junit=None)
    assert main([]) == 2
    assert "did not come to an end" in capsys.readouterr().out


def test_tests_that_are_not_there_make_it_two(made, capsys):
    made(junit='<testsuites><testcase classname="tests.a" name="b"><skipped/></testcase></testsuites>')
    assert main(["tests/gone.py"]) == 2
    assert "no test ran in tests/gone.py" in capsys.readouterr().out


def test_a_file_that_cannot_be_imported_does_not_stop_the_others(tmp_path):
    (tmp_path / "test_gone.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "test_there.py").write_text("def test_it():\n    pass\n")
    junit = newest._tests(Path(sys.executable), 60, [str(tmp_path)])
    assert passed(junit) == 1
    assert [names for file, names in failed(junit).items() if "test_gone" in file] == [["(not importable)"]]
