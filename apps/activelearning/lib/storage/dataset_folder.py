# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Images and labels of a decathlon-style or nnU-Net folder, paired."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.options import OptionError
from lib.storage.volumes import EXTENSIONS

# nnU-Net's suffix of the first channel, which is the only one that is read.
_CHANNEL = "_0000"
_FOLDERS = {"training": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}


def paired_files(
    folder: Path, section: str = "training", missing_ok: bool = False
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images by id, and the labels of those that have one.

    The list of dataset.json counts. Without one, as in nnU-Net's folders, files are paired by name: the channel suffix
    of an image is not part of its label's name. The id of an image is its file name without extension.

    Args:
        folder: with dataset.json, imagesTr and labelsTr.
        section: list of dataset.json.
        missing_ok: whether dataset.json may be missing.

    Raises:
        OptionError: no readable dataset.json, or an entry without an image.
    """
    entries = _entries(folder / "dataset.json", section, missing_ok)
    if not entries:
        return _by_name(folder, section)
    pairs = [entry if isinstance(entry, dict) else {"image": entry} for entry in entries]
    if not all(isinstance(pair.get("image"), str) for pair in pairs):
        raise OptionError(f"{folder / 'dataset.json'}: every entry under {section!r} needs an image; add it")
    kept = [pair for pair in pairs if not Path(pair["image"]).name.startswith("._")]
    images = {image_id(pair["image"]): folder / pair["image"] for pair in kept}
    return images, {image_id(pair["image"]): folder / pair["label"] for pair in kept if "label" in pair}


def image_id(file: str | Path) -> str:
    """Id of an image: its file name without extension."""
    name = Path(file).name
    return next((name[: -len(end)] for end in EXTENSIONS if name.endswith(end)), name)


def _entries(path: Path, section: str, missing_ok: bool) -> list[Any]:
    if missing_ok and not path.is_file():
        return []
    try:
        card: Mapping[str, Any] = json.loads(path.read_text())
        return list(card.get(section) or [])
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise OptionError(f"{path}: not readable as a decathlon-style dataset.json ({error})") from error


def _by_name(folder: Path, section: str) -> tuple[dict[str, Path], dict[str, Path]]:
    places = _FOLDERS.get(section, ("", ""))
    images, labels = (_volumes(folder / place) if place else {} for place in places)
    pairs = {one: labels.get(one) or labels.get(one.removesuffix(_CHANNEL)) for one in images}
    return images, {one: label for one, label in pairs.items() if label is not None}


def _volumes(folder: Path) -> dict[str, Path]:
    found = (path for path in sorted(folder.glob("*")) if path.name.endswith(EXTENSIONS))
    return {image_id(path): path for path in found if not path.name.startswith(".")}
