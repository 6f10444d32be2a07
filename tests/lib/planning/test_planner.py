# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib.models.plan import PlanError, checked
from lib.models.plan_files import read_plan, read_yaml, write_plan
from lib.planning.fingerprint import Fingerprint, Grey
from lib.planning.fingerprint_reader import declared_modality, take_fingerprint
from lib.planning.planner import Budget, make_plan, names_sides
from lib.planning.resolution import coarser, target_spacing
from lib.planning.topology import activations, ladder

GREY = Grey(low=0, high=100, mean=50, std=10, minimum=0, voxels=10)
GPU, CPU = Budget("cuda", 8.0), Budget("cpu", 6.0)


def pool(*kinds, modality="other"):
    """Kinds are (count, shape, spacing)."""
    shapes = tuple(shape for count, shape, _ in kinds for _ in range(count))
    spacings = tuple(spacing for count, _, spacing in kinds for _ in range(count))
    return Fingerprint(shapes, spacings, modality, "told", (GREY,), GREY, None)


HIPPOCAMPUS = pool((260, (35, 50, 36), (1.0, 1.0, 1.0)))
# 5 mm in a fifth, 10 mm in the others; median in-plane spacing and sizes of the published table.
ACDC = pool((40, (206, 237, 17), (1.5625, 1.5625, 5.0)), (160, (206, 237, 9), (1.5625, 1.5625, 10.0)))
KITS = pool(
    (30, (512, 512, 820), (0.78125, 0.78125, 0.5)), (180, (512, 512, 137), (0.78125, 0.78125, 3.0)), modality="CT"
)
FETAL = pool((12, (135, 189, 155), (0.8, 0.8, 0.8)))
AMOS = pool((30, (582, 582, 238), (0.6875, 0.6875, 2.0)), (120, (582, 582, 95), (0.6875, 0.6875, 5.0)), modality="CT")
LUNG = pool((63, (512, 512, 252), (0.785, 0.785, 1.2445)), modality="CT")
LIVER_METASTASES = pool((100, (512, 512, 143), (0.7832, 0.7832, 1.5)), modality="CT")


# Published plans, axes turned from nnU-Net's (z, y, x) to (x, y, z); met without tolerance. Read in nnU-Net's issues:
# Hippocampus (148), the spacing of KiTS19 (230), Lung (2094) and liver metastases (1768). Spacings and median shapes of
# ACDC, KiTS and AMOS are nnActive's; their patches and batches are as commonly reported, not read in a plans file.
@pytest.mark.parametrize(
    ("images", "spacing", "patch", "batch", "poolings"),
    [
        (HIPPOCAMPUS, (1.0, 1.0, 1.0), (40, 56, 40), 9, (3, 3, 3)),
        (ACDC, (1.5625, 1.5625, 5.0), (224, 256, 20), 4, (5, 5, 2)),
        (KITS, (0.78125, 0.78125, 0.78125), (128, 128, 128), 2, (5, 5, 5)),
        (AMOS, (0.6875, 0.6875, 2.0), (160, 192, 64), 2, (5, 5, 4)),
        (LUNG, (0.785, 0.785, 1.2445), (160, 192, 80), 2, (5, 5, 4)),
        (LIVER_METASTASES, (0.7832, 0.7832, 1.5), (192, 224, 56), 2, (5, 5, 3)),
    ],
)
def test_plans_for_8_gib_are_nnu_nets(images, spacing, patch, batch, poolings):
    plan = make_plan(images, GPU)
    assert plan.spacing == pytest.approx(spacing)
    assert (plan.patch, plan.batch) == (patch, batch)
    assert plan.divisor == tuple(2**n for n in poolings)
    assert plan.factor == (1, 1, 1)
    assert plan.features == (32, 64, 128, 256, 320, 320)[: max(poolings) + 1]
    assert plan.estimate_gib < 1.13 * 8  # a batch is rounded, by nnU-Net too


def test_the_coarse_axis_is_looked_along_once_it_is_resolved():
    plan = make_plan(ACDC, GPU)
    assert plan.kernels == ((3, 3, 1), *((3, 3, 3),) * 5)
    assert plan.strides == ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1), (2, 2, 1))


def test_slices_are_planned_as_nnu_net_does():
    plan = make_plan(KITS, GPU, "2d")
    assert (plan.axis, plan.patch, plan.batch) == (2, (512, 512, 1), 12)
    assert plan.spacing == (0.78125, 0.78125, 0.0)
    assert plan.features == (32, 64, 128, 256, 512, 512, 512, 512)
    assert {level[2] for level in (*plan.kernels, *plan.strides)} == {1}


def test_slices_on_a_cpu_show_a_quarter_of_the_plane_with_six_of_them_a_step():
    plan = make_plan(ACDC, CPU, "2d")
    assert (plan.patch, plan.batch, plan.factor) == ((128, 128, 1), 6, (2, 2, 1))
    assert plan.shown == pytest.approx(128 * 128 / (206 * 237), abs=1e-4)
    assert plan.features == (24, 48, 96, 192, 192)
    assert (plan.effort, plan.foreground) == (1, pytest.approx(1 / 3))
    assert "shown          34%" in plan.table()
    assert plan.why["shown"] == "of the plane of the median image"


def test_a_crop_that_shows_less_than_a_quarter_works_at_a_coarser_spacing_and_where_that_is_not_enough_it_is_said():
    plan = make_plan(FETAL, CPU)
    assert (plan.spacing, plan.factor) == ((1.6, 1.6, 1.6), (2, 2, 2))
    assert plan.shown == pytest.approx(48 * 64 * 48 / (68 * 94 * 78), abs=1e-4)
    assert plan.why["spacing"] == "median of the pool; 2 times coarser, so that a crop shows more of an image"
    assert "WARNING" not in plan.table()
    large = make_plan(AMOS, CPU)
    assert large.spacing == (1.375, 1.375, 2.0)  # no axis is finer than twice the finest
    assert large.shown < 0.05
    assert "of the volume of the median image; WARNING: below 25%" in large.table()
    assert make_plan(FETAL, CPU, spacing=(0.8, 0.8, 0.8)).spacing == (0.8, 0.8, 0.8)
    assert make_plan(FETAL, GPU).spacing == (0.8, 0.8, 0.8)


@pytest.mark.parametrize(
    ("spacing", "times", "expected"),
    [((1, 1, 5), 2, (2, 2, 5)), ((0.8, 0.9, 1.5), 1.5, (1.2, 1.2, 1.5)), ((1, 1, 1), 1, (1, 1, 1))],
)
def test_a_coarser_spacing_evens_out_the_axes(spacing, times, expected):
    assert coarser(spacing, times) == pytest.approx(expected)


def test_the_anisotropic_net_has_five_levels_of_which_two_are_flat():
    plan = make_plan(AMOS, GPU, "3d_anisotropic")
    assert len(plan.strides) == 5
    assert [k[2] for k in plan.kernels] == [1, 1, 3, 3, 3]
    assert [s[2] for s in plan.strides[:2]] == [1, 1]


def test_small_scans_get_the_measured_recipe_on_a_cpu():
    plan = make_plan(HIPPOCAMPUS, CPU)
    assert (plan.patch, plan.batch, plan.factor, plan.features) == ((40, 48, 40), 2, (2, 2, 2), (24, 48, 96))
    assert plan.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2))


def test_crops_that_show_little_of_an_image_are_centred_on_classes_more_often_and_train_longer():
    large, small = make_plan(AMOS, CPU), make_plan(HIPPOCAMPUS, CPU)
    assert (large.foreground, large.effort) == (pytest.approx(2 / 3), 2)
    assert (small.foreground, small.effort) == (pytest.approx(1 / 3), 1)


def test_crops_that_show_little_are_mirrored_unless_classes_have_sides():
    large, sided, small = make_plan(KITS, CPU), make_plan(AMOS, CPU, sided=True), make_plan(HIPPOCAMPUS, CPU)
    assert (large.mirror, sided.mirror, small.mirror) == ((0, 1, 2), (), ())
    assert large.why["mirror"] == "a crop shows little of an image"
    assert sided.why["mirror"] == "classes tell left from right"
    assert small.why["mirror"] == "a crop shows most of an image"
    assert "none" in small.table()
    assert "0, 1, 2" in large.table()


@pytest.mark.parametrize(
    ("names", "sided"),
    [
        (["spleen", "left kidney"], True),
        (["Kidney_R"], True),
        (["hippocampus-lh"], True),
        (["RightLung"], True),
        (["kidney", "tumour", "cyst"], False),
        (["bright spot", "cleft lip"], False),
        ([], False),
    ],
)
def test_sides_are_read_from_names(names, sided):
    assert names_sides(names) is sided


@given(
    st.tuples(*[st.integers(1, 700)] * 3),
    st.tuples(*[st.floats(0.2, 12)] * 3),
    st.sampled_from(["3d_fullres", "2d", "3d_anisotropic"]),
    st.sampled_from([GPU, CPU, Budget("cuda", 2.0)]),
)
@example((1, 56, 227), (6.0, 12.0, 12.0), "3d_fullres", CPU)  # an axis that can give no more way covers most
def test_every_pool_has_a_plan_that_fits(shape, spacing, configuration, budget):
    plan = make_plan(pool((20, shape, spacing)), budget, configuration)
    assert all(p % d == 0 for p, d in zip(plan.patch, plan.divisor, strict=True))
    assert len(plan.strides) >= 3
    if budget is CPU:
        most = 4_096 if configuration == "2d" else 12_000
        assert np.prod(plan.patch) / np.prod(plan.factor) <= 1.6 * most
        if plan.shown > 0.32:
            assert np.prod(plan.patch) / np.prod(plan.factor) <= most
    assert checked(plan.model_dump(mode="json"), "again") == plan


def test_more_memory_gives_larger_crops():
    small, large = (make_plan(KITS, Budget("cuda", gib)) for gib in (4.0, 24.0))
    assert np.prod(small.patch) * small.batch < 2 * 128**3 < np.prod(large.patch) * large.batch


def test_spacing_is_the_median_unless_an_axis_is_coarse_and_short():
    assert target_spacing(pool((3, (200, 200, 90), (1.0, 1.0, 5.0))))[0] == (1.0, 1.0, 5.0)
    mixed = pool((1, (200, 200, 60), (1.0, 1.0, 2.0)), (9, (200, 200, 40), (1.0, 1.0, 5.0)))
    assert target_spacing(mixed)[0] == pytest.approx((1.0, 1.0, np.percentile([2] + [5] * 9, 10)))
    assert make_plan(mixed, GPU, spacing=(2.0, 2.0, 2.0)).spacing == (2.0, 2.0, 2.0)


def test_shallow_crops_are_not_turned_across_slices():
    assert make_plan(HIPPOCAMPUS, GPU).flat is None
    assert make_plan(HIPPOCAMPUS, GPU, "2d").flat == 2
    assert make_plan(ACDC, GPU).flat == 2
    assert make_plan(AMOS, GPU).flat is None


def test_activations_by_hand():
    found = ladder((16, 16, 16), (1, 1, 1))
    assert (found.strides, found.size) == (((1, 1, 1), (2, 2, 2), (2, 2, 2)), (16, 16, 16))
    down = 2 * (4096 * 8 + 512 * 16 + 64 * 32)
    up = 3 * (4096 * 8 + 512 * 16)
    assert activations(found.size, found.strides, (8, 16, 32), 3) == down + up + 3 * 4096


def save(folder: Path, name: str, array: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> Path:
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), path)
    return path


@pytest.fixture
def scans(tmp_path):
    rng = np.random.default_rng(0)
    images = {}
    for i in range(5):
        body = rng.normal(40, 20, (20, 24, 16 + i)).astype(np.float32)
        body[:5] = -1000
        images[f"c{i}"] = save(tmp_path, f"c{i}", body, (0.8, 0.8, 2.5))
    label = np.full((20, 24, 16), 255, np.uint8)
    label[6:16, 4:20, 2:12] = 0
    label[8:14, 6:18, 2:12] = 1
    (tmp_path / "labels").mkdir()
    return images, {"c0": save(tmp_path / "labels", "c0", label, (0.8, 0.8, 2.5))}


def test_a_fingerprint_depends_on_the_pool_alone(scans):
    images, labels = scans
    found = take_fingerprint(images, labels)
    assert found == take_fingerprint(dict(reversed(images.items())), labels)
    assert found.median_spacing() == pytest.approx((0.8, 0.8, 2.5))
    assert found.median_shape((0.8, 0.8, 2.5)) == (20, 24, 18)
    assert found.median_shape((1.6, 0.8, 2.5)) == (10, 24, 18)
    assert found.modality == "CT"
    assert found.foreground is None  # 720 voxels are too few
    grown = take_fingerprint({**images, "d": images["c0"]}, {})
    assert len(grown.shapes) == 6


def test_ct_is_normalised_by_annotated_foreground_only(scans, monkeypatch):
    images, labels = scans
    few = make_plan(take_fingerprint(images, labels), CPU)
    assert few.normalisation.low == -1000  # 720 voxels are too few
    assert "hardly any" in few.why["normalisation"]
    monkeypatch.setattr("lib.planning.fingerprint_reader.ENOUGH_FOREGROUND", 500)
    values = nib.load(images["c0"]).get_fdata()[8:14, 6:18, 2:12]
    plan = make_plan(take_fingerprint(images, labels), CPU)
    assert plan.normalisation.scheme == "ct"
    assert plan.normalisation.mean == pytest.approx(values.mean(), rel=1e-4)
    assert plan.normalisation.std == pytest.approx(values.std(), rel=1e-4)
    assert plan.normalisation.low == pytest.approx(np.percentile(values, 0.5), rel=1e-3)
    assert make_plan(take_fingerprint(images, labels, "other"), CPU).normalisation.scheme == "zscore"


def test_a_rare_class_is_not_clipped_away(scans, monkeypatch):
    images, labels = scans
    monkeypatch.setattr("lib.planning.fingerprint_reader.ENOUGH_FOREGROUND", 500)
    image, label = nib.load(images["c0"]), nib.load(labels["c0"])
    grey, classes = image.get_fdata(), np.asarray(label.dataobj).copy()
    classes[8, 6, 2], grey[8, 6, 2] = 2, 900.0  # one voxel of 720, far outside of the others
    nib.save(nib.Nifti1Image(grey.astype(np.float32), image.affine), images["c0"])
    nib.save(nib.Nifti1Image(classes, label.affine), labels["c0"])
    found = take_fingerprint(images, labels).foreground
    assert found.high == 900
    assert found.voxels == 720
    common = grey[8:14, 6:18, 2:12].ravel()[1:]
    assert found.mean == pytest.approx((common.mean() + 900) / 2, rel=1e-3)


def test_unreadable_images_are_left_out_and_named(scans, tmp_path):
    images, _ = scans
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    assert take_fingerprint({**images, "broken": broken}, {}).unreadable == ("broken",)
    with pytest.raises(PlanError, match="no image of the pool can be read, out of 1"):
        take_fingerprint({"broken": broken}, {})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"modality": {"0": "CT"}}, "CT"),
        ({"modality": {"0": "MRI"}}, "other"),
        ({"channel_names": {"0": "ct"}}, "CT"),
        ({"labels": {}}, None),
        ([], None),
    ],
)
def test_modality_of_a_dataset_json(tmp_path, content, expected):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert declared_modality(tmp_path) == expected
    assert declared_modality(tmp_path / "missing") is None


def test_plans_are_written_and_read_back(tmp_path):
    plan = make_plan(ACDC, GPU)
    write_plan(plan, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan
    table = plan.table()
    assert "224 x 256 x 20" in table
    assert "32-64-128-256-320-320" in table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patch: [3", "not readable as a plan"),
        ("- 1", "expected the fields of a plan"),
        ("patchh: [3, 3, 3]", "patchh is not a field of a plan"),
    ],
)
def test_bad_plan_files_are_refused_in_a_sentence(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError, match=message):
        read_yaml(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": [41, 56, 40]}, r"must be a multiple of \(8, 8, 8\)"),
        ({"features": [32, 64, 128]}, "one entry a level, found 4, 4 and 3"),
        ({"spacing": [0.0, 1.0, 1.0]}, "spacing must be above 0"),
    ],
)
def test_plans_that_do_not_fit_are_refused(change, message):
    with pytest.raises(PlanError, match=message):
        checked({**make_plan(HIPPOCAMPUS, GPU).model_dump(), **change}, "plan.yaml")
