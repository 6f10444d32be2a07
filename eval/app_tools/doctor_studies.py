# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Checks of `doctor` in a studies folder: images, plan, room for cached moments, ledger, labels."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eval.app_path import add_app
from eval.app_tools.audit import audit
from eval.app_tools.finding import Finding
from eval.app_tools.project import LEDGER, copy_ledger
from eval.errors import RefereeError

_GIB = 2**30
_STALE_SECONDS = 3600.0


def studies_findings(studies: Path) -> Iterator[Finding]:
    """Findings about a studies folder; nothing in it is changed."""
    if not studies.is_dir():
        yield Finding("studies", "problem", f"{studies}: no such folder", "name the folder with the images")
        return
    add_app()
    shapes, unreadable, unused = _shapes(studies)
    if unreadable:
        advice = "repair or remove them: they are left out of queries, scorings and trainings"
        found = f"{len(shapes)} can be used, {len(unreadable)} cannot: {' | '.join(unreadable)}"
        yield Finding("images", "problem", found, advice)
    else:
        yield Finding("images", "ok" if shapes else "warning", f"{len(shapes)} can be used")
    if unused:
        yield Finding("images left out", "warning", f"{len(unused)} files: {' | '.join(unused)}", "they are not used")
    yield from _plans(studies)
    if shapes:
        yield _room(studies, shapes)
    yield from _ledger(studies)
    yield from _leftovers(studies)


def _shapes(studies: Path) -> tuple[list[tuple[int, ...]], list[str], list[str]]:
    """Shapes of the images that can be used, and a sentence about every other image and every file that is none."""
    from lib.storage.readers import why_unopenable
    from lib.storage.volume_headers import ImageError
    from lib.storage.volumes import check_image, image_geometry
    from lib.studies.folder_listing import FolderListing
    from lib.studies.unused_files import unused_files

    shapes, unreadable = [], []
    for image, extension in FolderListing(studies).files().items():
        path = studies / f"{image}{extension}"
        try:
            if sentence := why_unopenable(path):
                raise ImageError(sentence)
            shape = image_geometry(path)[0]
            check_image(path)
            shapes.append(tuple(shape))
        except ImageError as error:
            unreadable.append(str(error))
        except OSError as error:
            unreadable.append(f"{path.name}: not readable ({error.strerror})")
    return shapes, unreadable, list(unused_files(studies).values())


def _plans(studies: Path) -> Iterator[Finding]:
    """The tiling of every plan in force; a first training makes it."""
    from lib.models.plan import PlanError
    from lib.models.plan_files import read_plan

    for path in sorted((studies / LEDGER.parent).glob("plan_*.yaml")):
        name = f"plan of {path.stem.removeprefix('plan_')}"
        try:
            plan = read_plan(path)
        except PlanError as error:
            yield Finding(name, "problem", str(error), "delete it, and the next training makes it again")
            continue
        spacing = " x ".join(f"{mm:g}" for mm in plan.spacing)
        crop = " x ".join(map(str, plan.patch))
        found = f"{plan.batch} crops of {crop} at {spacing} mm, {plan.estimate_gib:g} of {plan.memory_gib:g} GiB"
        fits = plan.estimate_gib <= plan.memory_gib
        yield Finding(
            name, "ok" if fits else "problem", found, "" if fits else "train with replan, or set --conf memory"
        )
    if not list((studies / LEDGER.parent).glob("plan_*.yaml")):
        yield Finding("plan", "ok", f"none yet; `python -m eval plan {studies}` shows the plan of the first training")


def _room(studies: Path, shapes: list[tuple[int, ...]]) -> Finding:
    """Check the room for cached moments: 4 bytes per voxel for every class, background included, and two more."""
    from lib.models.class_names import resolve_classes
    from lib.options import OptionError

    try:
        classes = len(resolve_classes({}, studies, {}))
    except OptionError:
        classes = 1
    needed = sum(float(np.prod(shape)) for shape in shapes) * 4 * (classes + 3) / _GIB
    free = shutil.disk_usage(studies).free / _GIB
    found = f"up to {needed:.1f} GiB for {len(shapes)} images and {classes} classes, {free:.1f} GiB free"
    if needed > free:
        return Finding("cached moments", "problem", found, "make room, or score fewer images in a project of their own")
    return Finding("cached moments", "ok", found)


def _ledger(studies: Path) -> Iterator[Finding]:
    from lib.ledger.schema import SCHEMA_VERSION

    path = studies / LEDGER
    if not path.is_file():
        yield Finding("ledger", "ok", "none yet; the first start makes it")
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy = copy_ledger(path, Path(folder) / "ledger.sqlite")
            with sqlite3.connect(copy) as connection:
                said = str(connection.execute("PRAGMA integrity_check").fetchone()[0])
                version = int(connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0])
            connection.close()
        found = audit(studies)
    except (sqlite3.DatabaseError, TypeError, RefereeError) as error:
        yield Finding("ledger", "problem", f"{path.name} cannot be read: {error}", "restore it from a backup")
        return
    if said != "ok":
        yield Finding("ledger", "problem", f"{path.name} is damaged: {said}", "restore it from a backup")
        return
    yield Finding(
        "ledger", "ok", f"schema {version}" + ("" if version == SCHEMA_VERSION else f", {SCHEMA_VERSION} after a start")
    )
    counts = f"{found.images} from {found.answers} answers ({found.withdrawn} withdrawn)"
    if found.problems:
        first = found.problems[0]
        told = f"{counts}; {len(found.problems)} problems, first {first['file']}: {first['problem']}"
        yield Finding("labels", "problem", told, "`python -m eval audit` lists them")
    else:
        yield Finding("labels", "ok", f"{counts}, all equal their rebuild")


def _leftovers(studies: Path) -> Iterator[Finding]:
    old = time.time() - _STALE_SECONDS
    stale = [p for p in studies.rglob(".tmp-*") if p.lstat().st_mtime < old]
    if stale:
        advice = "left by a kill; nothing reads them, and they may be deleted"
        yield Finding("leftovers", "warning", f"{len(stale)} temporary files, first {stale[0].name}", advice)
