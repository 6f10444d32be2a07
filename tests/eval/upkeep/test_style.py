# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

from pathlib import Path

import pytest

from eval.upkeep.style import HABITS, OPENERS, check, check_module, check_page, hidden, main, sources

REFUSED = [
    ("proposal", "The proposal of the model is kept."),
    ("proposal", "It compares the answer with the label that the model proposed."),
    ("whoever", "Whoever calls holds the lock."),
    ("whoever", "The region was shown to nobody."),
    ("who-clause", "Who asks singly gets the next one."),
    ("who-clause", "It is given to annotators and who waits gets one."),
    ("what-clause", "What `--conf` may hold; anything else is refused."),
    ("what-clause", "The sum of what was annotated."),
    ("what-clause", "The label is what\nthe ledger holds."),
    ("machine-speaks", "The server tells the client."),
    ("machine-speaks", "The ledger does not know the image."),
    ("machine-speaks", "The client is told the reason."),
    ("a-for-per", "It returns one value a position."),
    ("a-for-per", "It takes 3 bytes a voxel, and more."),
    ("a-for-per", "One pass a round and no more."),
    ("negated-noun", "Names are no paths."),
    ("negated-noun", "A slice that is no class is refused."),
]

ACCEPTED = [
    "The prediction of the model is kept.",
    "The caller must hold the lock.",
    "Annotators who share an address share their regions.",
    "What is a region?",
    "Who works on this image?",
    "The server returns the label, and logs the reason.",
    "One value per position; the number of values a voxel may take is the number of classes.",
    "Names must not contain path separators.",
    "There is no GPU, and the curve is no longer flat.",
    "It is no larger than the image.",
    "The command is `what is a server that tells one value a voxel`.",
    "A link [to the page](nobody/whoever.md) is not read.",
    "The equation $u = what a voxel$ is not read.",
]


@pytest.mark.parametrize(("name", "text"), REFUSED)
def test_a_bad_habit_is_found_once_in_docstrings_and_pages(name: str, text: str) -> None:
    assert [message.split(":")[0] for _, message in check_page(text)] == [name]
    found = check_module(f'"""A module.\n\n{text}\n"""')
    assert [message.split(":")[0] for _, message in found] == [name] * len(found)
    assert found


@pytest.mark.parametrize("text", ACCEPTED)
def test_plain_sentences_pass(text: str) -> None:
    assert check_page(text) == []
    assert check_module(f'"""A module.\n\n{text}\n"""') == []


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("lower-case", "sum over classes."),
        ("clause", "Whether the box is free."),
        ("clause", "Where the library is."),
        ("third-person", "Returns the label."),
        ("third-person", "Accepts a list."),
        ("give", "Give the exit code."),
    ],
)
def test_bad_first_lines_of_docstrings(name: str, first: str) -> None:
    found = check_module(f'def f() -> None:\n    """{first}"""\n')
    assert [(line, message.split(":")[0]) for line, message in found] == [(2, name)]


@pytest.mark.parametrize(
    "first",
    ["Return the label.", "Cached moments of an image.", "`alpha` times the entropy.", "Counts of regions per class.",
     "Runs of units, image by image.", "U_c = entropy * mean_c."],
)  # fmt: skip
def test_good_first_lines_of_docstrings(first: str) -> None:
    assert check_module(f'def f() -> None:\n    """{first}"""\n') == []


def test_sentences_are_counted_in_words() -> None:
    assert check_page(" ".join(["Word", *["word"] * 39]) + ".") == []
    found = check_page("A short one. " + " ".join(["Word", *["word"] * 40]) + ".")
    assert found == [(1, "long-sentence: 41 words, the limit is 40; write two sentences")]


def test_items_and_cells_are_sentences_of_their_own() -> None:
    half = " ".join(["word"] * 30)
    assert check_page(f"- {half}\n- {half}\n") == []
    assert check_page(f"| {half} | {half} |\n") == []
    assert len(check_page(f"{half}\n{half}\n")) == 1


def test_findings_have_the_line_of_the_word() -> None:
    page = (
        "# Title\n\nOne line,\nand nobody reads\nthe third.\n\n```bash\nwhoever\n```\n\n- an item of what\n  is left\n"
    )
    assert [line for line, _ in check_page(page)] == [4, 11]
    module = '"""A module."""\n\n\nclass A:\n    """A class.\n\n    It is kept for nobody.\n    """\n'
    assert [line for line, _ in check_module(module)] == [7]


def test_hidden_text_keeps_its_place() -> None:
    text = "a `b c` d <!-- e\nf --> g [h](i.md)"
    assert len(hidden(text)) == len(text)
    assert [i for i, c in enumerate(hidden(text)) if c == "\n"] == [i for i, c in enumerate(text) if c == "\n"]
    assert "b c" not in hidden(text)
    assert "i.md" not in hidden(text)


def test_comments_and_code_of_modules_are_not_read() -> None:
    assert check_module('"""A module."""\n\nnobody = "the server says"  # whoever\n') == []


def test_texts_of_options_are_read_and_parts_written_from_them_are_not() -> None:
    module = '"""A module."""\n\nadd(\n    "--n",\n    help="bytes a voxel, and more",\n    name="bytes a voxel",\n)\n'
    assert [(line, message.split(":")[0]) for line, message in check_module(module)] == [(5, "a-for-per")]
    assert check_page("One.\n\n<!-- begin: written -->\n\n| bytes a voxel |\n\n<!-- end -->\n\nTwo.\n") == []


def test_every_habit_names_a_reason_and_a_replacement() -> None:
    assert all(habit.reason and habit.instead for habit in (*HABITS, *OPENERS))
    assert {name for name, _ in REFUSED} == {habit.name for habit in HABITS}


def test_the_command_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, module = tmp_path / "page.md", tmp_path / "module.py"
    page.write_text("One line.\nAsk nobody.\n")
    module.write_text('"""Returns nothing."""\n')
    assert main([str(page), str(module)]) == 1
    out = capsys.readouterr().out
    assert f"{page}:2: whoever:" in out
    assert f"{module}:1: third-person:" in out
    assert main([str(page), str(module), "--pages", "--counts"]) == 1
    assert "1 findings in 1 files" in capsys.readouterr().out
    page.write_text("One line.\n")
    assert main([str(page)]) == 0


def test_the_pages_of_the_project_pass() -> None:
    pages = [path for path in sources() if path.suffix == ".md"]
    assert len(pages) > 30
    assert [str(finding) for finding in check(pages)] == []
