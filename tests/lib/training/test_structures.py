# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The smallest structures that annotations show whole, by hand."""

from __future__ import annotations

import numpy as np

from lib.partial_labels import UNLABELLED
from lib.training.structures import OnePiece, SmallestStructures

CLASSES = {"organ": 1, "lesion": 2, "cyst": 3}


def label(*blocks: tuple[int, tuple[slice, slice, slice]]) -> np.ndarray:
    label_xyz = np.zeros((10, 10, 10), np.uint8)
    for value, place in blocks:
        label_xyz[place] = value
    return label_xyz


def cube(start: int, side: int) -> tuple[slice, slice, slice]:
    return (slice(start, start + side),) * 3


def found(*labels: np.ndarray, spacing: tuple[float, float, float] = (1, 1, 1)) -> dict[str, float]:
    structures = SmallestStructures(CLASSES)
    for label_xyz in labels:
        structures.add(label_xyz, spacing)
    return structures.found_mm3()


def test_the_smallest_component_of_a_class_that_an_image_lacks_counts_in_mm3() -> None:
    both = label((1, cube(0, 4)), (2, cube(4, 3)), (2, cube(8, 2)))
    healthy = label((1, cube(0, 4)))
    # The organ is in every image; no image has a cyst. 8 voxels of 0.5 * 1 * 3 mm.
    assert found(both, healthy, spacing=(0.5, 1, 3)) == {"lesion": 12}


def test_corners_connect() -> None:
    assert found(label((2, cube(2, 2)), (2, cube(4, 2))), label()) == {"lesion": 16}


def test_images_with_their_own_spacings_are_compared_in_mm3() -> None:
    structures = SmallestStructures(CLASSES)
    structures.add(label((2, cube(2, 2))), (1, 1, 1))
    structures.add(label((2, cube(2, 3))), (0.5, 0.5, 0.5))
    structures.add(label(), (1, 1, 1))
    assert structures.found_mm3() == {"lesion": 27 / 8}


def test_what_every_image_holds_has_no_smallest() -> None:
    assert found(label((2, cube(2, 2))), label((2, cube(5, 3)))) == {}


def test_an_image_that_is_annotated_in_part_lacks_nothing() -> None:
    part = label((UNLABELLED, (slice(0, 1), slice(0, 1), slice(0, 1))))
    assert found(label((2, cube(2, 2))), part) == {}


def test_a_structure_that_reaches_the_unlabelled_counts_for_nothing_and_one_inside_a_patch_does() -> None:
    patch = np.full((10, 10, 10), UNLABELLED, np.uint8)
    patch[cube(0, 8)] = 0
    patch[cube(1, 2)] = 2  # whole: 8 voxels
    patch[7:8, 7:8, 7:8] = 2  # its neighbours at the patch's corner are unlabelled
    assert found(patch, label()) == {"lesion": 8}
    patch[cube(1, 2)] = 0
    assert found(patch, label()) == {}


def one_piece(*labels: np.ndarray) -> tuple[int, ...]:
    pieces = OnePiece(CLASSES)
    for label_xyz in labels:
        pieces.add(label_xyz)
    return pieces.found()


WHOLE = label((1, cube(0, 4)), (2, cube(4, 2)))  # they touch at a corner
LOOSE = label((1, cube(0, 4)), (2, cube(6, 2)))
PARTED = label((1, cube(0, 4)), (2, cube(6, 2)), (2, cube(9, 1)))  # 1 of 9 voxels apart


def test_a_class_is_one_piece_if_five_images_show_it_so() -> None:
    assert one_piece(*[WHOLE] * 5) == (0, 1, 2)
    assert one_piece(*[WHOLE] * 4) == ()
    assert one_piece(*[LOOSE] * 5) == (1, 2)
    assert one_piece(*[WHOLE] * 4, label((1, cube(0, 4)))) == (0, 1)


def test_few_voxels_apart_in_few_images_are_an_annotators_slip() -> None:
    slip = WHOLE.copy()
    slip[9, 0, 0] = 1  # 1 of 65 voxels of class 1 is apart, and 1 of 73 of all foreground
    assert one_piece(slip, *[WHOLE] * 4) == (0, 1, 2)
    assert one_piece(*[slip] * 5) == (2,)
    assert one_piece(*[PARTED] * 2, *[LOOSE] * 40) == (1,)  # 1 of 9 is more than a tenth


def test_images_that_are_annotated_in_part_say_nothing_about_pieces() -> None:
    part = WHOLE.copy()
    part[9, 9, 9] = UNLABELLED
    assert one_piece(*[part] * 9) == ()
    assert one_piece(*[WHOLE] * 5, part, label()) == (0, 1, 2)


def test_the_border_of_the_image_is_no_unlabelled_voxel() -> None:
    assert found(label((3, cube(8, 2))), label()) == {"cyst": 8}
