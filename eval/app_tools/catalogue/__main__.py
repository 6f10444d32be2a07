# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Write the catalogue of query methods: `python -m eval.app_tools.catalogue`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.app_tools.catalogue.page import PAGE, PICTURES, catalogue, digest, picked
from eval.app_tools.catalogue.pictures import write_picture
from eval.files import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and its pictures; return 0."""
    parser = argparse.ArgumentParser(prog="python -m eval.app_tools.catalogue", description="Write the catalogue.")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="folder of the pictures")
    options = parser.parse_args(arguments)
    options.pictures.mkdir(parents=True, exist_ok=True)
    for name, picks, evidence in picked():
        write_picture(options.pictures / f"{name}.png", picks, evidence, digest(picks))
    write_text(options.out, catalogue())
    sys.stdout.write(f"catalogue: {options.out}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
