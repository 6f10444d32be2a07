# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Licences of everything that `requirements.txt` brings along: listed, compared, and refused where they bind users."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from eval.files import write_text

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("licences.md")

# A package's own words, which change with its releases, in families that do not; one text may name several.
_FAMILIES = {
    "AGPL": r"\bagpl|affero",
    "GPL": r"(?<![al])gpl|gnu general public",
    "LGPL": r"\blgpl|lesser general public",
    "SSPL": r"\bsspl|server side public",
    "MPL-2.0": r"\bmpl-?2|mozilla public license 2",
    "Apache-2.0": r"\bapache",
    "BSD": r"\bbsd",
    "MIT": r"\bmit\b|\bmit-|\bhpnd|expat",
    "PSF": r"\bpsf|python software foundation",
    "ISC": r"\bisc\b",
    "Zlib": r"\bzlib",
    "Unlicense": r"unlicense|public domain",
    "OLDAP": r"oldap",
    "BSL-1.0": r"\bbsl-1|boost",
    "CC0": r"\bcc0",
    "proprietary": r"proprietary|nvidia",
}
UNKNOWN = "unknown"
# Families with conditions on redistribution, or without a statement: such a package needs a reason.
NEED_REASON = frozenset({"AGPL", "GPL", "SSPL", "proprietary", UNKNOWN})
# By name, or by the beginning of names where a * ends it.
REASONS = {
    "huey": "its LICENSE file is MIT; its metadata names none; a dependency of mlflow",
    "openslide-bin": "one library of it lets choose between BSD and GPL, taken under BSD; a dependency of monailabel",
    "skops": "its LICENSE file is MIT; its metadata says OSI approved only; a dependency of mlflow",
    "nvidia-*": "CUDA libraries of torch's GPU builds, from NVIDIA under its own terms; not passed on by this project",
    "cuda-*": "CUDA bindings of torch's GPU builds, from NVIDIA under its own terms; not passed on by this project",
}


def required(path: Path) -> list[str]:
    """The requirements of a file, without comments and without the files that it includes."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def installed(requirements: Iterable[str], find: Callable[[str], Distribution]) -> dict[str, Distribution]:
    """Every installed package that the requirements need, directly or through others, by its canonical name.

    `find` gives a package by name and raises PackageNotFoundError for one that is not installed, which a marker of
    another platform may be the reason of.
    """
    found: dict[str, Distribution] = {}
    todo = [Requirement(line) for line in requirements]
    done: set[tuple[str, frozenset[str]]] = set()
    while todo:
        wanted = todo.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key in done:
            continue
        done.add(key)
        try:
            package = find(wanted.name)
        except PackageNotFoundError:
            continue
        found[key[0]] = package
        for line in package.requires or ():
            needed = Requirement(line)
            extras = ("", *wanted.extras)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return dict(sorted(found.items()))


def families(package: Distribution) -> str:
    """The licence families of a package, joined by a comma: of its expression, else its classifiers, else its text."""
    said: Any = package.metadata
    classifiers = [c.split("::")[-1] for c in said.get_all("Classifier") or () if c.startswith("License ::")]
    # The field may hold a whole licence; its first line is the title.
    field = (said.get("License") or "").strip().split("\n")[0]
    for text in (said.get("License-Expression") or "", " ".join(classifiers), field):
        named = [name for name, pattern in _FAMILIES.items() if re.search(pattern, text, re.IGNORECASE)]
        if named:
            return ", ".join(sorted(named))
    return UNKNOWN


def reason(name: str) -> str | None:
    """Reason that permits a package independently of its licence; None without one."""
    starred = (given for pattern, given in REASONS.items() if pattern.endswith("*") and name.startswith(pattern[:-1]))
    return REASONS.get(name) or next(starred, None)


def refused(licences: Mapping[str, str]) -> list[str]:
    """A sentence for every package whose licence needs a reason and has none."""
    return [
        f"{name} is under {licence}: leave it out, or add the reason for it to REASONS of eval/upkeep/licences.py"
        for name, licence in licences.items()
        if NEED_REASON & set(licence.split(", ")) and reason(name) is None
    ]


def changed(licences: Mapping[str, str], listed: Mapping[str, str]) -> list[str]:
    """A sentence for every package that is listed under another licence than it has now."""
    return [
        f"{name} is listed under {listed[name]} and is under {licence} now: look at it, then run with --write"
        for name, licence in licences.items()
        if name in listed and listed[name] != licence
    ]


def to_table(licences: Mapping[str, str]) -> str:
    """The list as Markdown."""
    rows = "".join(f"| {name} | {licence} | {reason(name) or ''} |\n" for name, licence in sorted(licences.items()))
    return (
        "# Licences\n\nOf every package that `requirements.txt` brings along, as its metadata names them; written by "
        "`python -m eval.upkeep.licences --write`,\ncompared by `make lint`. Nothing of them is passed on with this "
        f"project.\n\n| package | licence | why it may be there |\n| --- | --- | --- |\n{rows}"
    )


def from_table(text: str) -> dict[str, str]:
    """Licences of a table that `to_table` wrote."""
    rows = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| "))
    return {row[0]: row[1].strip(" |") for row in rows if row[0] not in ("package", "---")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the installed packages with the list, or write it; return 0, or 1 with one message per package."""
    parser = argparse.ArgumentParser(prog="python -m eval.upkeep.licences", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the list; other platforms' packages stay in it")
    options = parser.parse_args(arguments)
    found = installed(required(ROOT / "requirements.txt"), distribution)
    licences = {name: families(package) for name, package in found.items()}
    listed = from_table(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {}
    problems = refused(licences)
    if options.write:
        write_text(TABLE, to_table({**listed, **licences}))
    else:
        problems += changed(licences, listed)
    new = [] if options.write else [name for name in licences if name not in listed]
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    told = f"; not listed yet: {', '.join(new)}" if new else ""
    sys.stdout.write(f"licences of {len(licences)} packages looked at, {len(problems)} problems{told}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
