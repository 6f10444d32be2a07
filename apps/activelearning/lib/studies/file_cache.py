# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""What is known of files, remembered in memory and in the ledger for as long as a file's size and time stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from lib.ledger.queries import QueryLedger

T = TypeVar("T")

# From so many unknown files on, the ledger is asked about all at once.
_MANY = 8
# Facts written at a time, so that work on a large pool that is interrupted is not lost.
_CHUNK = 200


class Stamped(NamedTuple):
    """A file, and the size in bytes and modification time in ns that tell whether it is still the same.

    Its name is text: making thousands of paths takes longer than asking for the times.
    """

    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Stamped:
        """A file as it is now.

        Raises:
            FileNotFoundError: it is not there.
        """
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns)


class FileCache(Generic[T]):
    """One kind of fact about the images' files.

    Used by several threads: an entry is replaced whole, and two that find the same fact missing both read the file.

    Args:
        ledger: where facts are kept from one start of the server to the next, as infos of the images.
        tag: of these infos.
        read: the fact from a file, as JSON can hold it.
        parse: what callers get of it.
    """

    def __init__(self, ledger: QueryLedger, tag: str, read: Callable[[Path], Any], parse: Callable[[Any], T]) -> None:
        self.ledger = ledger
        self.tag = tag
        self.read = read
        self.parse = parse
        self._known: dict[str, tuple[Stamped, T]] = {}

    def of(self, files: Mapping[str, Stamped]) -> dict[str, T]:
        """The fact of every file, by image."""
        unknown = [image for image, file in files.items() if not self._knows(image, file)]
        if unknown:
            self._recall(unknown, files)
            self._look([image for image in unknown if not self._knows(image, files[image])], files)
        return {image: self._known[image][1] for image in files}

    def _knows(self, image: str, file: Stamped) -> bool:
        known = self._known.get(image)
        return known is not None and known[0] == file

    def _recall(self, images: list[str], files: Mapping[str, Stamped]) -> None:
        many = len(images) >= _MANY
        kept = self.ledger.infos(self.tag) if many else {i: self.ledger.get_info(i, self.tag) for i in images}
        for image in images:
            info, file = kept.get(image) or {}, files[image]
            if info.get("stamp") == [file.size, file.changed] and "fact" in info:
                self._known[image] = file, self.parse(info["fact"])

    def _look(self, images: list[str], files: Mapping[str, Stamped]) -> None:
        for first in range(0, len(images), _CHUNK):
            found: dict[str, dict[str, Any]] = {}
            for image in images[first : first + _CHUNK]:
                file = files[image]
                fact = self.read(Path(file.path))
                found[image] = {"stamp": [file.size, file.changed], "fact": fact}
                self._known[image] = file, self.parse(fact)
            self.ledger.update_infos(found, self.tag)
