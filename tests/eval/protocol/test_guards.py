# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Guards: each refuses with one sentence that names the difference, and accepts equal inputs."""

import copy
import json

import pytest

from eval.__main__ import main
from eval.errors import RefereeError
from eval.protocol.guards import Steps, check_cells, check_no_test_image, check_same_origin, check_seeds
from eval.protocol.study import load_study
from eval.runner.run import Options, start_run


def cell(method, seed=1, start=(1, 2, 3), digest="a", steps=400, lr=0.01):
    model = {"digest": method, "round": 0, "bundle": "net", "members": 2, "recipe": {"steps": steps, "lr": lr}}
    region = {"image": "x", "start": list(start), "size": [4, 4, 4]}
    return Steps(
        method,
        seed,
        {"0.query": {"regions": [region]}, "0.annotate": {"digest": digest}, "0.train": {"model": model}},
    )


def test_equal_cells_pass_whatever_other_seeds_and_the_full_data_line_did():
    check_cells([cell("a"), cell("b"), cell("a", 2, (9, 9, 9), "z"), cell("full_data", 1, (0, 0, 0), "w")])
    check_cells([Steps("a", 1, {}), Steps("b", 1, {"0.train": {"model": None}})])


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (cell("b", start=(1, 2, 4)), "b_s1 and a_s1 did not start from the same regions"),
        (cell("b", digest="other"), "b_s1 and a_s1 got different answers to the same regions of round 0"),
        (cell("b", steps=300), r"trained differently in round 0 \(recipe.steps: 300 and 400\)"),
        (cell("b", seed=2, lr=0.1), r"b_s2 and a_s1 were trained differently in round 0 \(recipe.lr: 0.1 and 0.01\)"),
        (cell("full_data", start=(0, 0, 0), digest="w", steps=1), "full_data_s1 and a_s1 were trained differently"),
    ],
)
def test_cells_that_cannot_be_compared(other, sentence):
    with pytest.raises(RefereeError, match=sentence):
        check_cells([cell("a"), other])


def manifest(**changes):
    content = {
        "hardware": {"cpu": "c", "cores": 2, "gpu": None, "system": "Linux", "memory_gib": 20},
        "versions": {"python": "3.11", "packages": {"torch": "2"}, "patchwise": "commit", "code": "d"},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        content[part][name] = value
    return content


def test_origins():
    memory_only = manifest(hardware__memory_gib=21, versions__patchwise="later commit, same code")
    check_same_origin([("a", manifest()), ("b", memory_only)])
    for change, what in [
        ({"hardware__cpu": "other"}, r"different hardware \(cpu: other and c\)"),
        ({"versions__packages": {"torch": "3"}}, r"different versions \(packages.torch: 3 and 2\)"),
        ({"versions__code": "changed"}, "different project"),
        ({"versions__code": None, "versions__patchwise": "other"}, r"different project \(state: other and commit\)"),
    ]:
        with pytest.raises(RefereeError, match=f"b and a come from {what}"):
            check_same_origin([("a", manifest()), ("b", manifest(**change))])


def test_too_few_seeds():
    check_seeds({"a": 3, "b": 4}, "a ranking")
    with pytest.raises(RefereeError, match="a ranking needs 3 finished seeds of every method, but b has 2"):
        check_seeds({"a": 3, "b": 2}, "a ranking")


def test_test_scans_are_told_by_content():
    check_no_test_image({"p": "1", "extra": "9"}, {"t": "2"}, {"p": "1"})
    with pytest.raises(RefereeError, match="image p2 is test case t"):
        check_no_test_image({"p": "1", "p2": "2"}, {"t": "2"}, {"p": "1"})
    with pytest.raises(RefereeError, match="image p is not the scan"):
        check_no_test_image({"p": "3"}, {"t": "2"}, {"p": "1"})


def test_commands_exit_with_2_and_one_sentence(write_study, stand_in, tmp_path, capsys):
    out = tmp_path / "out"
    start_run(load_study(write_study(rounds=1)), out, Options(quiet=True))
    whole = json.loads((out / "manifest.json").read_text())

    def refused(*arguments) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2
        message = capsys.readouterr().err.strip()
        assert "\n" not in message
        return message

    assert "needs 3 finished seeds" in refused("report", out, "--claim")
    other = copy.deepcopy(whole)
    other["hardware"]["cpu"] = "another"
    (out / "manifest.json").write_text(json.dumps(other))
    assert "different hardware" in refused("resume", out, "--quiet")
    assert main(["resume", str(out), "--quiet", "--mixed"]) == 0
    assert json.loads((out / "manifest.json").read_text())["mixed"][0]["hardware"] == whole["hardware"]
    state = out / "cells" / "power_pe_s1" / "state.json"
    content = json.loads(state.read_text())
    content["steps"]["0.annotate"]["digest"] = "tampered"
    state.write_text(json.dumps(content))
    assert "different answers" in refused("report", out)
