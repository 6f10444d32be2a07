# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Decathlon-style datasets: read, checked, split by hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.errors import RefereeError
from eval.protocol.volumes import check_openable, read_affine, read_volume

BACKGROUND = "background"
# Label value of voxels that nobody annotated, as the server has it.
UNLABELLED = 255
# Names for such voxels; nnU-Net reserves the first.
_UNLABELLED_NAMES = ("ignore", "unlabelled")
# Remainder of a whole number after the slope of a header, which has 24 bits: 255 x 2^-24, rounded up.
ROUNDING = 2e-5


@dataclass(frozen=True)
class Case:
    """One scan with its ground truth; `id` is the file name without extension, as MONAI Label names images.

    `ignored` is the value of voxels without annotation, nnU-Net's `ignore`.
    """

    id: str
    image: Path
    label: Path
    ignored: int | None = None


@dataclass(frozen=True)
class Dataset:
    """A folder with `dataset.json`; `labels` maps class names to ids, background (0) first.

    `unused` are sentences about files of imagesTr and labelsTr that belong to no case.
    """

    root: Path
    name: str
    labels: dict[str, int]
    cases: tuple[Case, ...]
    unused: tuple[str, ...] = ()

    @property
    def foreground(self) -> dict[str, int]:
        """Class names and ids without the background."""
        return {name: value for name, value in self.labels.items() if value != 0}


@dataclass(frozen=True)
class Scan:
    """Arrays of one case: `label_xyz` and the geometry both files share; spacing in mm.

    Voxels without annotation are UNLABELLED.
    """

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
    labels, ignored = _labels(card.get("labels"), card_path)
    cases = [replace(case, ignored=ignored) for case in (_listed(root, card) if card.get("training") else _found(root))]
    if not cases:
        raise RefereeError(f"{root} holds no labelled case; expected pairs imagesTr/ID.nii.gz and labelsTr/ID.nii.gz")
    ids = [case.id for case in cases]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise RefereeError(f"{card_path} lists {twice[0]} more than once; keep one entry")
    name, ordered = str(card.get("name", root.name)), tuple(sorted(cases, key=lambda case: case.id))
    return Dataset(root, name, labels, ordered, tuple(_unused(root, ordered)))


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
    expected = {*labels.values(), UNLABELLED} | ({case.ignored} if case.ignored is not None else set())
    unknown = [float(v) for v in found if not abs(v - np.round(v)) <= ROUNDING or int(np.round(v)) not in expected]
    if unknown:
        known = ", ".join(f"{value} {name}" for name, value in labels.items())
        raise RefereeError(f"{case.label} holds label value {unknown[0]:.9g}; dataset.json names only {known}")
    return _scan(case, label.values_xyz, image.affine)


def load_truth(case: Case) -> Scan:
    """Ground truth of a case that was checked when the run began, on the grid of its image."""
    return _scan(case, read_volume(case.label, placed=False).values_xyz, read_affine(case.image))


def _scan(case: Case, values_xyz: NDArray[np.float32], affine: NDArray[np.float64]) -> Scan:
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    label_xyz = np.round(values_xyz).astype(np.uint8)
    if case.ignored is not None:
        label_xyz[label_xyz == case.ignored] = UNLABELLED
    return Scan(label_xyz, affine, (float(x), float(y), float(z)))


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


def _labels(given: object, path: Path) -> tuple[dict[str, int], int | None]:
    """Names to ids from the decathlon's {"1": "name"} or nnU-Net's {"name": 1}, and the id of nnU-Net's `ignore`."""
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
    ignored = [pairs.pop(name) for name in list(pairs) if name.lower() in _UNLABELLED_NAMES]
    if len(ignored) > 1 or len(pairs) < 2:
        raise RefereeError(f"{path}: `labels` needs a class beside {BACKGROUND} and `ignore`; found {given!r}")
    return dict(sorted(pairs.items(), key=lambda item: item[1])), ignored[0] if ignored else None


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


def _unused(root: Path, cases: Sequence[Case]) -> Iterator[str]:
    """A sentence about every file of imagesTr and labelsTr that belongs to no case."""
    used = {path for case in cases for path in (case.image, case.label)}
    for folder in ("imagesTr", "labelsTr"):
        for path in sorted((root / folder).glob("*")):
            if path in used or path.name.startswith("."):
                continue
            if path.name.endswith((".nii", ".nii.gz")):
                other = "label" if folder == "imagesTr" else "image"
                yield f"{folder}/{path.name}: not used, as no case with {other} is made of it"
            else:
                yield f"{folder}/{path.name}: not used, as only .nii.gz and .nii files are read; convert it"


def _case_id(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
