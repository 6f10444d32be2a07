# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Mutation testing: its folder, the parsing of its output, and the changes that count as noticed."""

import json

import pytest

from eval.upkeep import mutation
from eval.upkeep.mutation import (
    GROUPS,
    ROOT,
    Group,
    by_module,
    environment,
    lay_out,
    main,
    same_to_sqlite,
    settings,
    statuses,
    summary,
    tried,
)

RESULTS = """
    lib.ledger.queries.x_ask__mutmut_1: killed
    lib.ledger.queries.x_ask__mutmut_2: survived
    lib.ledger.queries.xǁLedgerǁlease__mutmut_1: timeout
    lib.ledger.queries.xǁLedgerǁlease__mutmut_2: no tests
    lib.ledger.journal.x_write__mutmut_1: killed
    lib.ledger.journal.x_write__mutmut_2: not checked
done in 3 s: fine
"""
FOUND = {
    "lib.ledger.queries.x_ask__mutmut_1": "killed",
    "lib.ledger.queries.x_ask__mutmut_2": "survived",
    "lib.ledger.queries.xǁLedgerǁlease__mutmut_1": "timeout",
    "lib.ledger.queries.xǁLedgerǁlease__mutmut_2": "no tests",
    "lib.ledger.journal.x_write__mutmut_1": "killed",
    "lib.ledger.journal.x_write__mutmut_2": "not checked",
}


def test_results_are_read():
    assert statuses(RESULTS) == FOUND


def test_what_no_test_reaches_is_not_noticed_and_what_was_not_tried_is_left_out():
    assert summary(FOUND) == {"changes": 5, "noticed": 3, "share": 0.6}
    assert by_module(FOUND) == {
        "lib.ledger.journal": {"changes": 1, "noticed": 1, "share": 1.0},
        "lib.ledger.queries": {"changes": 4, "noticed": 2, "share": 0.5},
    }
    assert summary({}) == {"changes": 0, "noticed": 0, "share": 0.0}


def test_every_group_names_modules_and_tests_that_are_there():
    lib, tests = ROOT / "apps" / "activelearning" / "lib", ROOT / "tests"
    for group in GROUPS.values():
        assert all(list(lib.glob(module)) for module in group.modules)
        assert all((tests / test).exists() for test in group.tests)


def test_the_folder_has_lib_at_the_top(tmp_path):
    lay_out(GROUPS["selectors"], tmp_path / "there")
    assert (tmp_path / "there" / "lib" / "selectors" / "greedy.py").is_file()
    assert (tmp_path / "there" / "tests" / "lib" / "selectors").is_dir()
    said = (tmp_path / "there" / "pyproject.toml").read_text().splitlines()
    assert 'only_mutate = ["lib/selectors/*.py"]' in said
    assert 'pytest_add_cli_args_test_selection = ["tests/lib/selectors"]' in said
    assert settings(Group(("a.py",), ("lib/a",))).count("lib/a.py") == 1
    assert 'pytest_add_cli_args = ["-k", "not x and not y"]' in settings(Group(("a.py",), ("lib/a",), ("x", "y")))


def test_the_tests_that_are_left_out_are_there():
    for group in GROUPS.values():
        texts = "".join((ROOT / "tests" / test).read_text() for test in group.tests if group.without)
        assert all(name in texts for name in group.without)


@pytest.mark.parametrize(("survivors", "code"), [(15, 0), (16, 1)])
def test_fewer_than_85_percent_fail(survivors, code, tmp_path, monkeypatch, capsys):
    lines = [f"lib.a.x_f__mutmut_{n}: {'survived' if n < survivors else 'killed'}" for n in range(100)]
    monkeypatch.setattr(mutation, "lay_out", lambda group, folder: None)
    monkeypatch.setattr(mutation, "_mutmut", lambda folder, processes: "\n".join(lines))
    assert main(["selectors", "--out", str(tmp_path)]) == code
    assert f"of    100 noticed: {100 - survivors:.1f} %" in capsys.readouterr().out
    facts = json.loads((tmp_path / "mutation.json").read_text())
    assert len(facts["groups"]["selectors"]["not_noticed"]) == survivors
    assert facts["command"].startswith("python -m eval.upkeep.mutation")
    assert facts["hardware"]["cores"] >= 1


def test_a_change_that_used_up_its_time_is_tried_once_more_with_patience(tmp_path, monkeypatch):
    asked = []

    def mutmut(folder, processes):
        asked.append((processes, (folder / "pyproject.toml").read_text().splitlines()[-1]))
        return f"lib.a.x_f__mutmut_1: {'timeout' if processes == 2 else 'survived'}"

    group = Group(("a.py",), ("lib/a",))
    (tmp_path / "pyproject.toml").write_text(settings(group))
    monkeypatch.setattr(mutation, "_mutmut", mutmut)
    assert tried(group, tmp_path, 2) == {"lib.a.x_f__mutmut_1": "survived"}
    assert asked == [(2, "timeout_multiplier = 15"), (1, "timeout_multiplier = 45")]
    monkeypatch.setattr(mutation, "_mutmut", lambda folder, processes: "lib.a.x_f__mutmut_1: killed")
    assert tried(group, tmp_path, 2) == {"lib.a.x_f__mutmut_1": "killed"}


def test_a_stopped_run_goes_on_in_its_folder(tmp_path, monkeypatch):
    laid_out = []
    monkeypatch.setattr(mutation, "lay_out", lambda group, folder: laid_out.append(folder.name))
    monkeypatch.setattr(mutation, "_mutmut", lambda folder, processes: "lib.a.x_f__mutmut_1: killed")
    assert main(["selectors", "--out", str(tmp_path)]) == 0
    assert main(["selectors", "--out", str(tmp_path), "--resume"]) == 0
    assert laid_out == ["selectors"]


def test_copied_tests_bring_the_reference_arrays_and_run_on_one_thread(monkeypatch, tmp_path):
    lay_out(GROUPS["partial_labels"], tmp_path / "copy")
    assert (tmp_path / "copy" / "tests" / "reference" / "nnactive" / "noise.npz").is_file()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert environment()["OMP_NUM_THREADS"] == "1"


def test_the_case_of_sql_outside_of_quotes_changes_nothing(tmp_path):
    texts = [
        "SELECT id FROM queries WHERE state = 'open' AND id > ?",
        "select id from queries where state = 'open' and id > ?",
        "SELECT ID FROM QUERIES WHERE STATE = 'OPEN' AND ID > ?",
        "SELECT id FROM queries WHERE state = 'open' AND id < ?",
        "XXSELECT id FROM queries WHERE state = 'open' AND id > ?XX",
    ]
    names = [f"x_ask__mutmut_{n or 'orig'}" for n in range(len(texts))]
    code = "".join(
        f"def {name}(c):\n    return c.execute({text!r}).one()\n" for name, text in zip(names, texts, strict=True)
    )
    code += f"def x_ask__mutmut_5(c):\n    return c.execute({texts[1]!r}).all()\n"
    code += (
        "def x_say__mutmut_orig():\n    return 'this and that'\ndef x_say__mutmut_1():\n    return 'THIS AND THAT'\n"
    )
    code += "def x_row__mutmut_orig(row, d):\n    return row['image'] + d['image']\n"
    code += "def x_row__mutmut_1(row, d):\n    return row['IMAGE'] + d['image']\n"
    code += "def x_row__mutmut_2(row, d):\n    return row['image'] + d['IMAGE']\n"
    (tmp_path / "mutants" / "lib").mkdir(parents=True)
    (tmp_path / "mutants" / "lib" / "a.py").write_text(code)
    changes = [
        f"lib.a.{name}"
        for name in (*names[1:], "x_ask__mutmut_5", "x_say__mutmut_1", "x_row__mutmut_1", "x_row__mutmut_2")
    ]
    assert same_to_sqlite(tmp_path, changes) == {"lib.a.x_ask__mutmut_1", "lib.a.x_row__mutmut_1"}
    assert same_to_sqlite(tmp_path, ["lib.missing.x_f__mutmut_1"]) == set()


def test_a_run_that_tried_nothing_is_no_success(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mutation, "lay_out", lambda group, folder: None)
    monkeypatch.setattr(mutation, "_mutmut", lambda folder, processes: "could not collect tests")
    assert main(["ledger", "--out", str(tmp_path)]) == 2
    assert "ledger: mutmut tried nothing" in capsys.readouterr().out
