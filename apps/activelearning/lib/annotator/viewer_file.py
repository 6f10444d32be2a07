# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The viewer of the annotation page, which is brought into the environment by `make` and not kept in the project."""

from __future__ import annotations

import sys
from pathlib import Path

NAME, VERSION = "@niivue/niivue", "0.69.0"
# Of the package's archive, as the npm registry states it.
INTEGRITY = "sha512-YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA=="
# The module inside of the archive; the smaller one next to it exports no viewer.
MEMBER = "package/dist/index.js"
MISSING = (
    f"the viewer NiiVue {VERSION} is not in this environment; run `make viewer` in the project's folder (once, with "
    "access to the npm registry), then load the page again"
)


def viewer_place(prefix: Path | None = None) -> Path:
    """Place of the viewer in an environment."""
    return (prefix or Path(sys.prefix)) / "share" / "patchwise" / f"niivue-{VERSION}.js"


def viewer_file() -> Path | None:
    """The viewer, or None where it was not brought yet."""
    found = viewer_place()
    return found if found.is_file() else None
