# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""De-identified reports: ids of images are replaced, and paths, users and hosts left out."""

from __future__ import annotations

import getpass
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.errors import RefereeError
from eval.files import read_json, write_json, write_text
from eval.records.tables import FILES, read_table

FOLDER = "deidentified"
_COLUMNS = ("image", "case")  # of a run's tables; nothing else there names an image
_PREFIXES = ("case", "scan", "image", "volume")
_HIDDEN = "[hidden]"
# Other entries of a manifest (the command, a digest of every image) identify the data.
_MANIFEST = ("study", "started", "finished", "workers", "seeds", "methods", "versions", "hardware")
_DATA = ("name", "labels", "digest")
_SET = ("cases", "voxels", "classes")
_INLINE = re.compile(rb"data:[a-z/+]+;base64,[A-Za-z0-9+/=]+")
_SHORT = 4  # shorter words occur in texts by chance; tables have images in separate columns
_EVERYWHERE = ("", "/", "root", "localhost")  # users and hosts of no meaning


@dataclass(frozen=True)
class Hidden:
    """Information that a report leaves out.

    Args:
        names: pseudonym of every image.
        places: paths, users and hosts, which are left out.
    """

    names: Mapping[str, str]
    places: tuple[str, ...] = ()

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # The longest first: an id may begin like another one.
        words = sorted({w for w in (*self.names, *self.places) if len(w) >= _SHORT}, key=len, reverse=True)
        return re.compile("|".join(_whole(word) for word in words) or r"(?!)")

    def name(self, image: str) -> str:
        """The pseudonym of an image.

        Raises:
            RefereeError: an image without one.
        """
        if image not in self.names:
            raise RefereeError(f"image {image} is in no table of the run, so it has no pseudonym; report the whole run")
        return self.names[image]

    def text(self, text: str) -> str:
        """A text with pseudonyms for images and nothing in the place of paths, users and hosts."""
        return self._pattern.sub(lambda found: self.names.get(found[0], _HIDDEN), text)

    def found_in(self, content: bytes) -> str | None:
        """The first hidden word that a file holds; pictures inside of a page count as letters without meaning."""
        text = _INLINE.sub(b"", content).decode(errors="replace")
        found = self._pattern.search(text)
        return found[0] if found else None


def pseudonyms(images: Iterable[str]) -> dict[str, str]:
    """`case_001`, `case_002`, ... in the order of the ids; another word where an id begins like that."""
    ids = sorted(set(images))
    taken = {image.casefold() for image in ids}
    prefix = next((p for p in _PREFIXES if not any(image.startswith(p) for image in taken)), "pseudonym")
    digits = max(3, len(str(len(ids))))
    return {image: f"{prefix}_{number:0{digits}d}" for number, image in enumerate(ids, start=1)}


def hidden_of(folder: Path, *places: str) -> Hidden:
    """Information that a run's report must leave out: all image names, and the place of the run.

    Raises:
        RefereeError: no run in the folder.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        raise RefereeError(f"{folder} holds no manifest.json, so no run to report; check the folder")
    images = {str(image) for image in manifest["data"]["pool"].get("images", {})}
    for name in FILES:
        table = read_table(folder, name, required=False)
        images |= {str(image) for column in _COLUMNS if column in table for image in table[column]}
    known = (str(folder.resolve()), str(Path.home()), platform.node(), _user(), *places)
    return Hidden(pseudonyms(images), tuple(word for word in dict.fromkeys(known) if word not in _EVERYWHERE))


def write_tables_without_ids(folder: Path, out: Path, hidden: Hidden) -> None:
    """Copy a run's tables and manifest, without data that identify a patient or a machine."""
    shutil.rmtree(out, ignore_errors=True)
    for name in FILES:
        table = read_table(folder, name, required=False)
        for column in _COLUMNS:
            if column in table:
                table[column] = [hidden.name(str(image)) for image in table[column]]
        if not table.empty:
            write_text(out / f"{name}.csv", table.to_csv(index=False))
    write_json(out / "manifest.json", manifest_without_ids(read_json(folder / "manifest.json"), hidden))


def manifest_without_ids(manifest: Mapping[str, Any], hidden: Hidden) -> dict[str, Any]:
    """Entries of a manifest about the conditions of a run, without places and persons."""
    data = manifest["data"]
    sets = {name: {key: data[name][key] for key in _SET if key in data[name]} for name in ("pool", "test")}
    kept = {name: manifest[name] for name in _MANIFEST if name in manifest}
    found: dict[str, Any] = _scrubbed({**kept, "data": {**{k: data[k] for k in _DATA if k in data}, **sets}}, hidden)
    return found


def check_without_ids(out: Path, hidden: Hidden) -> None:
    """Check the name and content of every file.

    Raises:
        RefereeError: a file still contains hidden data; the folder is removed.
    """
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        found = hidden.found_in(path.read_bytes()) or hidden.found_in(str(path.relative_to(out)).encode())
        if found is not None:
            shutil.rmtree(out)
            raise RefereeError(
                f"{path.name} would still have said {found!r}; nothing was written: rename what is called like that"
            )


def _scrubbed(value: Any, hidden: Hidden) -> Any:
    if isinstance(value, str):
        return hidden.text(value)
    if isinstance(value, Mapping):
        return {key: _scrubbed(found, hidden) for key, found in value.items()}
    return [_scrubbed(found, hidden) for found in value] if isinstance(value, list) else value


def _whole(word: str) -> str:
    """Return a pattern for a word that is not part of a longer one."""
    return rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
