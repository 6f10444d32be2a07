# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Files and folders beside the images that are not used, each with the reason and the remedy."""

from __future__ import annotations

import os
from pathlib import Path

from lib.storage.volumes import EXTENSIONS, LABEL_EXTENSIONS, SEGMENTATION
from lib.studies.folder_listing import FolderListing, split_name

_OWN_FOLDERS = frozenset({"labels"})
_OWN_FILES = frozenset({"dataset.json"})
_PAIR = (".img", ".hdr", ".img.gz", ".hdr.gz")
_HEADER_APART = (".mhd", ".nhdr")
_LISTED = ", ".join(EXTENSIONS)


def unused_files(studies: Path, labels: tuple[str, ...] = ("labels/final",)) -> dict[str, str]:
    """Sentence about every file and folder of a studies folder that is not used, by its name in there.

    Args:
        studies: the folder of the images.
        labels: folders of labels in it; only second files of an id and foreign formats are named there.
    """
    found = _unused(studies, FolderListing(studies).files(), labels=False)
    for folder in labels:
        there = studies / folder
        inside = _unused(there, FolderListing(there, labels=True).files(), labels=True) if there.is_dir() else {}
        found |= {f"{folder}/{name}": f"{folder}/{sentence}" for name, sentence in inside.items()}
    return found


def _unused(folder: Path, used: dict[str, str], labels: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                sentence = None if entry.name in _OWN_FOLDERS else _of_folder()
            else:
                sentence = None if entry.name in _OWN_FILES else _of_file(entry.name, used, labels)
            if sentence is not None:
                found[entry.name] = f"{entry.name}: {sentence}"
    return found


def _of_file(name: str, used: dict[str, str], labels: bool) -> str | None:
    split = split_name(name, labels)
    if split is not None:
        image, extension = split
        if used.get(image, extension) == extension:
            return None
        return f"a second file of {image}, of which {image}{used[image]} is used; remove or rename one"
    lower = name.lower()
    if lower.endswith(SEGMENTATION):
        return "a segmentation of 3D Slicer and no image; submit it as a label, or move it into labels/final"
    if lower.endswith(LABEL_EXTENSIONS):
        ending = next(e for e in LABEL_EXTENSIONS if lower.endswith(e))
        return f"endings must be in lower case; rename it to {name[: -len(ending)]}{ending}"
    if lower.endswith(_PAIR):
        return f"half of a pair of files, which is not read; store header and voxels in one file ({_LISTED})"
    if lower.endswith(_HEADER_APART):
        return f"a header whose voxels are in another file, which is not read; store both in one file ({_LISTED})"
    return f"not a volume in a format that is read ({_LISTED}); convert or remove it"


def _of_folder() -> str:
    return f"a folder, which is not searched; move its volumes up, and convert DICOM series to one of {_LISTED}"
