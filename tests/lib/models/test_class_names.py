# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json

import pytest

from lib.models.class_names import check_same_ids, resolve_classes
from lib.options import OptionError, parse_options

METADATA = {"network_data_format": {"outputs": {"pred": {"channel_def": {"0": "background", "1": "bundle"}}}}}


def test_the_option_comes_before_the_folder_and_the_folder_before_the_bundle(tmp_path):
    assert resolve_classes(None, tmp_path, METADATA) == {"bundle": 1}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "2": "b", "1": "a"}}))
    assert list(resolve_classes(None, tmp_path, METADATA).items()) == [("a", 1), ("b", 2)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 2, "b": 1}}))
    assert list(resolve_classes(None, tmp_path, METADATA).items()) == [("b", 1), ("a", 2)]
    assert resolve_classes({"c": 1}, tmp_path, METADATA) == {"c": 1}


@pytest.mark.parametrize("labels", [{"a": 2}, {"a": 1, "b": 1}, {"a": 1, "b": 3}, {"a": "x"}, {"background": 0}])
def test_ids_that_no_client_can_number_are_refused(tmp_path, labels):
    with pytest.raises(OptionError, match="--conf labels: class ids must be"):
        resolve_classes(labels, tmp_path, {})


def test_a_class_with_answers_keeps_its_id():
    known = {"anterior": 1, "posterior": 2}
    check_same_ids(known, None)
    check_same_ids({**known, "third": 3}, known)
    with pytest.raises(OptionError, match="and now anterior is 2; labels would change their meaning"):
        check_same_ids({"posterior": 1, "anterior": 2}, known)
    with pytest.raises(OptionError, match="there is no posterior"):
        check_same_ids({"anterior": 1}, known)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ("background,a", "background is no class, and takes an id of one; leave it out"),
        ("a,ignore,b", "ignore is no class, and takes an id of one; leave it out"),
        ("a,b,a", "class 'a' is named twice, expected each name once; remove one"),
    ],
)
def test_names_that_are_no_classes_are_named(tmp_path, labels, sentence):
    with pytest.raises(OptionError, match=sentence):
        resolve_classes(parse_options({"labels": labels}).labels, tmp_path, {})
