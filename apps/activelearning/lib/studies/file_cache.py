# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Facts about files, cached in memory and in the ledger until a file's size or modification time changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from lib.errors import PatchwiseError
from lib.ledger.queries import QueryLedger

T = TypeVar("T")

# From this number of unknown files on, one query of the ledger reads the facts of all files.
_MANY = 8
# Facts per transaction, so that an interruption does not lose the work on a large pool.
_CHUNK = 200


class Stamped(NamedTuple):
    """A file, and its size in bytes and modification time in ns, which reveal a change.

    Its name is text: creating thousands of paths takes longer than reading the times.
    """

    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Stamped:
        """A file as it is now.

        Raises:
            FileNotFoundError: it does not exist.
        """
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns)


class FileCache(Generic[T]):
    """One kind of fact about the images' files.

    Several threads may use it: an entry is replaced as a whole, and two threads that miss the same fact both read the
    file.

    Args:
        ledger: store of the facts across restarts, as infos of the images.
        tag: tag of these infos.
        read: function from a file to the fact in JSON.
        parse: function from JSON to the value for callers.
    """

    def __init__(self, ledger: QueryLedger, tag: str, read: Callable[[Path], Any], parse: Callable[[Any], T]) -> None:
        self.ledger = ledger
        self.tag = tag
        self.read = read
        self.parse = parse
        self._known: dict[str, tuple[Stamped, T]] = {}

    def of(self, files: Mapping[str, Stamped]) -> dict[str, T]:
        """The fact of every file, by image.

        Raises:
            PatchwiseError: a file that cannot be read.
            OSError: a file that cannot be opened.
        """
        found, failed = self.readable(files)
        for error in failed.values():
            raise error
        return found

    def readable(self, files: Mapping[str, Stamped]) -> tuple[dict[str, T], dict[str, PatchwiseError | OSError]]:
        """The fact of every file that can be read, and the error of every other one, which is read again next time."""
        unknown = [image for image, file in files.items() if not self._knows(image, file)]
        failed: dict[str, PatchwiseError | OSError] = {}
        if unknown:
            self._recall(unknown, files)
            failed = self._look([image for image in unknown if not self._knows(image, files[image])], files)
        return {image: self._known[image][1] for image in files if image not in failed}, failed

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

    def _look(self, images: list[str], files: Mapping[str, Stamped]) -> dict[str, PatchwiseError | OSError]:
        failed: dict[str, PatchwiseError | OSError] = {}
        for first in range(0, len(images), _CHUNK):
            found: dict[str, dict[str, Any]] = {}
            for image in images[first : first + _CHUNK]:
                file = files[image]
                try:
                    fact = self.read(Path(file.path))
                except (PatchwiseError, OSError) as error:
                    failed[image] = error
                    continue
                found[image] = {"stamp": [file.size, file.changed], "fact": fact}
                self._known[image] = file, self.parse(fact)
            self.ledger.update_infos(found, self.tag)
        return failed
