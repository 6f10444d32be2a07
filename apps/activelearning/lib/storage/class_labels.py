# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Label files in the class ids of a project, with refusals that name the file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from lib.partial_labels import LabelError, LabelMap, remap_by_name
from lib.storage.volumes import Grid, load_label


def load_classes(
    path: str | Path, classes: Mapping[str, int], like: Grid | None = None, ignored: Collection[int] = ()
) -> LabelMap:
    """Label map in class ids; names that the file states decide, else its values are class ids.

    Args:
        path, like: as of `load_label`.
        classes: class name -> id.
        ignored: values of voxels without annotation, beside UNLABELLED.

    Raises:
        ImageError: as `load_label`.
        LabelError: values or segments that are not classes of the project.
    """
    label = load_label(path, like)
    try:
        return remap_by_name(label.array_xyz, label.label_info, classes, ignored)
    except LabelError as error:
        raise LabelError(f"{Path(path).name}: {error}") from error
