# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Decathlon-style datasets: read, checked, split by hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.errors import RefereeError
from eval.protocol.volumes import check_openable, read_affine, read_volume

BACKGROUND = "background"


@dataclass(frozen=True)
class Case:
    """One scan with its ground truth; `id` is the file name without extension, as MONAI Label names images."""

    id: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Dataset:
    """A folder with `dataset.json`; `labels` maps class names to ids, background (0) first."""

    root: Path
    name: str
    labels: dict[str, int]
    cases: tuple[Case, ...]

    @property
    def foreground(self) -> dict[str, int]:
        """Class names and ids without the background."""
        return {name: value for name, value in self.labels.items() if value != 0}


@dataclass(frozen=True)
class Scan:
    """Arrays of one case: `label_xyz` and the geometry both files share; spacing in mm."""

    label_xyz: NDArray[np.uint8]
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]


def read_dataset(root: Path) -> Dataset:
    """List the labelled cases of a decathlon-style folder; files are opened by `load_scan` only.

    Raises:
        RefereeError: missing folder or dataset.json, unusable labels, no case, a listed file that is not there.
    """
    if not root.is_dir():
        raise RefereeError(f"dataset folder {root} does not exist; check `data` of the study or the variable DATA")
    card_path = root / "dataset.json"
    if not card_path.is_file():
        raise RefereeError(f"{root} holds no dataset.json; a decathlon-style folder (imagesTr, labelsTr) is needed")
    try:
        card = json.loads(card_path.read_text())
    except ValueError as error:
        raise RefereeError(f"{card_path} is not valid JSON: {error}") from error
    labels = _labels(card.get("labels"), card_path)
    cases = _listed(root, card) if card.get("training") else _found(root)
    if not cases:
        raise RefereeError(f"{root} holds no labelled case; expected pairs imagesTr/ID.nii.gz and labelsTr/ID.nii.gz")
    ids = [case.id for case in cases]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise RefereeError(f"{card_path} lists {twice[0]} more than once; keep one entry")
    return Dataset(root, str(card.get("name", root.name)), labels, tuple(sorted(cases, key=lambda case: case.id)))


def split_by_hash(ids: Iterable[str], test_fraction: float) -> tuple[list[str], list[str]]:
    """(pool, test): ids sorted by the SHA-256 of their name, the first round(test_fraction * n) are for testing.

    An additional case of a dataset moves few others, and no random state is involved.
    """
    ranked = sorted(ids, key=lambda case_id: hashlib.sha256(case_id.encode()).hexdigest())
    n_test = round(test_fraction * len(ranked))
    return sorted(ranked[n_test:]), sorted(ranked[:n_test])


def load_scan(case: Case, labels: dict[str, int]) -> Scan:
    """Ground truth and geometry of one case, after checking image and label against each other.

    Raises:
        RefereeError: unreadable file, not three axes, shapes or affines that differ, a label value that the dataset
            does not name, an image value that is NaN or infinite.
    """
    check_openable(case.image)
    image, label = read_volume(case.image), read_volume(case.label, placed=False)
    if image.values_xyz.shape != label.values_xyz.shape:
        raise RefereeError(
            f"{case.label} has shape {label.values_xyz.shape} but its image {case.image.name} has "
            f"{image.values_xyz.shape}; both must lie on one grid"
        )
    if not image.shares_grid(label):
        raise RefereeError(f"{case.label} has another affine than its image {case.image.name}; resave it on that grid")
    bad = np.count_nonzero(~np.isfinite(image.values_xyz))
    if bad:
        raise RefereeError(f"{case.image} holds {bad} voxels that are NaN or infinite; repair or remove the case")
    found = np.unique(label.values_xyz)
    unknown = [float(v) for v in found if v not in labels.values()]
    if unknown:
        known = ", ".join(f"{value} {name}" for name, value in labels.items())
        raise RefereeError(f"{case.label} holds label value {unknown[0]:g}; dataset.json names only {known}")
    return _scan(label.values_xyz, image.affine)


def load_truth(case: Case) -> Scan:
    """Ground truth of a case that was checked when the run began, on the grid of its image."""
    return _scan(read_volume(case.label, placed=False).values_xyz, read_affine(case.image))


def _scan(label_xyz: NDArray[np.float32], affine: NDArray[np.float64]) -> Scan:
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return Scan(label_xyz.astype(np.uint8), affine, (float(x), float(y), float(z)))


def content_digest(path: Path) -> str:
    """SHA-256 over shape and voxel values: equal for a copy that was renamed, recompressed or given a new header."""
    values_xyz = read_volume(path).values_xyz
    digest = hashlib.sha256(repr(values_xyz.shape).encode())
    digest.update(np.ascontiguousarray(values_xyz).tobytes())
    return digest.hexdigest()


def refuse_overlap(pool: Sequence[Case], test: Sequence[Case]) -> dict[str, str]:
    """Digest of every image by case id, once no case is in both lists, neither by id nor by content.

    Raises:
        RefereeError: an empty list, or a scan that would be learnt from and tested on.
    """
    for name, cases in (("pool", pool), ("test", test)):
        if not cases:
            raise RefereeError(f"the {name} of the study is empty; change `split`")
    both = sorted({case.id for case in pool} & {case.id for case in test})
    if both:
        raise RefereeError(f"case {both[0]} is in the pool and in the test set ({len(both)} in all); change `split`")
    digests = {case.id: content_digest(case.image) for case in (*pool, *test)}
    pooled = {digests[case.id]: case.id for case in pool}
    for case in test:
        if digests[case.id] in pooled:
            twin = pooled[digests[case.id]]
            raise RefereeError(f"test case {case.id} and pool case {twin} hold the same image; remove one of them")
    return digests


def _labels(given: object, path: Path) -> dict[str, int]:
    """Names to ids from the decathlon's {"1": "name"} or nnU-Net's {"name": 1}."""
    if not isinstance(given, dict) or len(given) < 2:
        raise RefereeError(f"{path} names no classes; expected `labels` with background and at least one class")
    try:
        pairs = (
            {str(k): int(v) for k, v in given.items()}
            if BACKGROUND in given
            else {str(v): int(k) for k, v in given.items()}
        )
    except (TypeError, ValueError) as error:
        raise RefereeError(f"{path}: `labels` must map ids to names, found {given!r}") from error
    zero = [name for name, value in pairs.items() if value == 0]
    if len(zero) != 1 or len(set(pairs.values())) != len(given) or not all(0 <= v < 255 for v in pairs.values()):
        raise RefereeError(f"{path}: `labels` needs one class 0 and ids from 1 to 254, each used once; found {given!r}")
    pairs = {BACKGROUND if value == 0 else name: value for name, value in pairs.items()}
    return dict(sorted(pairs.items(), key=lambda item: item[1]))


def _listed(root: Path, card: dict[str, list[dict[str, str]]]) -> list[Case]:
    """Cases that dataset.json lists, without macOS's `._` companions."""
    cases = []
    for entry in card["training"]:
        if not isinstance(entry, dict) or "image" not in entry or "label" not in entry:
            raise RefereeError(f"{root / 'dataset.json'}: a training entry needs `image` and `label`, found {entry!r}")
        image, label = root / entry["image"], root / entry["label"]
        if image.name.startswith("._"):
            continue
        for path in (image, label):
            if not path.is_file():
                raise RefereeError(f"{path}, listed in dataset.json, does not exist; restore it or remove the entry")
        cases.append(Case(_case_id(image), image, label))
    return cases


def _found(root: Path) -> list[Case]:
    """Pairs of imagesTr and labelsTr, when dataset.json lists none; nnU-Net's channel suffix is not part of a name."""
    labels = {_case_id(p): p for p in (root / "labelsTr").glob("*.nii*") if not p.name.startswith("._")}
    images = [p for p in (root / "imagesTr").glob("*.nii*") if not p.name.startswith("._")]
    pairs = ((p, labels.get(_case_id(p)) or labels.get(_case_id(p).removesuffix("_0000"))) for p in images)
    return [Case(_case_id(image), image, label) for image, label in pairs if label is not None]


def _case_id(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
