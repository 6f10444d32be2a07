# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Sizes of folders and modules, and one import that the contracts refuse."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eval.upkeep.layout import oversized

ROOT = Path(__file__).resolve().parents[3]
LINT = (
    "import sys; sys.path[:0] = ['apps/activelearning', '.']; "
    "from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
)


def test_folders_and_modules_at_their_limits_pass_and_one_more_is_named(tmp_path):
    for folder, count in (("full", 12), ("over", 13), ("selectors", 20)):
        (tmp_path / "app" / folder).mkdir(parents=True)
        for k in range(count):
            (tmp_path / "app" / folder / f"m{k}.py").write_text("x = 1\n")
        (tmp_path / "app" / folder / "__init__.py").write_text("")
    (tmp_path / "app" / "full" / "m0.py").write_text("x = 1\n" * 400)
    (tmp_path / "app" / "full" / "m1.py").write_text("x = 1\n" * 401)
    assert oversized(tmp_path, ["app"]) == [
        "app/over: 13 modules, at most 12; split the package by its nouns",
        "app/full/m1.py: 401 lines, at most 400; split the module",
    ]


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("apps/activelearning/lib/units.py", "import os", "The core is pure"),
        (
            "apps/activelearning/lib/selectors/greedy.py",
            "import lib.ledger.store",
            "Arrows between the packages of lib",
        ),
        ("eval/runner/server.py", "import lib.regions", "The referee learns about a server over HTTP only"),
        ("eval/protocol/study.py", "import eval.runner.run", "Arrows between the packages of eval"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(tmp_path, module, line, contract):
    shutil.copytree(ROOT / "apps" / "activelearning" / "lib", tmp_path / "apps" / "activelearning" / "lib")
    shutil.copytree(ROOT / "eval", tmp_path / "eval", ignore=shutil.ignore_patterns("results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path, head = tmp_path / module, "from __future__ import annotations\n"
    path.write_text(path.read_text().replace(head, head + line + "\n", 1))
    run = subprocess.run([sys.executable, "-c", LINT], cwd=tmp_path, capture_output=True, text=True)
    broken = [name for name in run.stdout.splitlines() if name.endswith(" BROKEN")]
    assert any(name.startswith(contract) for name in broken), run.stdout
    assert run.returncode == 1


def test_the_contracts_hold_as_the_code_is():
    run = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
