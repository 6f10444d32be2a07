# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Strokes with the mouse, in each plane of straight, turned and oblique scans, are stored on the very voxels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.lib.annotator.test_region_views import affine_of
from tests.system.annotate.conftest import AXIAL, CORONAL, PLANES, SAGITTAL, Open, ask_for, stored
from tests.system.conftest import BUNDLE
from tests.warm import WarmProcess, WarmServer

SHAPE = (44, 40, 36)
SCANS = {
    "straight": affine_of([1, 2, 3], (1.0, 1.0, 1.0)),
    "turned": affine_of([-3, 1, -2], (1.2, 0.9, 1.0)),
    "oblique": affine_of([-1, -2, 3], (0.8, 0.8, 1.5), tilt=0.35),
}
START, SIZE = (14, 10, 9), (16, 18, 14)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, warm: WarmProcess) -> Iterator[WarmServer]:
    studies = tmp_path_factory.mktemp("annotate") / "studies"
    studies.mkdir()
    for name, affine in SCANS.items():
        image = np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.float32)
        nib.save(nib.Nifti1Image(image, affine), studies / f"{name}.nii.gz")
    server = WarmServer(
        studies, {"models": BUNDLE, "labels": "one,two"}, log=studies.parent / "log", threads=1, warm=warm
    )
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def asked(server: WarmServer) -> dict[str, int]:
    """Queries by person, leased before any page fetches a region ahead."""
    wanted = {f"ann_{scan}": (scan, START, SIZE) for scan in SCANS} | {"edge": ("straight", (31, 10, 9), (10, 12, 10))}
    return {client: ask_for(server.url, client, region)[0] for client, region in wanted.items()}


def voxels_between(a: list[int], b: list[int]) -> set[tuple[int, ...]]:
    """Voxels of a line along one axis, both ends included."""
    steps = max(abs(p - q) for p, q in zip(a, b, strict=True))
    return {tuple(p + (q - p) * k // steps for p, q in zip(a, b, strict=True)) for k in range(steps + 1)}


def in_stored(view: nib.Nifti1Image, voxels: set[tuple[int, ...]], affine: np.ndarray) -> set[tuple[int, ...]]:
    """Voxels of the view as voxels of the stored scan, by their places in mm."""
    there = nib.affines.apply_affine(np.linalg.inv(affine) @ view.affine, np.array(sorted(voxels)))
    np.testing.assert_allclose(there, there.round(), atol=1e-3)
    return {tuple(v) for v in there.round().astype(int).tolist()}


@pytest.mark.parametrize("scan", ["straight", "oblique", pytest.param("turned", marks=pytest.mark.slow)])
def test_strokes_in_every_plane_are_stored_exactly(
    server: WarmServer, asked: dict[str, int], annotator: Open, scan: str, tmp_path: Path
) -> None:
    ann, url = annotator(server.url), server.url
    ann.enter(f"ann_{scan}", asked[f"ann_{scan}"])
    view, start, size = ann.view(), ann.start, ann.size
    assert sorted(size) == sorted(SIZE)
    drawn: dict[int, set[tuple[int, ...]]] = {1: set(), 2: set()}
    for plane, value in ((AXIAL, 1), (CORONAL, 2), (SAGITTAL, 1)):
        along, other, across = PLANES[plane]
        middle = [a + d // 2 for a, d in zip(start, size, strict=True)]
        middle[across] += 1 + plane
        a, b = list(middle), list(middle)
        a[along], b[along] = middle[along] - 4, middle[along] + 3
        a[other] = b[other] = middle[other] + 2 + plane
        ann.look_at(middle)
        ann.page.keyboard.press(str(value))
        ann.drag(a, b, plane)
        line = voxels_between(a, b)
        drawn[value] |= line
        drawn[3 - value] -= line
    label = ann.label()
    for value, voxels in drawn.items():
        found = {tuple(v) for v in (np.argwhere(label == value) + start).tolist()}
        assert found == voxels
    ann.submit()
    expected = np.full(SHAPE, 255, np.uint8)
    expected[tuple(slice(a, a + d) for a, d in zip(START, SIZE, strict=True))] = 0
    for value, voxels in drawn.items():
        for voxel in in_stored(view, voxels, SCANS[scan]):
            assert expected[voxel] == 0
            expected[voxel] = value
    np.testing.assert_array_equal(stored(url, scan, tmp_path), expected)
    assert ann.watched.errors == []
    assert all(address.startswith((url, "blob:", "data:")) for address in ann.watched.requests)


def test_strokes_end_at_the_border_of_the_region(
    server: WarmServer, asked: dict[str, int], annotator: Open, tmp_path: Path
) -> None:
    ann = annotator(server.url)
    ann.enter("edge", asked["edge"])
    start, size = ann.start, ann.size
    middle = [a + d // 2 for a, d in zip(start, size, strict=True)]
    ann.page.keyboard.press("+")
    ann.page.keyboard.press("+")
    ann.drag([start[0] - 6, *middle[1:]], [start[0] + 3, *middle[1:]], AXIAL)
    label = ann.label()
    assert label[:3, middle[1] - start[1], middle[2] - start[2]].all()
    bitmap = ann.page.evaluate("() => window.viewer.nv.drawBitmap.reduce((n, v) => n + (v > 0), 0)")
    assert bitmap == np.count_nonzero(label)
    ann.submit()
    outside = stored(server.url, "straight", tmp_path)
    assert (outside[30, 10:22, 9:19] == 255).all()
