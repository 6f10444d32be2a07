# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Phantoms: seeded, anatomy-like 3D scans with labels, written as a decathlon-style folder.

The presets imitate the difficulties of published datasets, not diagnoses: two small adjacent structures
(hippocampus), anisotropic nested ones (acdc), rare small lesions in a large volume (kits), fifteen organs of very
different size (amos).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:  # loaded by path from elsewhere: this folder's name is not a module name
    sys.path.append(HERE)

from phantom.acquisition import MIXED, ORIENTATIONS, Knobs, Phantom  # noqa: E402
from phantom.presets import PRESETS, Preset, make_scene_case  # noqa: E402
from phantom.tubes import TubePreset, make_case, tuned  # noqa: E402

__all__ = ["PRESETS", "Knobs", "main", "make_case", "make_dataset", "make_phantom"]

DIFFICULTY = {"easy": 0.0, "normal": 0.5, "hard": 1.0}
LARGEST_VOXELS = 2_000_000_000


def make_phantom(preset: Preset, seed: int, index: int, knobs: Knobs | None = None) -> Phantom:
    """Case `index` of a dataset: each has a child seed, so that a longer dataset starts with the same cases."""
    knobs = knobs or Knobs()
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    if not isinstance(preset, TubePreset):
        return make_scene_case(rng, preset, knobs)
    image_xyz, label_xyz, spacing = make_case(rng, tuned(preset, knobs))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = np.round(rng.uniform(-60, 60, size=3), 1)
    dtype = np.int16 if image_xyz.max() < 32_000 else np.float32
    return Phantom(image_xyz.astype(dtype), label_xyz, affine, ())


def make_dataset(out: Path, preset: Preset, cases: int, seed: int, knobs: Knobs | None = None) -> None:
    """Write `cases` phantoms under `out` (dataset.json, imagesTr, labelsTr); the same seed gives the same bytes.

    Raises:
        FileExistsError: `out` already holds files.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name a new folder or remove it")
    (out / "imagesTr").mkdir(parents=True)
    (out / "labelsTr").mkdir()
    names = [f"{preset.name}_{index:03d}" for index in range(1, cases + 1)]
    findings: dict[str, list[str]] = {}
    for index, name in enumerate(names):
        phantom = make_phantom(preset, seed, index, knobs)
        findings[name] = list(phantom.findings)
        _save(phantom.image_xyz, phantom.affine, out / "imagesTr" / f"{name}.nii.gz")
        _save(phantom.label_xyz, phantom.affine, out / "labelsTr" / f"{name}.nii.gz")
    card: dict[str, Any] = {
        "name": f"Phantoms {preset.name}",
        "description": f"{cases} generated scans, seed {seed}; no person was ever scanned",
        "licence": "CC0-1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "phantom"},
        "labels": {"0": "background", **{str(i): name for i, name in enumerate(preset.labels, start=1)}},
        "numTraining": cases,
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": [],
    }
    if not isinstance(preset, TubePreset):
        card["modality"] = {"0": preset.modality}
        card["findings"] = findings
    if knobs is not None and knobs != Knobs():
        card["knobs"] = asdict(knobs)
    (out / "dataset.json").write_text(json.dumps(card, indent=1) + "\n")


def _save(array_xyz: NDArray[Any], affine: NDArray[np.float64], path: Path) -> None:
    nib.save(nib.Nifti1Image(array_xyz, affine), path)


def _difficulty(text: str) -> float:
    value = DIFFICULTY[text] if text in DIFFICULTY else float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError(text)
    return float(text)


def _positive(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise ValueError(text)
    return float(text)


def _spacing(text: str) -> tuple[float, float, float]:
    x, y, z = (_positive(part) for part in text.split(","))
    return x, y, z


def _shape(text: str) -> tuple[int, int, int]:
    x, y, z = (int(part) for part in text.split(","))
    if min(x, y, z) < 4 or x * y * z > LARGEST_VOXELS:
        raise ValueError(text)
    return x, y, z


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="phantoms.py", description="Write a seeded phantom dataset.")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="hippocampus")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--difficulty", type=_difficulty, default=0.5, metavar="D", help="easy, normal, hard, or 0 (easy) to 1 (hard)"
    )
    parser.add_argument("--spacing", type=_spacing, metavar="X,Y,Z", help="mm per voxel; the field of view stays")
    parser.add_argument("--shape", type=_shape, metavar="X,Y,Z", help="voxels; with --spacing it crops or widens")
    parser.add_argument("--scale", type=_positive, default=1.0, help="voxels along each axis for one of the preset's")
    parser.add_argument("--pathology", type=_share, metavar="RATE", help="share of patients with findings, 0 to 1")
    parser.add_argument("--variation", type=_share, default=1.0, help="how much scanners differ, 0 to 1")
    parser.add_argument("--orientation", choices=[*ORIENTATIONS, MIXED], default="RAS", help="axis order of the files")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Command line: `python sample-datasets/phantoms.py OUT --preset hippocampus --cases 12 --seed 1`."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.cases < 1 or options.seed < 0:
        parser.error("--cases must be at least 1 and --seed at least 0")
    preset = PRESETS[options.preset]
    if isinstance(preset, TubePreset) and (options.pathology, options.variation, options.orientation) != (
        None,
        1,
        "RAS",
    ):
        parser.error(
            f"--pathology, --variation and --orientation have no meaning for {preset.name}; choose another preset"
        )
    knobs = Knobs(
        options.difficulty, options.spacing, options.scale, options.shape, options.pathology, options.variation,
        options.orientation,
    )  # fmt: skip
    try:
        make_dataset(options.out, preset, options.cases, options.seed, knobs)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
