# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Mutation tests: mutmut changes ledger, partial labels and selectors one line at a time; tests must fail.

Exit code 0: in every group at least 85 % of the changes made a test fail; 1: fewer; 2: mutmut did not run.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.files import write_json
from eval.protocol.manifest import describe_run, now
from eval.upkeep.licences import ROOT

BAR = 0.85
# Limit of a test run as a multiple of its usual time. A change that exceeds it is tried once more, alone and with a
# higher limit, since a busy machine is indistinguishable from an endless loop.
PATIENCE, MORE_PATIENCE = 15, 45
# mutmut's statuses of a change that a test noticed; one that hangs or breaks the process counts as noticed.
NOTICED = frozenset({"killed", "timeout", "suspicious", "segfault", "caught by type check"})
_NOT_RUN = frozenset({"skipped", "not checked", "check was interrupted by user"})
# SQL keywords are written in capitals here; outside of quotes, SQLite ignores case.
_SQL = re.compile(
    r"\b(SELECT|INSERT|UPDATE|DELETE|CREATE|FROM|WHERE|AND|OR|ORDER BY|GROUP BY|LIMIT|VALUES|SET|JOIN|AS|ON)\b"
)
_QUOTED = re.compile(r"('[^']*')")
_RESULT = re.compile(r"^\s*(?P<name>\S+): (?P<status>.+?)\s*$")


class Group(NamedTuple):
    """Modules that are changed, and the tests that have to notice; paths below `lib` and `tests`.

    `without`: tests that take seconds each, and would have to run for every change that is not noticed.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    without: tuple[str, ...] = ()


GROUPS = {
    "partial_labels": Group(("partial_labels.py",), ("lib/test_partial_labels.py",)),
    "selectors": Group(("selectors/*.py",), ("lib/selectors",)),
    "ledger": Group(
        ("ledger/*.py",),
        (
            "lib/ledger/test_queries.py",
            "lib/ledger/test_leases.py",
            "lib/ledger/test_overview.py",
            "lib/ledger/test_recovery.py",
            "lib/ledger/test_schema.py",
            "lib/ledger/test_journal.py",
            "lib/studies/test_submissions.py",
        ),
        (
            "processes_that_make_the_ledger",
            "writer_killed_at_any_instant",
            "whatever_happened_after_any_copy",
            "kept_up_to_date_is_the_one_made_anew",
            "that_save_one_image_lose_nothing",
        ),
    ),
}


def settings(group: Group, patience: int = PATIENCE) -> str:
    """pyproject.toml of a folder in which `lib` lies at the top, where mutmut finds modules by their names.

    mutmut tries changes that used up their time once more where `patience` is another one than before.
    """
    modules = [f"lib/{module}" for module in group.modules]
    tests = [f"tests/{test}" for test in group.tests]
    chosen = ["-k", " and ".join(f"not {name}" for name in group.without)] if group.without else []
    return (
        '[tool.pytest.ini_options]\npythonpath = ["."]\naddopts = "--strict-markers -p no:cacheprovider"\n'
        'markers = ["slow: minutes", "system: a server", "dicom: an archive"]\n\n'
        f'[tool.mutmut]\nsource_paths = ["lib"]\nalso_copy = ["eval"]\nonly_mutate = {json.dumps(modules)}\n'
        f"pytest_add_cli_args_test_selection = {json.dumps(tests)}\npytest_add_cli_args = {json.dumps(chosen)}\n"
        f"timeout_multiplier = {patience}\n"
    )


def lay_out(group: Group, folder: Path) -> None:
    """A folder with copies of `lib`, `eval` and `tests`; an existing one is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    leave = shutil.ignore_patterns("__pycache__", "results")
    for source in (ROOT / "apps" / "activelearning" / "lib", ROOT / "eval", ROOT / "tests"):
        shutil.copytree(source, folder / source.name, ignore=leave)
    (folder / "pyproject.toml").write_text(settings(group), encoding="utf-8")


def statuses(results: str) -> dict[str, str]:
    """Status of every change, from the output of `mutmut results --all true`."""
    lines = map(_RESULT.match, results.splitlines())
    return {line["name"]: line["status"] for line in lines if line and "__mutmut_" in line["name"]}


def tried(group: Group, folder: Path, processes: int) -> dict[str, str]:
    """Status of every change; one that used up its time has done so twice."""
    found = statuses(_mutmut(folder, processes))
    if "timeout" in found.values():
        (folder / "pyproject.toml").write_text(settings(group, MORE_PATIENCE), encoding="utf-8")
        found = statuses(_mutmut(folder, 1))
    return found


def same_to_sqlite(folder: Path, names: Iterable[str]) -> set[str]:
    """Changes of nothing but the case of SQL outside of its quotes or of columns, which no test can notice; left out.

    `names` are mutmut's, `folder` is the one it works in, with every function beside its changed copies.
    """
    functions: dict[str, dict[str, tuple[str, list[str]]]] = {}
    for module in {name.rsplit(".", 1)[0] for name in names}:
        path = folder / "mutants" / f"{module.replace('.', '/')}.py"
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else ()
        functions[module] = {node.name: _split(node) for node in nodes if isinstance(node, ast.FunctionDef)}
    same = set()
    for name in names:
        module, change = name.rsplit(".", 1)
        own = functions[module]
        before, after = own.get(f"{change.split('__mutmut_')[0]}__mutmut_orig"), own.get(change)
        if before and after and before[0] == after[0] and all(map(_same_sql, before[1], after[1])):
            same.add(name)
    return same


def _split(function: ast.FunctionDef) -> tuple[str, list[str]]:
    """Body of a function without its name and texts, and the texts; columns of a `row` compare without case."""
    texts = []
    for node in ast.walk(function):
        match node:
            case ast.Subscript(value=ast.Name(id="row"), slice=ast.Constant(value=str(column)) as key):
                key.value = column.lower()
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
            node.value = ""
    return "".join(map(ast.dump, [*function.decorator_list, function.args, *function.body])), texts


def _same_sql(before: str, after: str) -> bool:
    if before == after:
        return True
    quoted, others = _QUOTED.split(before), _QUOTED.split(after)
    lower = [part if i % 2 else part.lower() for i, part in enumerate(quoted)]
    return bool(_SQL.search(before)) and lower == [p if i % 2 else p.lower() for i, p in enumerate(others)]


def summary(found: Mapping[str, str]) -> dict[str, float | int]:
    """Changes, how many were noticed, and the share; those that were not tried are left out.

    A change in code that no test reaches counts as not noticed.
    """
    counts = Counter(status for status in found.values() if status not in _NOT_RUN)
    tried, noticed = sum(counts.values()), sum(counts[status] for status in NOTICED)
    return {"changes": tried, "noticed": noticed, "share": round(noticed / tried, 4) if tried else 0.0}


def by_module(found: Mapping[str, str]) -> dict[str, dict[str, float | int]]:
    """`summary` of every module."""
    modules: dict[str, dict[str, str]] = {}
    for name, status in found.items():
        # A change is named module.x_function__mutmut_3, with more in the place of x_ for methods.
        modules.setdefault(name.rsplit(".", 1)[0], {})[name] = status
    return {module: summary(own) for module, own in sorted(modules.items())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the groups and write the results; for the exit code see the module."""
    options = _parser().parse_args(arguments)
    unknown = sorted(set(options.groups) - set(GROUPS))
    if unknown:
        raise SystemExit(f"no group {unknown[0]}; there are {', '.join(GROUPS)}")
    about = describe_run("eval.upkeep.mutation")
    facts, low = {}, []
    for name in options.groups or GROUPS:
        folder = (options.out / name).resolve()
        if not options.resume:
            lay_out(GROUPS[name], folder)
        found = tried(GROUPS[name], folder, options.processes)
        if not found:
            sys.stdout.write(f"{name}: mutmut tried nothing; its words are in {folder}/mutmut.log\n")
            return 2
        same = same_to_sqlite(folder, found)
        found = {change: status for change, status in found.items() if change not in same}
        facts[name] = {
            **summary(found),
            "same_to_sqlite": len(same),
            "modules": by_module(found),
            "not_noticed": sorted(change for change, status in found.items() if status not in NOTICED | _NOT_RUN),
        }
        row = summary(found)
        sys.stdout.write(f"{name:<16} {row['noticed']:>6} of {row['changes']:>6} noticed: {100 * row['share']:.1f} %\n")
        low += [name] if row["share"] < BAR else []
        write_json(options.out / "mutation.json", {**about, "finished": now(), "groups": facts})
    return 1 if low else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.upkeep.mutation", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutation", help="copies, logs and mutation.json")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="goes on where a run into the same folder was stopped")
    return parser


def environment() -> dict[str, str]:
    """This process's with one thread.

    OpenMP's threads do not outlive a fork, and mutmut forks for every change, so that k-means would wait
    for them until its time is used up, which looks like a change that was noticed.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _mutmut(folder: Path, processes: int) -> str:
    """Run mutmut in a folder and return its results; its progress goes to mutmut.log."""
    mutmut = [sys.executable, "-m", "mutmut"]
    with open(folder / "mutmut.log", "a", encoding="utf-8") as log:
        run = [*mutmut, "run", "--max-children", str(processes)]
        subprocess.run(run, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=False, env=environment())
    asked = [*mutmut, "results", "--all", "true"]
    return subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    raise SystemExit(main())
