# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Nothing that is loaded may run code of its own: checkpoints, YAML, and the places that bundles come from."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.models.trusted_bundles import trusted_bundle
from lib.options import OptionError

ROOT = Path(__file__).resolve().parents[3]
SOURCES = [path for folder in ("apps", "eval", "sample-datasets", "bundles") for path in (ROOT / folder).rglob("*.py")]


def calls(name: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Place and keywords of every call of `module.function` in this project."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                keywords = {word.arg or "**": ast.unparse(word.value) for word in node.keywords}
                yield f"{path.relative_to(ROOT)}:{node.lineno}", keywords


def test_checkpoints_are_read_as_weights_only():
    found = list(calls("torch.load"))
    assert len(found) >= 4
    assert [place for place, keywords in found if keywords.get("weights_only") != "True"] == []


def test_no_other_way_of_loading_runs_code():
    unsafe = ["yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "torch.jit.load"]
    assert [place for name in [*unsafe, "joblib.load", "pd.read_pickle"] for place, _ in calls(name)] == []
    assert [place for place, keywords in calls("np.load") if "allow_pickle" in keywords] == []
    imports = [path for path in SOURCES if "import pickle" in path.read_text()]
    assert imports == []


@pytest.fixture
def bundles(tmp_path: Path) -> Path:
    (tmp_path / "bundles" / "mine" / "configs").mkdir(parents=True)
    (tmp_path / "bundles" / "mine" / "configs" / "network.json").write_text("{}")
    return tmp_path / "bundles"


def test_a_bundle_of_the_folder_is_taken(bundles: Path):
    assert trusted_bundle(bundles, "mine", [bundles.parent / "studies"]) == (bundles / "mine").resolve()
    assert trusted_bundle(bundles, "missing", []) == (bundles / "missing").resolve()


def test_the_own_bundles_are_trusted(tmp_path: Path):
    for folder in sorted(p for p in (ROOT / "bundles").iterdir() if (p / "configs").is_dir()):
        assert trusted_bundle(ROOT / "bundles", folder.name, [tmp_path]) == folder


@pytest.mark.parametrize("name", ["../mine", "/tmp/mine", "a/b", "", "..", "x" * 101])
def test_names_that_are_paths(bundles: Path, name: str):
    with pytest.raises(
        OptionError, match=r"--conf models .*: name a folder of .*bundles; --conf bundles names another"
    ):
        trusted_bundle(bundles, name, [])


def test_places_that_others_write_to(bundles: Path, tmp_path: Path):
    with pytest.raises(
        OptionError, match=r"bundle mine lies in .*, where requests write to; bundles run code, move it"
    ):
        trusted_bundle(bundles, "mine", [tmp_path / "other", tmp_path])
    (bundles / "link").symlink_to(tmp_path)
    with pytest.raises(OptionError, match=r"bundle link lies in .*, outside of .*bundles; copy it there if you trust"):
        trusted_bundle(bundles, "link", [])
    config = bundles / "mine" / "configs" / "network.json"
    config.chmod(0o666)
    with pytest.raises(OptionError, match=r"network.json is writable by every user, and bundles run code: chmod o-w"):
        trusted_bundle(bundles, "mine", [])
