# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The reference of options, recipes and commands, written from the code: `python -m eval.app_tools.reference_pages`.

A page keeps its own text; only the part between two marks is written.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from eval.app_path import APP, add_app
from eval.files import write_text

add_app()

from lib.models.recipe import Recipe  # noqa: E402  the app's path comes first
from lib.options import AppOptions  # noqa: E402

ROOT = APP.parents[1]
REFERENCE = ROOT / "docs" / "reference"
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}  # sorted by name, lower bounds come first
BEGIN, END = "<!-- begin: written by `make reference` -->", "<!-- end -->"


def options_table() -> str:
    """Return the options of the app as a Markdown table."""
    return _table(AppOptions)


def recipes_table() -> str:
    """Return the options of a recipe as a Markdown table."""
    return _table(Recipe)


def _table(model: type[BaseModel]) -> str:
    lines = ["| option | default | values | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{name}` | {_default(field.default)} | {_values(field)} | {meaning} |")
    return "\n".join(lines)


def _values(field: FieldInfo) -> str:
    """Return the choices or bounds of a field, as far as its type declares them."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    if field.annotation is bool:
        return "`true`, `false`"
    bounds = {name: getattr(rule, name) for rule in field.metadata for name in _BOUNDS if hasattr(rule, name)}
    return ", ".join(f"{_BOUNDS[name]} {bound:,.10g}" for name, bound in sorted(bounds.items()))


def _default(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, (list, tuple)):
        return f"`{','.join(map(str, value))}`"
    return f"`{json.dumps(value)}`" if isinstance(value, (dict, bool)) else f"`{value}`"


@cache
def help_of(*arguments: str) -> str:
    """Return the help of `python -m eval ARGUMENTS`, 100 columns wide; empty if there is no such command."""
    command = [sys.executable, "-m", "eval", *arguments, "--help"]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False).stdout


def command_names() -> list[str]:
    """Return the commands of `python -m eval`, in the order of its help."""
    return re.findall(r"^    ([a-z]+)(?:  |$)", help_of(), re.MULTILINE)


def commands_text() -> str:
    """Return a section per command with its help."""
    return "\n\n".join(f"## {name}\n\n```text\n{help_of(name).rstrip()}\n```" for name in command_names())


PAGES: dict[str, Callable[[], str]] = {
    "options.md": options_table,
    "recipes.md": recipes_table,
    "commands.md": commands_text,
}
"""Writer of the generated part of each page."""


def written(page: str, part: str) -> str:
    """Return `page` with `part` between its marks.

    Raises:
        ValueError: a page without the two marks.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks its marks: expected {BEGIN} and {END}; add both")
    return f"{head}{BEGIN}\n\n{part}\n\n{END}{tail}"


def main() -> int:
    """Write the generated parts of all pages; return 0."""
    for name, write in PAGES.items():
        path: Path = REFERENCE / name
        write_text(path, written(path.read_text(encoding="utf-8"), write()))
        sys.stdout.write(f"reference: {path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
