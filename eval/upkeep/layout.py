# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Sizes that keep the code readable: at most 12 modules per folder and 400 lines per module.

`python -m eval.upkeep.layout` prints folders and modules above a limit and ends with 1. Import rules are contracts in
pyproject.toml.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

MOST_MODULES, MOST_LINES = 12, 400
# A folder of plug-ins may grow.
GROWING = frozenset({"selectors"})
FOLDERS = ("apps/activelearning", "eval", "sample-datasets")


def oversized(root: Path, folders: Sequence[str] = FOLDERS) -> list[str]:
    """Return one sentence for each folder with too many modules and each module with too many lines."""
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py") if "." not in path.parent.name)
    modules = Counter(path.parent for path in files if path.name != "__init__.py")
    found = [
        f"{folder.relative_to(root)}: {count} modules, at most {MOST_MODULES}; split the package by its nouns"
        for folder, count in sorted(modules.items())
        if count > MOST_MODULES and folder.name not in GROWING
    ]
    for path in files:
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MOST_LINES:
            found.append(f"{path.relative_to(root)}: {lines} lines, at most {MOST_LINES}; split the module")
    return found


def main() -> int:
    """Print folders and modules above a limit; return 1 if there is one."""
    found = oversized(Path(__file__).resolve().parents[2])
    print("\n".join(found) or f"no folder above {MOST_MODULES} modules, no module above {MOST_LINES} lines")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
