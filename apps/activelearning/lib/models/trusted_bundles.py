# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Trusted places of bundles: their configuration can import and call anything, so it is treated as code."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from pathlib import Path

from lib.options import OptionError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")


def trusted_bundle(folder: Path, name: str, written: Iterable[Path]) -> Path:
    """Folder of the bundle that the operator named, if only the operator can have written it.

    Args:
        folder: parent folder of the bundles.
        written: folders that requests write into.

    Raises:
        OptionError: the name is a path or leads out of `folder`, requests write into the place, or every user of the
            machine may change the files.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise OptionError(f"--conf models {name[:80]!r}: name a folder of {folder}; --conf bundles names another place")
    root, found = folder.resolve(), (folder / name).resolve()
    if root not in found.parents:
        raise OptionError(f"bundle {name} lies in {found}, outside of {root}; copy it there if you trust its code")
    for place in written:
        if found == place.resolve() or place.resolve() in found.parents:
            raise OptionError(f"bundle {name} lies in {place}, where requests write to; bundles run code, move it")
    for path in (found, *found.glob("configs"), *found.glob("configs/*.json")):
        # The reader of the bundle reports a missing one.
        if path.exists() and path.stat().st_mode & stat.S_IWOTH:
            raise OptionError(f"{path} is writable by every user, and bundles run code: chmod o-w {path}")
    return found
