# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The plan of one bundle in one studies folder: made at the first training, kept as YAML, remade only on request."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from lib.models.class_names import unlabelled_values
from lib.models.plan import Plan, checked
from lib.models.plan_files import read_plan, read_yaml, write_plan
from lib.models.recipe import Bundle
from lib.options import AppOptions
from lib.planning.fingerprint_reader import declared_modality, take_fingerprint
from lib.planning.memory_budget import measure_budget
from lib.planning.planner import QUARTER, make_plan, names_sides

logger = logging.getLogger(__name__)


class PlanStore:
    """Store of a bundle's plan, and the bundle that follows it.

    `--conf plan bundle` keeps the bundle as in its folder. `auto` follows `<state>/plan_<bundle>.yaml`, which the
    first training writes. A file name works like `auto`, but the fields of
    that file, all or a few, take precedence.

    Args:
        bundle: as in its folder.
        options: options of the app.
        state: folder `.patchwise` of the studies folder.
        classes: names of the classes, without background.
        data: folder whose dataset.json may contain the modality. Default: parent of `state`.

    Raises:
        PlanError: the file that the option names cannot be read.
    """

    def __init__(
        self, bundle: Bundle, options: AppOptions, state: Path, classes: Collection[str], data: Path | None = None
    ) -> None:
        self.base = bundle
        self.options = options
        self.classes = classes
        self.data = data or state.parent
        self.path = state / f"plan_{bundle.name}.yaml"
        self.fields = read_yaml(Path(options.plan)) if options.plan not in ("auto", "bundle") else {}
        self._read: tuple[tuple[int, int], Bundle] | None = None

    def current(self) -> Plan | None:
        """The plan in force; None before the first training, or without plans.

        Raises:
            PlanError: the stored plan was changed into one that does not fit.
        """
        return self.bundle().plan

    def bundle(self) -> Bundle:
        """The bundle as the plan in force has it."""
        if self.options.plan == "bundle" or not self.path.is_file():
            return self.base
        status = self.path.stat()
        seen = status.st_mtime_ns, status.st_size
        if self._read is None or self._read[0] != seen:
            plan = self._with_fields(read_plan(self.path))
            self._read = seen, self.base.planned(plan)
        return self._read[1]

    def ensure(self, images: Mapping[str, Path], labels: Mapping[str, Path], replan: bool = False) -> Bundle:
        """The planned bundle; without a plan, or with `replan`, the plan is made from the images.

        Raises:
            PlanError: no image can be read.
        """
        if self.options.plan == "bundle" or (self.path.is_file() and not replan):
            return self.bundle()
        from lib.models.checkpoints import choose_device

        pool = take_fingerprint(images, labels, declared_modality(self.data), unlabelled_values(self.data))
        budget = measure_budget(str(choose_device(self.options.device)), self.options.memory)
        x, y, z = self.options.spacing or (0.0, 0.0, 0.0)
        asked = (x, y, z) if x else None
        outputs, sided = len(self.classes) + 1, names_sides(self.classes)
        made = make_plan(pool, budget, self.base.configuration, outputs, asked, sided)
        self._with_fields(made)
        write_plan(made, self.path)
        bundle = self.bundle()
        assert bundle.plan is not None
        logger.info("plan of %s, kept in %s:\n%s", bundle.name, self.path, bundle.plan.table())
        if bundle.plan.shown is not None and bundle.plan.shown < QUARTER:
            logger.warning("plan of %s: a crop shows %s %s", bundle.name, f"{bundle.plan.shown:.0%}", made.why["shown"])
        return bundle

    def _with_fields(self, plan: Plan) -> Plan:
        if not self.fields:
            return plan
        own = f"as in {Path(self.options.plan).name}"
        # Another crop or spacing shows another share of an image, which the file does not say.
        stale = {"shown": None} if {"patch", "spacing"} & set(self.fields) else {}
        why = {**plan.why, **dict.fromkeys([*stale, *self.fields], own)}
        return checked({**plan.model_dump(), "why": why, **stale, **self.fields}, self.options.plan)
