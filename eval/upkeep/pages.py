# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Commands and links of the Markdown pages: checked by a test, run by `make docs`.

Every ```bash block carries a comment on the line before it:

    <!-- run: yes -->                                      `make docs` runs it, in one folder for all pages
    <!-- run: no; tested by tests/a.py::test_b, tests/c.py -->   each test must exist
    <!-- run: no; make demo -->                            the target must exist
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from eval.upkeep.style import ROOT, sources

# Pages whose commands run first; the others use the data and the run that these make.
FIRST = ("docs/tutorial/first-study.md",)
LINKED = ("Makefile", "apps", "bundles", "eval", "sample-datasets", "tests", "requirements.txt", "pyproject.toml")
REFERENCE = ROOT / "docs" / "reference"
LIMIT = 900  # seconds per block

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- run: (yes|no; .+?) -->\s*$")
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_CONF = re.compile(r"--conf (\w+)")
_EVAL = re.compile(r"python -m eval ([a-z]+)((?:\\\n|[^\n`#|;&])*)")
_TARGET = re.compile(r"^make ([a-z-]+)", re.MULTILINE)


class Block(NamedTuple):
    """A ```bash block: its page, the line of its fence, its mark (empty without one) and its commands."""

    page: Path
    line: int
    mark: str
    text: str


def pages() -> list[Path]:
    """Return the Markdown pages of the project."""
    return [path for path in sources() if path.suffix == ".md"]


def blocks(page: Path) -> Iterator[Block]:
    """Blocks of a page, from the top."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        if found[2] == "bash":
            before = text[: found.start()].rstrip("\n").rpartition("\n")[2]
            mark = _MARK.search(before)
            yield Block(page, text.count("\n", 0, found.start()) + 1, mark[1] if mark else "", found[3])


def unmarked(block: Block) -> Iterator[str]:
    """Faults of a block's mark: missing, or a test or target that does not exist."""
    if block.mark == "yes":
        return
    kind, _, names = block.mark.removeprefix("no; ").partition(" ")
    if kind == "make":
        if names not in targets():
            yield f"the Makefile has no target {names!r}"
    elif kind == "tested" and names.startswith("by "):
        for name in names.removeprefix("by ").split(", "):
            file, _, test = name.partition("::")
            if not (ROOT / file).is_file():
                yield f"there is no test {file}"
            elif test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8"):
                yield f"{file} has no test {test}"
    else:
        yield "expected a comment before the block: <!-- run: yes -->, or no; tested by FILE, or no; make TARGET"


@cache
def targets() -> frozenset[str]:
    """Return the targets of the Makefile."""
    return frozenset(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def option_names() -> frozenset[str]:
    """Return the names that `--conf` accepts, from their page, which a test compares with the code."""
    return frozenset(re.findall(r"^\| `(\w+)`", (REFERENCE / "options.md").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def _flags(command: str) -> frozenset[str]:
    """Return the flags of a command, from its page; none if there is no such command."""
    page = (REFERENCE / "commands.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return frozenset(re.findall(r"--[a-z][a-z-]*", section[1])) if section else frozenset()


def unknown_options(text: str) -> Iterator[str]:
    """Options, commands and targets in `text` that do not exist."""
    for name in _CONF.findall(text):
        if name not in option_names() and name != "NAME":
            yield f"--conf {name} is not an option of the app"
    for command, rest in _EVAL.findall(text):
        if not _flags(command):
            yield f"python -m eval {command} is not a command"
        for flag in re.findall(r"--[a-z][a-z-]*", rest):
            if flag not in _flags(command):
                yield f"python -m eval {command} has no option {flag}"
    for target in _TARGET.findall(text):
        if target not in targets():
            yield f"the Makefile has no target {target!r}"


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as the web host makes them."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 1
        while slug in found:
            slug, number = f"{slug.removesuffix(f'-{number - 1}')}-{number}", number + 1
        found.add(slug)
    return found


def broken_links(page: Path) -> Iterator[str]:
    """Relative links of a page whose file or heading does not exist."""
    text = re.sub(r"```.*?```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in _LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists():
            yield f"the link {target} leads nowhere"
        elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text(encoding="utf-8")):
            yield f"the link {target} leads to no heading"


def faults(page: Path) -> Iterator[str]:
    """Faults of a page, as `file:line: message` or `file: message`."""
    name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
    for block in blocks(page):
        for fault in unmarked(block):
            yield f"{name}:{block.line}: {fault}"
    text = page.read_text(encoding="utf-8")
    for fault in (*unknown_options(text), *broken_links(page)):
        yield f"{name}: {fault}"


def run_order() -> list[Block]:
    """Return the blocks that `make docs` runs, those of `FIRST` before the others."""
    found = [block for page in pages() for block in blocks(page) if block.mark == "yes"]
    first = [ROOT / name for name in FIRST]
    return sorted(found, key=lambda b: (first.index(b.page) if b.page in first else len(first), str(b.page), b.line))


def run(block: Block, folder: Path) -> float:
    """Run a block in `folder` with the current environment; return its seconds.

    Raises:
        RuntimeError: a command failed; the message holds the end of the output.
    """
    started = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key != "DATA"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    script = f"set -euo pipefail\n{block.text}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, timeout=LIMIT, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return time.monotonic() - started


def main(arguments: Sequence[str] | None = None) -> int:
    """Check all pages and, with --run, run their commands; return 1 if there is a fault, else 0."""
    parser = argparse.ArgumentParser(prog="python -m eval.upkeep.pages", description="Check the pages' commands.")
    parser.add_argument("--run", action="store_true", help="run the marked blocks in a temporary folder")
    options = parser.parse_args(arguments)
    found = [fault for page in pages() for fault in faults(page)]
    sys.stdout.write("".join(f"{fault}\n" for fault in found))
    if found or not options.run:
        return 1 if found else 0
    with tempfile.TemporaryDirectory(prefix="pages-") as place:
        folder = Path(place)
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(sys.prefix)
        for block in run_order():
            name = f"{block.page.relative_to(ROOT)}:{block.line}"
            try:
                sys.stdout.write(f"{name}: {run(block, folder):.0f} s\n")
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                sys.stdout.write(f"{name}: {error}\n")
                return 1
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
