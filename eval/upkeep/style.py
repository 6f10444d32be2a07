# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The English of docstrings and Markdown pages: a table of habits that `make lint` refuses.

Only habits that a pattern finds with few false alarms are in the table. Code, formulas and link targets are not read;
texts of options (`description=`, `help=`) are, and therefore not the parts of pages that are written from them.
`python -m eval.upkeep.style` prints `file:line: message` per finding and ends with exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("apps", "bundles", "docs", "eval", "sample-datasets", "tests")
LONGEST = 40  # words of a sentence; the goal is 25


class Habit(NamedTuple):
    """A habit: its name, a pattern (a space stands for any white space), the reason and the replacement."""

    name: str
    pattern: str
    reason: str
    instead: str


class Passage(NamedTuple):
    """A paragraph, list item, heading or table row, with the line of its first character."""

    line: int
    text: str


class Finding(NamedTuple):
    """A place and the message about it."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        """Return `file:line: message`."""
        return f"{self.path}:{self.line}: {self.message}"


_MACHINES = (
    "servers?|apps?|referees?|ledgers?|pages?|logs?|registry|clients?|networks?|tables?|files?|manifests?|stores?|"
    "caches?|routes?|scripts?|commands?|reports?|functions?|modules?|plans?|headers?|readers?|programs?|machines?|"
    "processes|datastores?|archives?|titles?|names?|messages?|trainers?|trainings?"
)
_TOLD = "says?|said|tells?|told|hears?|heard|knows?|knew|thinks?|believes?|wants?|asks?|speaks?|notices?"
_UNITS = (
    "voxel|class|case|round|step|member|image|scan|position|slice|patch|unit|seed|method|cell|region|query|batch|crop|"
    "GPU|CPU|device|thread|process|request|line|row|file|second|minute|hour|sample|fold|package|value|option|record|"
    "channel|bundle|study|client|annotator|axis|component|series|tile|worker|machine|axis|sentence"
)
_COUNTED = (
    r"once|one|two|three|four|ten|\d+|bytes?|seconds?|minutes?|mm|GiB|MiB|values?|rows?|passes|pass|server|scores?|"
    "entry|entries|draws?|steps?|lines?|flags?|numbers?|weights?|maps?|hours?|cores?|threads?|voxels?|regions?|metrics?"
)

HABITS: tuple[Habit, ...] = (
    Habit(
        "proposal",
        r"\bproposals?\b|\bmodels? (?:has |had |have )?proposed?\b",
        "one word for one thing: a model predicts",
        "prediction",
    ),
    Habit(
        "whoever",
        r"\b(?:[Ww]hoever|[Ww]homever|[Nn]obody|[Ss]omebody|[Aa]nybody|[Ee]verybody)\b",
        "a pronoun hides the role",
        "the caller, the client, the annotator, no client",
    ),
    Habit(
        "who-clause",
        r"(?:^|[.;:] |\b(?:and|or|of|for|to|by|from|with|if|while|but) )[Ww]ho (?!is who)(?=[a-z])(?![^.]*\?)",
        "a clause stands where a noun exists",
        "the caller, the client, the annotator",
    ),
    Habit(
        "what-clause",
        r"(?:^|[.;:] )What (?=[a-z`])(?![^.]*\?)"
        r"|\b(?:of|from|by|with|for|to|in|on|at|into|about|than|as|is|are|was|were|and|or|see) "
        r"what (?=[a-z`])(?![^.]*\?)",
        "a clause stands where a noun exists",
        "a noun: the result, the content, the derived state",
    ),
    Habit(
        "machine-speaks",
        rf"\b(?:{_MACHINES}) (?:also |never |only |then |itself |always )?(?:{_TOLD})\b"
        rf"|\b(?:{_MACHINES}) (?:does not|do not|cannot|can|may|must|would) (?:say|tell|hear|know|think|ask|speak)\b"
        rf"|\b(?:{_MACHINES}) (?:is|are|was|were) (?:told|asked)\b",
        "machines do not speak, hear or know",
        "returns, logs, reports, records, requests",
    ),
    Habit(
        "a-for-per",
        rf"\b(?:{_COUNTED}) an? (?:{_UNITS})\b"
        r"(?=[.,;:)\]]|\s*$| (?:and|or|of|in|at|on|for|from|with|by|that|which|where)\b)",
        "a rate is per something",
        "per voxel, per class, per round",
    ),
    Habit(
        "negated-noun",
        r"(?<!there\s)\b(?:is|are) no (?!longer\b|more\b|less\b|different\b|\w+er\b|one\b|such\b)[a-z]+\b",
        "the verb is negated, not the noun",
        "is not a ..., must not be ...",
    ),
)
"""Habits of running text, in docstrings and pages."""

OPENERS: tuple[Habit, ...] = (
    Habit("lower-case", r"[a-z][a-z]+ ", "a docstring starts a sentence", "a capital, or the name in backquotes"),
    Habit(
        "clause",
        r"(?:Whether|What|Who|How|Why|Where|When|If) ",
        "the first line is an imperative or a noun phrase",
        "Return whether ..., Content of ..., Reason for ...",
    ),
    Habit(
        "third-person",
        r"(?:Returns|Gives|Makes|Takes|Reads|Writes|Checks|Compares|Accepts|Keeps|Holds|Says|Tells|Gets|Puts|Runs|"
        r"Sends|Shows|Sets|Tries|Draws|Adds|Creates|Computes|Loads|Lets|Brings|Waits|Refuses|Raises|Answers|Counts)\b"
        r"(?! (?:of|per|in|that|which|by|from|for|and)\b)",
        "the first line is an imperative or a noun phrase",
        "Return ..., Read ..., Check ...",
    ),
    Habit("give", r"Give\b|Tell\b|Say\b", "functions return", "Return ..., Log ..., Report ..."),
)
"""Bad first words of a docstring."""


def _compiled(habit: Habit) -> re.Pattern[str]:
    return re.compile(habit.pattern.replace(" ", r"\s+"))


_HABITS = [(habit, _compiled(habit)) for habit in HABITS]
_OPENERS = [(habit, _compiled(habit)) for habit in OPENERS]
_SENTENCE = re.compile(r"(?<=[.!?])[)\"'*]*\s+(?=[A-Z`(\"*\[])")
_HIDDEN = re.compile(
    r"```.*?```|<!-- begin:.*?<!-- end -->|<!--.*?-->|``[^`]+``|`[^`]+`|\$\$.+?\$\$|\$[^$\n]+\$|(?<=\])\([^)\s]*\)",
    re.DOTALL,
)
_ITEM = re.compile(r"^\s*(?:[-*+] |\d+\. |#|\||>|\w+(?:Error|Exception|Exhausted|Exit|Interrupt): )")


def hidden(text: str) -> str:
    """`text` with code, comments, formulas and link targets blanked out; every character keeps its place."""

    def blank(found: re.Match[str]) -> str:
        mark = "`" if found[0].startswith("`") and not found[0].startswith("```") else " "
        return "".join("\n" if c == "\n" else mark for c in found[0])

    return _HIDDEN.sub(blank, text)


def passages(text: str, first: int = 1) -> Iterator[Passage]:
    """Paragraphs, list items, headings and table rows of `text`, whose first line has the number `first`."""
    held: list[str] = []
    start = first
    for number, line in enumerate(hidden(text).split("\n"), start=first):
        if held and (not line.strip() or _ITEM.match(line)):
            yield Passage(start, "\n".join(held))
            held = []
        if line.strip():
            start = start if held else number
            held.append(line)
    if held:
        yield Passage(start, "\n".join(held))


def check_passage(passage: Passage) -> Iterator[tuple[int, str]]:
    """Line and message per habit found in a passage, and per sentence that is too long."""
    if passage.text.lstrip().startswith("|"):
        cells = passage.text.split("|")
        checked = [Passage(passage.line, cell.strip()) for cell in cells if cell.strip()]
    else:
        bare = re.sub(r"^(\s*)(?:[-*+]|\d+\.|#+|>) ", lambda m: m[1], passage.text)
        checked = [Passage(passage.line, bare.strip())]
    for line, text in checked:
        for habit, pattern in _HABITS:
            for found in pattern.finditer(text):
                words = " ".join(found[0].split()).strip(".;: ")
                at = line + text[: found.start() + len(found[0]) - len(found[0].lstrip())].count("\n")
                yield at, f'{habit.name}: "{words}": {habit.reason}; write: {habit.instead}'
        place = 0
        for sentence in _SENTENCE.split(text):
            words_of = [w for w in sentence.split() if re.search(r"\w", w)]
            if len(words_of) > LONGEST:
                at = line + text[: text.index(sentence, place)].count("\n")
                yield at, f"long-sentence: {len(words_of)} words, the limit is {LONGEST}; write two sentences"
            place = text.index(sentence, place) + len(sentence)


def check_page(text: str) -> list[tuple[int, str]]:
    """Line and message per finding in a Markdown page."""
    return [found for passage in passages(text) for found in check_passage(passage)]


def check_module(source: str) -> list[tuple[int, str]]:
    """Line and message per finding in the docstrings and texts of options of a Python module."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.keyword)
            and node.arg in ("description", "help")
            and isinstance(node.value, ast.Constant)
        ):
            found += [
                finding for p in passages(str(node.value.value), node.value.lineno) for finding in check_passage(p)
            ]
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node, clean=False)
        if text is None:
            continue
        line = node.body[0].lineno
        found += [
            (line, f"{habit.name}: {habit.reason}; write: {habit.instead}")
            for habit, pattern in _OPENERS
            if pattern.match(text)
        ]
        found += [finding for passage in passages(text, line) for finding in check_passage(passage)]
    return sorted(found)


def sources(root: Path = ROOT) -> list[Path]:
    """Python modules and Markdown pages of the project; output folders are not among `FOLDERS`."""
    found = [*root.glob("*.md")]
    for folder in FOLDERS:
        for ending in ("*.py", "*.md"):
            found += (root / folder).rglob(ending)
    return sorted(found)


def check(paths: Sequence[Path], root: Path = ROOT) -> list[Finding]:
    """Findings of all `paths`, in their order."""
    found: list[Finding] = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        name = str(path.relative_to(root) if path.is_relative_to(root) else path)
        checked = check_page(text) if path.suffix == ".md" else check_module(text)
        found += [Finding(name, line, message) for line, message in checked]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; return 1 if there is one, else 0."""
    parser = argparse.ArgumentParser(prog="python -m eval.upkeep.style", description="Check docstrings and pages.")
    parser.add_argument("paths", nargs="*", type=Path, help="files and folders to check; default: the whole project")
    parser.add_argument("--pages", action="store_true", help="Markdown pages only")
    parser.add_argument("--counts", action="store_true", help="the number of findings per file")
    options = parser.parse_args(arguments)
    chosen = [path.resolve() for path in options.paths]
    below = [path for path in sources() if any(path.is_relative_to(folder) for folder in chosen)]
    paths = [*(path for path in chosen if path.is_file()), *(path for path in below if path not in chosen)]
    found = check([path for path in (paths if chosen else sources()) if path.suffix == ".md" or not options.pages])
    if options.counts:
        counts = Counter(finding.path for finding in found)
        sys.stdout.write("".join(f"{count:5} {path}\n" for path, count in counts.most_common()))
    else:
        sys.stdout.write("".join(f"{finding}\n" for finding in found))
    sys.stdout.write(f"{len(found)} findings in {len({finding.path for finding in found})} files\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
