# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Known vulnerabilities of installed packages, as found by pip-audit; accepted ones are listed with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

KNOWN = Path(__file__).with_name("known_vulnerabilities.yaml")
NOBODY = "vulnerabilities: nothing was audited, as the advisory service of PyPI cannot be asked from here"
_SECONDS = 75  # for all packages; a service that is slower counts as out of reach
_COMMAND = ("-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "5")


class Found(NamedTuple):
    """A vulnerability of an installed package; `names` holds its id and its other ids."""

    package: str
    version: str
    names: tuple[str, ...]
    fixed: tuple[str, ...]


class Audit(NamedTuple):
    """Result of pip-audit: the number of packages it could look up, and its findings."""

    looked_at: int
    skipped: int
    found: tuple[Found, ...]


def read(report: str) -> Audit:
    """Parse pip-audit's JSON output; packages that it could not look up count as skipped.

    Raises:
        ValueError: the text is not such a report.
    """
    said = json.loads(report)
    if not isinstance(said, dict) or not isinstance(said.get("dependencies"), list):
        raise ValueError("no list of dependencies")
    packages = said["dependencies"]
    asked = [package for package in packages if "skip_reason" not in package]
    return Audit(len(asked), len(packages) - len(asked), tuple(f for package in asked for f in _found(package)))


def judged(audit: Audit, known: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(problems, notes): findings that are not listed with a reason, and listed entries that were not found."""
    problems = [
        f"{found.package} {found.version}: {found.names[0]}, "
        + (f"fixed in {', '.join(found.fixed)}" if found.fixed else "not fixed yet")
        + f": take a newer version, or say in {KNOWN.name} why it does no harm here"
        for found in audit.found
        if not set(found.names) & set(known)
    ]
    there = {name for found in audit.found for name in found.names}
    gone = [f"{name} was not found any more; take it out of {KNOWN.name}" for name in known if name not in there]
    return problems, gone if audit.looked_at and not audit.skipped else []


def known_of(path: Path) -> dict[str, str]:
    """Ids of vulnerabilities with the reason why each is harmless here.

    Raises:
        ValueError: an id without a reason.
    """
    listed = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    empty = [name for name, why in listed.items() if not str(why or "").strip()]
    if empty:
        raise ValueError(f"{path.name} has no reason why {empty[0]} is harmless here")
    return {str(name): str(why) for name, why in listed.items()}


def main(command: Sequence[str] = (sys.executable, *_COMMAND)) -> int:
    """Return 0, also if the database is unreachable (with a message); 1 with one message per unlisted vulnerability."""
    known, said = known_of(KNOWN), "no answer in time"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        said = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        audit = read(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        audit = Audit(0, 0, ())
    if not audit.looked_at:
        why = f"it knows none of {audit.skipped} packages" if audit.skipped else said[:200]
        sys.stdout.write(f"{NOBODY} ({why})\n")
        return 0
    problems, notes = judged(audit, known)
    sys.stdout.write("".join(f"{line}\n" for line in [*problems, *notes]))
    skipped = f", {audit.skipped} could not be looked up" if audit.skipped else ""
    told = f"{len(audit.found)} vulnerabilities, {len(problems)} of them without a reason"
    sys.stdout.write(f"vulnerabilities: {audit.looked_at} packages looked at{skipped}; {told}\n")
    return 1 if problems else 0


def _found(package: Mapping[str, Any]) -> list[Found]:
    return [
        Found(package["name"], package["version"], (v["id"], *v.get("aliases", ())), tuple(v.get("fix_versions", ())))
        for v in package.get("vulns", ())
    ]


if __name__ == "__main__":
    raise SystemExit(main())
