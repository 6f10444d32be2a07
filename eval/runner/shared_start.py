# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The first training of a seed, done once for all methods of a study.

In round 0 all methods have the same regions, so their trainings are equal. The server names a training's files by the
digest of its inputs (labels, images, recipe, seeds, network) and continues with existing members; linked files of other
labels are never read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from eval.files import place

STATE = ".patchwise"
_NAME_LENGTH = 16  # of a digest, in the server's folders of trainings


class SharedStart:
    """Start models shared by the cells of a run: those trained for `seed` are linked into this cell's model folder.

    The cell's own trainings are kept for the cells that follow.

    Args:
        cell: folder of the cell, `<run>/cells/<name>`.
        seed: of the cell.
        bundle: name of the network.
    """

    def __init__(self, cell: Path, seed: int, bundle: str) -> None:
        self.lent = cell.parent.parent / "starts" / str(seed)
        self.models = cell / "studies" / STATE / "models" / bundle
        found = sorted(self.lent.glob("[!.]*")) if self.lent.is_dir() else []
        for source in found:
            _link(source, self.models / source.name)
        # Also those that existed before: a cell that was killed in between linked them then.
        self.borrowed = {source.name for source in found}

    def keep(self, digest: str) -> bool:
        """Keep a finished training for the cells that follow; return whether another cell trained it."""
        name = digest[:_NAME_LENGTH]
        _link(self.models / name, self.lent / name)
        return name in self.borrowed


def _link(source: Path, target: Path) -> None:
    """Link the finished members of `source` into `target`, all or none; an existing folder stays unchanged."""
    if target.exists() or not source.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as name:
        made = Path(name) / "made"
        made.mkdir()
        for file in _members(source):
            place(file, made / file.name)
        with suppress(OSError):  # another cell has linked them first
            os.rename(made, target)


def _members(folder: Path) -> Iterator[Path]:
    """Weights and heads, without the resume files of unfinished members."""
    return (file for file in sorted(folder.glob("member_*.pt")) if not file.name.endswith(".unfinished.pt"))
