# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lib.partial_labels import (
    UNLABELLED,
    ClasswiseLabels,
    LabelError,
    check_values,
    class_voxels,
    labelled_voxels,
    merge,
    possible_classes,
    remap_by_name,
    settle_values,
    unlabelled,
    values_in,
)
from lib.regions import Region

CLASSES = {"anterior": 1, "posterior": 2}
SHAPE = (6, 5, 4)
labels = arrays(np.uint8, SHAPE, elements=st.sampled_from([0, 1, 2]))
partial = arrays(np.uint8, SHAPE, elements=st.sampled_from([0, 1, 2, UNLABELLED]))


@st.composite
def region(draw):
    start = [draw(st.integers(0, n - 1)) for n in SHAPE]
    size = [draw(st.integers(1, n - s)) for n, s in zip(SHAPE, start, strict=True)]
    return Region("case", tuple(start), tuple(size))


@given(partial, labels, region())
def test_merge_changes_the_region_and_nothing_else(current, answer, box):
    before = current.copy()
    merged = merge(current, answer, [box])
    inside = np.zeros(SHAPE, bool)
    inside[box.slices] = True
    assert np.array_equal(merged[inside], answer[inside])
    assert np.array_equal(merged[~inside], current[~inside])
    assert np.array_equal(current, before)


@given(labels, st.lists(region(), min_size=1, max_size=4))
def test_disjoint_or_not_the_same_truth_merges_in_any_order(truth, boxes):
    forward = merge(unlabelled(SHAPE), truth, boxes)
    backward = merge(unlabelled(SHAPE), truth, boxes[::-1])
    assert np.array_equal(forward, backward)
    inside = np.zeros(SHAPE, bool)
    for box in boxes:
        inside[box.slices] = True
    assert labelled_voxels(forward) == inside.sum()
    assert np.array_equal(forward[inside], truth[inside])


@given(partial, partial, region())
def test_an_unlabelled_answer_takes_no_label_back(current, answer, box):
    merged = merge(current, answer, [box])
    left_out = answer == UNLABELLED
    assert np.array_equal(merged[left_out], current[left_out])


def test_merge_refuses_other_shapes_and_regions_outside():
    with pytest.raises(LabelError, match=r"\(6, 5, 4\)"):
        merge(unlabelled(SHAPE), np.zeros((6, 5, 5), np.uint8), [])
    with pytest.raises(LabelError, match="leaves the image"):
        merge(unlabelled(SHAPE), np.zeros(SHAPE, np.uint8), [Region("case", (5, 0, 0), (2, 1, 1))])


@given(
    arrays(
        np.uint8, array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=9), elements=st.sampled_from([0, 3, 255])
    )
)
def test_values_are_found_without_sorting(label):
    for ordered in (label, np.asfortranarray(label), label[::2, :, ::-1]):
        assert values_in(ordered) == np.unique(ordered).tolist()


def test_segments_are_matched_by_name_not_by_value():
    submitted = np.array([0, 1, 2, 3], np.uint8).reshape(4, 1, 1)
    info = [{"name": "Posterior", "idx": 1}, {"name": "ANTERIOR", "idx": 2}, {"name": "query_region", "idx": 3}]
    assert remap_by_name(submitted, info, CLASSES).ravel().tolist() == [0, 2, 1, 0]


def test_extra_segments_without_voxels_and_missing_segments_are_harmless():
    submitted = np.array([0, 1], np.uint8).reshape(2, 1, 1)
    info = [{"name": "posterior", "idx": 1}, {"name": "scratch", "idx": 2}]
    assert remap_by_name(submitted, info, CLASSES).ravel().tolist() == [0, 2]


@pytest.mark.parametrize(
    ("info", "sentence"),
    [
        ([{"name": "tumour", "idx": 1}], r"1 \(tumour\).*known classes are anterior, posterior"),
        ([{"name": "anterior", "idx": 2}], r"1 \(without a name\)"),
        ([{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 1}], "both anterior and posterior"),
        ([{"name": "anterior"}], "name and a whole number idx"),
        ([{"name": "anterior", "idx": 300}], "0 to 254"),
    ],
)
def test_what_cannot_be_matched_is_refused(info, sentence):
    with pytest.raises(LabelError, match=sentence):
        remap_by_name(np.ones((2, 1, 1), np.uint8), info, CLASSES)


def test_without_names_values_are_class_ids():
    submitted = np.array([0, 2, UNLABELLED], np.uint8).reshape(3, 1, 1)
    assert np.array_equal(remap_by_name(submitted, None, CLASSES), submitted)
    with pytest.raises(LabelError, match=r"\[7\].*1 for anterior, 2 for posterior"):
        remap_by_name(np.full((1, 1, 1), 7, np.uint8), None, CLASSES)


LEFT_OUT = [{"name": "anterior", "idx": 2}, {"name": "posterior", "idx": 3}]


@pytest.mark.parametrize(
    ("info", "values", "expected"),
    [
        # Slicer left the first segment out: its numbers count it, the file does not.
        (LEFT_OUT, [0, 1], [0, 1]),
        (LEFT_OUT, [1, 2], [1, 2]),
        ([{"name": "posterior", "idx": 1}, {"name": "anterior", "idx": 3}], [1, 2], [2, 1]),
        # Only the numbers fit.
        (LEFT_OUT, [2, 3], [1, 2]),
        ([{"name": "posterior", "idx": 2}], [0, 2], [0, 2]),
        ([{"name": "background", "idx": 0}, *LEFT_OUT], [2, 0], [1, 0]),
        # Both fit and mean the same.
        ([{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 3}], [1, 0], [1, 0]),
    ],
)
def test_segments_left_out_of_an_export_shift_no_class(info, values, expected):
    submitted = np.array(values, np.uint8).reshape(-1, 1, 1)
    assert remap_by_name(submitted, settle_values(submitted, info), CLASSES).ravel().tolist() == expected


def test_a_value_that_may_mean_two_classes_is_refused():
    submitted = np.array([0, 2], np.uint8).reshape(-1, 1, 1)
    with pytest.raises(LabelError, match=r"2 may mean anterior \(its idx\) or posterior"):
        settle_values(submitted, LEFT_OUT)
    assert settle_values(submitted, None) is None


def test_values_and_counts():
    label = np.array([0, 0, 1, 2, 2, UNLABELLED], np.uint8).reshape(6, 1, 1)
    assert class_voxels(label, CLASSES) == {"background": 2, "anterior": 1, "posterior": 2}
    with pytest.raises(LabelError, match=r"\[255\]"):
        check_values(label, CLASSES, allow_unlabelled=False)


BOX = Region("a", (0, 0, 0), SHAPE)


def test_of_a_class_nobody_drew_nothing_is_known():
    state = ClasswiseLabels(SHAPE, 2)
    answer = np.zeros(SHAPE, np.uint8)
    answer[0] = 1
    state.add(answer, [BOX], [1])
    assert np.all(state.merged()[0] == 1)
    assert np.all(state.merged()[1:] == UNLABELLED)
    codes = {}
    encoded = state.encoded(codes)
    assert codes == {0b01: 3}
    assert np.all(encoded[1:] == 3)
    assert possible_classes(codes, 2) == [[True, False, True]]


def test_what_was_ruled_out_for_every_class_is_background():
    state = ClasswiseLabels(SHAPE, 2)
    first, second = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    first[0], second[1] = 1, 2
    state.add(first, [BOX], [1])
    state.add(second, [Region("a", (0, 0, 0), (4, 5, 4))], [2])
    merged = state.merged()
    assert [int(merged[x, 0, 0]) for x in range(6)] == [1, 2, 0, 0, UNLABELLED, UNLABELLED]


def test_the_newest_statement_about_a_class_holds():
    state = ClasswiseLabels(SHAPE, 2)
    everything = np.full(SHAPE, 2, np.uint8)
    everything[0] = 1
    state.add(everything, [BOX], None)
    state.add(np.zeros(SHAPE, np.uint8), [Region("a", (0, 0, 0), (1, 5, 4))], [1])
    # Class 1 was taken back, so only class 2 or background is left; class 2 was not looked at and stays.
    assert np.all(state.merged()[0] == UNLABELLED)
    assert np.all(state.merged()[1:] == 2)
    assert np.all(state.encoded({})[0] == 3)


def test_classes_drawn_but_not_named_are_refused():
    with pytest.raises(LabelError, match=r"\[2\]"):
        ClasswiseLabels(SHAPE, 2).add(np.full(SHAPE, 2, np.uint8), [BOX], [1])


@given(labels, labels, st.integers(0, 5))
def test_drawing_class_by_class_is_drawing_all_at_once(truth, before, start):
    box = Region("a", (start, 0, 0), (6 - start, 5, 4))
    at_once, by_class = ClasswiseLabels(SHAPE, 2), ClasswiseLabels(SHAPE, 2)
    for state in (at_once, by_class):
        state.add(before, [BOX], None)
    at_once.add(truth, [box], None)
    for c in (1, 2):
        by_class.add(np.where(truth == c, truth, 0).astype(np.uint8), [box], [c])
    np.testing.assert_array_equal(by_class.merged(), at_once.merged())


@pytest.mark.parametrize("classes", [0, 64])
def test_class_by_class_works_with_up_to_63_classes(classes):
    with pytest.raises(LabelError, match=f"up to 63 classes, found {classes}"):
        ClasswiseLabels(SHAPE, classes)


def test_63_classes_are_told_apart():
    state = ClasswiseLabels((1, 1, 2), 63)
    nothing, box = np.zeros((1, 1, 2), np.uint8), Region("case", (0, 0, 0), (1, 1, 1))
    state.add(nothing, [box], range(2, 64))
    assert state.merged().tolist() == [[[UNLABELLED, UNLABELLED]]]
    codes = {}
    assert state.encoded(codes).tolist() == [[[64, UNLABELLED]]]
    assert possible_classes(codes, 63) == [[True, True] + [False] * 62]
    state.add(nothing, [box], [1])
    assert state.merged().tolist() == [[[0, UNLABELLED]]]


def test_more_combinations_than_values_are_refused():
    state = ClasswiseLabels((1, 1, 1), 63)
    state.add(np.zeros((1, 1, 1), np.uint8), [Region("case", (0, 0, 0), (1, 1, 1))], [1])
    full = {1 << 20 | number: 64 + number for number in range(190)}
    assert state.encoded(dict(full)).tolist() == [[[254]]]
    with pytest.raises(LabelError, match="more than 191 combinations"):
        state.encoded({**full, 1 << 21: 254})


def test_label_maps_have_the_type_and_memory_order_of_nifti_files():
    label = unlabelled((2, 3, 4))
    assert label.dtype == np.uint8
    assert label.flags.f_contiguous
    assert (label == 255).all()
    answer, whole = np.ones((2, 3, 4), np.uint8, order="F"), Region("case", (0, 0, 0), (2, 3, 4))
    for copied in (
        merge(label, answer, [whole]),
        remap_by_name(answer, None, CLASSES),
        remap_by_name(answer, [{"name": "anterior", "idx": 1}], CLASSES),
        remap_by_name(answer, [{"name": "posterior", "idx": 1}], CLASSES),
    ):
        assert copied.dtype == np.uint8
        assert copied is not answer
        assert not np.shares_memory(copied, answer)
    assert merge(label, answer, [whole]).flags.f_contiguous
    assert remap_by_name(answer, None, CLASSES).flags.f_contiguous
    assert remap_by_name(answer, [{"name": "anterior", "idx": 1}], CLASSES).flags.f_contiguous


@pytest.mark.parametrize("name", ["background", "Background", "query_region"])
def test_segments_that_are_no_class_become_background_by_name(name):
    submitted = np.array([0, 1, 254], np.uint8).reshape(-1, 1, 1)
    info = [{"name": "anterior", "idx": 1}, {"name": name, "idx": 254}]
    assert remap_by_name(submitted, info, CLASSES).ravel().tolist() == [0, 1, 0]


def test_every_segment_without_a_class_is_named_with_what_to_do():
    submitted = np.array([0, 1, 2], np.uint8).reshape(-1, 1, 1)
    info = [{"name": "tumour", "idx": 1}, {"name": "cyst", "idx": 2}]
    with pytest.raises(LabelError) as refused:
        remap_by_name(submitted, info, CLASSES)
    assert str(refused.value) == (
        "segments 1 (tumour), 2 (cyst) are not classes of this project; known classes are anterior, posterior: "
        "rename or remove the segments and submit again"
    )
    with pytest.raises(LabelError) as refused:
        settle_values(np.full((1, 1, 1), 2, np.uint8), LEFT_OUT)
    assert str(refused.value).endswith(
        "its place among the exported segments): delete the segment that was left out (background or scribbles) and "
        "submit again"
    )


def test_a_project_of_one_class_is_drawn_class_by_class_too():
    state = ClasswiseLabels((1, 1, 2), 1)
    state.add(np.array([[[1, 0]]], np.uint8), [Region("case", (0, 0, 0), (1, 1, 2))], [1])
    assert state.merged().tolist() == [[[1, 0]]]


def test_a_class_drawn_over_what_was_ruled_out_keeps_its_value_in_the_code():
    state = ClasswiseLabels((1, 1, 2), 2)
    both = [Region("case", (0, 0, 0), (1, 1, 2))]
    state.add(np.zeros((1, 1, 2), np.uint8), both, [1])
    state.add(np.array([[[2, 255]]], np.uint8), both, [2])
    codes = {}
    assert state.encoded(codes).tolist() == [[[2, 3]]]
    assert codes == {0b01: 3}
