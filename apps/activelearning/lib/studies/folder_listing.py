# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Volumes in one folder, by id."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lib.storage.volumes import EXTENSIONS, LABEL_EXTENSIONS, SEGMENTATION
from lib.studies.file_cache import Stamped


class FolderListing:
    """Files of one folder by id; read again only when the folder changed.

    The cost of reading a folder grows with its files, the cost of reading its modification time does not. Repeated
    lookups thus cost the same at 20 and at 10,000 images.
    """

    def __init__(self, folder: Path, labels: bool = False) -> None:
        self.folder = folder
        self.labels = labels
        # Replaced whole, so that threads may read while another one lists the folder.
        self._known: tuple[int, dict[str, str]] = (-1, {})

    def files(self) -> dict[str, str]:
        """Extensions by id, sorted; hidden files (temporary ones, and macOS's `._` twins) are left out."""
        try:
            changed = os.stat(self.folder).st_mtime_ns
        except FileNotFoundError:
            return {}
        known, files = self._known
        if changed != known:
            split = (split_name(name, self.labels) for name in os.listdir(self.folder))
            found = sorted(filter(None, split), key=_rank, reverse=True)
            files = dict(sorted(dict(found).items()))
            # A folder changed within the clock's grain could change again unseen, so it is not remembered yet.
            self._known = changed if time.time_ns() - changed > 20_000_000 else -1, files
        return files

    def paths(self) -> dict[str, Path]:
        """Files by id."""
        return {file_id: self.folder / f"{file_id}{extension}" for file_id, extension in self.files().items()}

    def stamped(self) -> dict[str, Stamped]:
        """Files by id, with size and time of each; the folder is read once."""
        files = self.files()
        wanted = {f"{file_id}{extension}": file_id for file_id, extension in files.items()}
        found: dict[str, Stamped] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name in wanted:
                    try:
                        status = entry.stat()
                    except FileNotFoundError:  # it was just deleted
                        continue
                    found[wanted[entry.name]] = Stamped(entry.path, status.st_size, status.st_mtime_ns)
        return {file_id: found[file_id] for file_id in files if file_id in found}

    def path(self, file_id: str) -> Path | None:
        """File of an id, or None."""
        extension = self.files().get(file_id)
        return None if extension is None else self.folder / f"{file_id}{extension}"


def split_name(name: str, labels: bool = False) -> tuple[str, str] | None:
    """Id and extension of a volume's file name; None for hidden and other files.

    A `.seg.nrrd` is a segmentation of 3D Slicer: a label, never an image.
    """
    if name.startswith("."):
        return None
    if name.endswith(SEGMENTATION):
        return (name[: -len(SEGMENTATION)], SEGMENTATION) if labels else None
    extension = next((e for e in EXTENSIONS if name.endswith(e)), None)
    return (name[: -len(extension)], extension) if extension else None


def _rank(file: tuple[str, str]) -> int:
    """Place of a file's extension: sorted by it backwards, the one that counts is the last and stays in a dict."""
    return LABEL_EXTENSIONS.index(file[1])
