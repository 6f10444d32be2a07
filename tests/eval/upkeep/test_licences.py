# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Licences of hand-made packages: their requirements, their metadata, and refused ones."""

from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import pytest

from eval.upkeep import licences
from eval.upkeep.licences import changed, families, from_table, installed, main, reason, refused, required, to_table


class Package(Distribution):
    """A package that only has metadata."""

    def __init__(self, name, *lines):
        self.text = "\n".join([f"Name: {name}", "Version: 1", *lines, "", "words"])

    def read_text(self, filename):
        return self.text if filename == "METADATA" else None

    def locate_file(self, path):
        return Path(path)


def finder(**packages):
    def find(name):
        if name not in packages:
            raise PackageNotFoundError(name)
        return Package(name, *packages[name])

    return find


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["License-Expression: Apache-2.0 AND MIT"], "Apache-2.0, MIT"),
        (["License-Expression: AGPL-3.0-or-later"], "AGPL"),
        (["License-Expression: GPL-2.0-only"], "GPL"),
        (["License-Expression: LGPL-2.1-only"], "LGPL"),
        (["Classifier: License :: OSI Approved :: GNU Affero General Public License v3"], "AGPL"),
        (["Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)"], "GPL"),
        (["Classifier: License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)"], "LGPL"),
        (["Classifier: License :: OSI Approved :: BSD License", "License: MIT"], "BSD"),
        (["Classifier: License :: OSI Approved", "License: MIT"], "MIT"),
        (["License: BSD 3-Clause License", "        Copyright mit nobody"], "BSD"),
        (["Classifier: License :: Other/Proprietary License"], "proprietary"),
        (["License: ask me", "Classifier: Topic :: MIT"], "unknown"),
        ([], "unknown"),
    ],
)
def test_families_are_what_metadata_says(lines, expected):
    assert families(Package("any", *lines)) == expected


def test_needs_are_followed_through_extras_and_markers():
    find = finder(
        a=["Requires-Dist: b[fast]>=1", "Requires-Dist: windows-only; sys_platform == 'win32'", "Requires-Dist: gone"],
        b=["Requires-Dist: c; extra == 'fast'", "Requires-Dist: d; extra == 'slow'"],
        c=["Requires-Dist: a"],
        d=[],
        e=[],
    )
    assert list(installed(["a>1"], find)) == ["a", "b", "c"]


def test_a_second_extra_of_a_package_is_followed_too():
    find = finder(b=["Requires-Dist: c; extra == 'one'", "Requires-Dist: d; extra == 'two'"], c=[], d=[])
    assert list(installed(["b[one]", "b[two]"], find)) == ["b", "c", "d"]


def test_requirements_lose_comments_and_includes(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# first\n-r other.txt\n\nnumpy==1.26.4   # why\nscipy>=1\n")
    assert required(path) == ["numpy==1.26.4", "scipy>=1"]


def test_what_binds_users_or_says_nothing_needs_a_reason():
    found = {"fine": "MIT", "weak": "LGPL, MIT", "strong": "AGPL", "dual": "BSD, GPL", "silent": "unknown"}
    assert [sentence.split()[0] for sentence in refused(found)] == ["strong", "dual", "silent"]
    said = refused({"strong": "AGPL"})[0]
    assert said.startswith("strong is under AGPL: leave it out, or add the reason for it to REASONS")
    assert refused({"huey": "unknown", "nvidia-cublas": "proprietary"}) == []


def test_reasons_are_by_name_or_beginning():
    assert reason("nvidia-cublas-cu12") == licences.REASONS["nvidia-*"]
    assert reason("huey") == licences.REASONS["huey"]
    assert reason("hue") is None
    assert reason("my-nvidia-fork") is None


def test_another_licence_than_the_listed_one_is_told_and_a_new_package_is_not():
    found = changed({"a": "AGPL", "b": "MIT", "new": "MIT"}, {"a": "MIT", "b": "MIT", "old": "MIT"})
    assert found == ["a is listed under MIT and is under AGPL now: look at it, then run with --write"]


def test_the_table_reads_back():
    found = {"huey": "unknown", "a": "BSD, MIT", "z": "MIT"}
    assert from_table(to_table(found)) == found
    assert from_table("") == {}


def test_the_command_compares_writes_and_keeps_other_platforms(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(licences, "TABLE", tmp_path / "licences.md")
    monkeypatch.setattr(licences, "required", lambda path: ["a", "b"])
    monkeypatch.setattr(licences, "distribution", finder(a=["License: MIT"], b=["License: BSD"]))
    assert main([]) == 0
    assert capsys.readouterr().out == "licences of 2 packages looked at, 0 problems; not listed yet: a, b\n"
    (tmp_path / "licences.md").write_text(to_table({"a": "BSD", "elsewhere": "MIT"}))
    assert main([]) == 1
    assert "a is listed under BSD and is under MIT now" in capsys.readouterr().out
    assert main(["--write"]) == 0
    assert from_table((tmp_path / "licences.md").read_text()) == {"a": "MIT", "b": "BSD", "elsewhere": "MIT"}
    assert main([]) == 0


def test_the_committed_list_has_a_licence_that_may_be_there_on_every_line():
    listed = from_table(licences.TABLE.read_text())
    assert len(listed) > 100
    assert refused(listed) == []
