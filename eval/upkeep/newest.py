# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Failures with the newest versions of all packages: an environment without caps, the fast tests in it, a table.

Exit code 0: all tests pass; 1: some fail; 2: no such environment or no test ran, with the reason in one sentence.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from eval.protocol.manifest import describe_run, now
from eval.upkeep.licences import ROOT, required

FILES = ("requirements.txt", "requirements-dev.txt")
KEPT = ("torch", "torchvision")
_FAST = "not slow and not dicom and not system"
_GO_ON = "--continue-on-collection-errors"  # a file that cannot be imported is one of the findings
_LOWER = (">=", ">", "~=")  # bounds that a newer version keeps; ~= is one and a cap
_UNRESOLVED = (
    re.compile(r"No matching distribution found for (?P<what>\S+)"),
    re.compile(r"Could not find a version that satisfies the requirement (?P<what>\S+)"),
    re.compile(r"Cannot install (?P<what>.+?) because these package versions have conflicting dependencies"),
    re.compile(r"Failed building wheel for (?P<what>\S+)|Failed to build (?P<built>.+)"),
)


class Moved(NamedTuple):
    """A required package: the requirement, the newest version, and whether that is outside of the requirement."""

    package: str
    asked: str
    newest: str
    beyond: bool


def loosened(requirements: Iterable[str], kept: Iterable[str] = ()) -> list[str]:
    """Requirements without pins and caps; those of `kept` packages stay as they are."""
    stay = {canonicalize_name(name) for name in kept}
    found = []
    for line in requirements:
        wanted = Requirement(line)
        if canonicalize_name(wanted.name) not in stay:
            floors = [f">={bound.version}" for bound in wanted.specifier if bound.operator in _LOWER]
            extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
            marker = f"; {wanted.marker}" if wanted.marker else ""
            line = f"{wanted.name}{extras}{','.join(floors)}{marker}"
        found.append(line)
    return found


def without_builds(lock: Iterable[str], kept: Iterable[str] = KEPT) -> list[str]:
    """Lines of a lock file without `kept` packages and without the dependencies of their GPU builds only."""
    left_out = (*kept, "triton")
    found = []
    for line in lock:
        name = line.split("==")[0].split("[")[0].strip()
        if "==" in line and name not in left_out and not name.startswith(("nvidia-", "cuda-")):
            found.append(line.strip())
    return found


def moved(requirements: Iterable[str], versions: Mapping[str, str]) -> list[Moved]:
    """Every requirement beside the version that is there; `versions` has canonical names."""
    rows = []
    for wanted in map(Requirement, requirements):
        newest = versions.get(canonicalize_name(wanted.name))
        if newest is not None:
            beyond = not wanted.specifier.contains(newest, prereleases=True)
            rows.append(Moved(wanted.name, str(wanted.specifier) or "any", newest, beyond))
    return sorted(rows, key=lambda row: (not row.beyond, row.package.lower()))


def unresolved(output: str) -> list[str]:
    """The packages that pip names as the reason for giving up; empty where it names none."""
    found: dict[str, None] = {}
    for line in output.splitlines():
        for pattern in _UNRESOLVED:
            match = pattern.search(line)
            if match:
                found[next(group for group in match.groups() if group).strip()] = None
    return list(found)


def failed(junit: str) -> dict[str, list[str]]:
    """Names of failed tests by file, of pytest's JUnit report; a file that cannot be imported is its own test."""
    broken: dict[str, list[str]] = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            name, place = case.get("name", ""), case.get("classname", "")
            file = (place or name).replace(".", "/") + ".py"
            broken.setdefault(file, []).append(name if place else "(not importable)")
    return dict(sorted(broken.items()))


def passed(junit: str) -> int:
    """Number of tests that passed."""
    cases = ElementTree.fromstring(junit).iter("testcase")
    return sum(len([child for child in case if child.tag in ("failure", "error", "skipped")]) == 0 for case in cases)


def to_text(rows: Sequence[Moved], broken: Mapping[str, Sequence[str]], count: int) -> str:
    """The table for people."""
    wide = max((len(row.package) for row in rows), default=0)
    asked = max((len(row.asked) for row in rows), default=0)
    lines = [
        f"{row.package:<{wide}}  {row.asked:<{asked}}  ->  {row.newest}{'' if row.beyond else '  (within)'}"
        for row in rows
    ]
    lines += ["", f"{count} tests passed, {sum(map(len, broken.values()))} failed"]
    for file, names in broken.items():
        lines += [f"{file}: {len(names)}", *(f"    {name}" for name in names)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Create the environment, run the tests in it and report the failures; for the exit code see the module."""
    options = _parser().parse_args(arguments)
    about = describe_run("eval.upkeep.newest")
    asked = [line for name in FILES for line in required(ROOT / name)]
    kept = () if options.torch == "newest" else KEPT
    python = options.folder / "bin" / "python"
    reason = _install(options.folder, loosened(asked, kept), kept, options.minutes * 60)
    if reason:
        sys.stdout.write((json.dumps({"unresolved": reason}) if options.json else reason) + "\n")
        return 2
    rows = moved(asked, _versions(python))
    junit = _tests(python, options.minutes * 60, options.tests)
    if junit is None:
        sys.stdout.write("the tests did not come to an end; run them by hand: " + f"{python} -m pytest\n")
        return 2
    broken, count = failed(junit), passed(junit)
    if not broken and not count:
        sys.stdout.write(f"no test ran in {' '.join(options.tests)}; name files or folders of fast tests\n")
        return 2
    facts: dict[str, Any] = {
        **about,
        "finished": now(),
        "packages": [row._asdict() for row in rows],
        "passed": count,
        "failed": broken,
    }
    sys.stdout.write((json.dumps(facts, indent=1) if options.json else to_text(rows, broken, count)) + "\n")
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.upkeep.newest", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-latest", help="the environment, made anew")
    parser.add_argument(
        "--torch",
        choices=("kept", "newest"),
        default="newest" if shutil.which("nvidia-smi") else "kept",
        help="kept: the pinned torch, as the newest one brings CUDA along; default where there is no GPU",
    )
    parser.add_argument("--minutes", type=float, default=60, help="for the installation, and again for the tests")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("tests", nargs="*", default=["tests"], help="files or folders of tests; default: all fast ones")
    return parser


def _install(folder: Path, requirements: Sequence[str], kept: Collection[str], seconds: float) -> str | None:
    """Create an environment with the requirements; return the reason if that is impossible, or None.

    uv resolves, as pip tries versions in turn for hours where newer ones exclude each other. The packages in `kept` are
    installed by pip as in `make install`, in any build that it finds.
    """
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    pinned = [line for line in requirements if canonicalize_name(Requirement(line).name) in kept]
    with tempfile.TemporaryDirectory(prefix="patchwise-") as made:
        asked, lock = Path(made) / "asked.txt", Path(made) / "lock.txt"
        asked.write_text("\n".join(requirements), encoding="utf-8")
        uv = [str(folder / "bin" / "uv"), "pip", "compile", "--quiet", "--no-annotate", "--no-header"]
        reason = (
            _failed([*pip, "uv"], seconds)
            or _failed([*uv, "--native-tls", str(asked), "--output-file", str(lock)], seconds)
            or (_failed([*pip, *pinned], seconds) if pinned else None)
        )
        if reason is None:
            rest = without_builds(lock.read_text(encoding="utf-8").splitlines()) if kept else [f"-r{lock}"]
            reason = _failed([*pip, "--no-deps", *rest], seconds)
    return reason


def _failed(command: Sequence[str], seconds: float) -> str | None:
    """Run a program; return the reason if it failed, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"no environment within {seconds / 60:g} minutes: {' '.join(command[:5])} did not end"
    if done.returncode == 0:
        return None
    said = done.stdout + done.stderr
    names = ", ".join(unresolved(said))
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("WARNING")]
    last = next((line for line in lines if line.lower().startswith("error")), (lines or ["it says nothing"])[-1])
    told = " ".join(line.strip(" \u2502\u2570\u2500\u25b6\u00d7") for line in said.splitlines() if "ecause" in line)
    return f"no set of newest versions: {f'{names} could not be resolved' if names else told or last}"


def _versions(python: Path) -> dict[str, str]:
    command = [str(python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {canonicalize_name(package["name"]): package["version"] for package in listed}


def _tests(python: Path, seconds: float, paths: Sequence[str]) -> str | None:
    """pytest's JUnit report of the fast tests; None where it wrote none."""
    with tempfile.TemporaryDirectory(prefix="patchwise-") as folder:
        report = Path(folder) / "junit.xml"
        command = [str(python), "-m", "pytest", "-q", "-m", _FAST, _GO_ON, f"--junitxml={report}", *paths]
        try:
            subprocess.run(command, cwd=ROOT, stdout=sys.stderr, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return None
        return report.read_text(encoding="utf-8") if report.is_file() else None


if __name__ == "__main__":
    raise SystemExit(main())
