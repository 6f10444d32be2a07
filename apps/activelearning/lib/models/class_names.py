# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Class names: `--conf labels`, the studies folder's dataset.json, or the bundle's metadata, in that order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.options import OptionError

# Names for voxels that nobody annotated; nnU-Net reserves the first.
_UNLABELLED = ("ignore", "unlabelled")
_HELPERS = ("background", *_UNLABELLED)


def resolve_classes(
    conf_labels: Mapping[str, int] | None, studies: Path, metadata: Mapping[str, Any]
) -> dict[str, int]:
    """Foreground class name -> id, in the order of ids.

    Raises:
        OptionError: no source names a class, or ids are not 1, 2, ..., N: clients number segments that way.
    """
    for source, labels in (
        ("--conf labels", conf_labels),
        (f"{studies / 'dataset.json'}", _from_dataset(studies / "dataset.json")),
        ("the bundle's metadata.json", _from_metadata(metadata)),
    ):
        if labels:
            return _checked(labels, source)
    raise OptionError(
        f"no class names: give --conf labels 'name1,name2', or put a decathlon-style dataset.json into {studies}"
    )


def unlabelled_values(studies: Path) -> frozenset[int]:
    """Values that a folder's dataset.json gives to voxels without annotation, as nnU-Net's `ignore`.

    Raises:
        OptionError: a dataset.json that cannot be read.
    """
    named = _from_dataset(studies / "dataset.json")
    found = (value for name, value in named.items() if name.lower() in _UNLABELLED)
    return frozenset(int(value) for value in found if isinstance(value, int) and value > 0)


def check_same_ids(classes: Mapping[str, int], known: Mapping[str, int] | None) -> None:
    """Check that classes with answers keep their ids, which labels on disk hold. New classes may follow.

    Raises:
        OptionError: a class of `known`, the classes of the answers, has another id or is missing.
    """
    for name, value in (known or {}).items():
        if classes.get(name) != value:
            now = f"{name} is {classes[name]}" if name in classes else f"there is no {name}"
            raise OptionError(
                f"class names: answers were given with {dict(known or {})}, and now {now}; labels would change their "
                "meaning: name the same classes with the same ids, or start a project of its own in another folder"
            )


def _from_dataset(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    try:
        labels = json.loads(path.read_text()).get("labels", {})
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: not readable as a decathlon-style dataset.json ({error})") from error
    # nnU-Net turned the decathlon's {id: name} round into {name: id}; both are in use.
    return {str(v): int(k) for k, v in labels.items()} if all(str(k).isdigit() for k in labels) else dict(labels)


def _from_metadata(metadata: Mapping[str, Any]) -> dict[str, int]:
    outputs = metadata.get("network_data_format", {}).get("outputs", {})
    channels: Mapping[str, str] = next(iter(outputs.values()), {"channel_def": {}}).get("channel_def", {})
    return {str(name): int(index) for index, name in channels.items()}


def _checked(labels: Mapping[str, int], source: str) -> dict[str, int]:
    try:
        classes = {name: int(value) for name, value in labels.items() if name.lower() not in _HELPERS}
    except (TypeError, ValueError):
        raise OptionError(f"{source}: class ids must be whole numbers, found {dict(labels)}") from None
    helpers = sorted(name for name in labels if name not in classes and labels[name] != 0)
    if classes and helpers and sorted(classes.values())[-1] > len(classes):
        raise OptionError(f"{source}: {', '.join(helpers)} is no class, and takes an id of one; leave it out")
    if sorted(classes.values()) != list(range(1, len(classes) + 1)) or not classes:
        raise OptionError(f"{source}: class ids must be 1, 2, ..., one per class, found {classes}")
    return dict(sorted(classes.items(), key=lambda item: item[1]))
