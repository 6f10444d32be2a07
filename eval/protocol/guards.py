# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Checks for incomparable numbers, each refused in one sentence: starts, recipes, leaks, origins, too few seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.errors import RefereeError
from eval.files import read_json
from eval.protocol.study import FULL_DATA, Study

# Fewer seeds cannot distinguish a better method from chance with any test: with two, a t-test has one degree of
# freedom, and a bootstrap draws one of three means.
SEEDS_OF_A_CLAIM = 3
# Parts of a trained model's description that depend on the study, not on the method.
_RECIPE = ("bundle", "classes", "members", "recipe", "spacing")
_HARDWARE = ("cpu", "cores", "gpu", "system")
_VERSIONS = ("python", "packages")


class Steps(NamedTuple):
    """Finished steps of one cell."""

    method: str
    seed: int
    steps: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the cell."""
        return f"{self.method}_s{self.seed}"


def steps_of(study: Study, out: Path) -> list[Steps]:
    """Every cell of a run's folder that has begun, in the order of the study."""
    found = []
    for seed in study.seeds:
        for method, _ in study.lines:
            state = read_json(out / "cells" / f"{method.label}_s{seed}" / "state.json")
            if state is not None:
                found.append(Steps(method.label, seed, state["steps"]))
    return found


def check_cells(cells: Iterable[Steps]) -> None:
    """Everything that the finished steps of a study's cells can show.

    Raises:
        RefereeError: methods that cannot be compared.
    """
    listed = list(cells)
    check_same_start(listed)
    check_same_recipe(listed)


def check_same_start(cells: Iterable[Steps]) -> None:
    """Methods of one seed must share round 0, or a difference between them means nothing.

    Raises:
        RefereeError: two cells of a seed that started from different regions, or with different answers to them.
    """
    first: dict[tuple[int, str], tuple[str, Any]] = {}
    for cell in cells:
        if cell.method == FULL_DATA:
            continue
        queried = cell.steps.get("0.query")
        if queried is not None:
            regions = sorted((r["image"], r["start"], r["size"]) for r in queried["regions"])
            name, expected = first.setdefault((cell.seed, "regions"), (cell.name, regions))
            if regions != expected:
                raise RefereeError(
                    f"{cell.name} and {name} did not start from the same regions; they cannot be compared"
                )
        digest = (cell.steps.get("0.annotate") or {}).get("digest")
        if digest is not None:
            name, expected = first.setdefault((cell.seed, "answers"), (cell.name, digest))
            if digest != expected:
                raise RefereeError(
                    f"{cell.name} and {name} got different answers to the same regions of round 0; "
                    "they cannot be compared"
                )


def recipe_of(trained: Mapping[str, Any]) -> dict[str, Any] | None:
    """Training recipe of a model, without the parts a method may change: data, round, weights; None if unrecorded."""
    model = trained.get("model")
    if not isinstance(model, Mapping) or "recipe" not in model:
        return None
    return {key: model.get(key) for key in _RECIPE}


def check_same_recipe(cells: Iterable[Steps]) -> None:
    """Methods must train the same way in the same round, the full-data line as in round 0.

    Raises:
        RefereeError: two cells with another recipe; names the first entry that differs.
    """
    first: dict[int, tuple[str, dict[str, Any]]] = {}
    for cell in cells:
        for key, trained in cell.steps.items():
            round_, _, step = key.partition(".")
            recipe = recipe_of(trained) if step == "train" else None
            if recipe is None:
                continue
            name, expected = first.setdefault(int(round_), (cell.name, recipe))
            if recipe != expected:
                raise RefereeError(
                    f"{cell.name} and {name} were trained differently in round {round_} "
                    f"({_first_difference(recipe, expected)}); they cannot be compared"
                )


def check_same_origin(manifests: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Results must come from one kind of machine, one set of versions and one state of the project.

    `manifests` holds (name, manifest); the state of the project is the digest of the code that determines the numbers
    if both manifests have it, else the commit.

    Raises:
        RefereeError: two that differ, with the difference.
    """
    if not manifests:
        return
    name, expected = manifests[0]
    for other, manifest in manifests[1:]:
        pairs = [
            ("hardware", *(_part(m["hardware"], _HARDWARE) for m in (manifest, expected))),
            ("versions", *(_part(m["versions"], _VERSIONS) for m in (manifest, expected))),
        ]
        codes = [m["versions"].get("code") for m in (manifest, expected)]
        if None in codes:
            codes = [m["versions"].get("patchwise") for m in (manifest, expected)]
        pairs.append(("project", {"state": codes[0]}, {"state": codes[1]}))
        for what, mine, theirs in pairs:
            if mine != theirs:
                raise RefereeError(
                    f"{other} and {name} come from different {what} ({_first_difference(mine, theirs)}); "
                    "run them alike, or mix them knowingly with --mixed"
                )


def check_seeds(seeds: Mapping[str, int], claim: str) -> None:
    """A claim about methods needs three finished seeds of each; `seeds[method]` counts them.

    Raises:
        RefereeError: a method with fewer.
    """
    few = {method: n for method, n in seeds.items() if n < SEEDS_OF_A_CLAIM}
    if few:
        method, n = next(iter(few.items()))
        raise RefereeError(
            f"{claim} needs {SEEDS_OF_A_CLAIM} finished seeds of every method, but {method} has {n}; "
            "run more seeds, or report without --claim"
        )


def check_no_test_image(held: Mapping[str, str], test: Mapping[str, str], pool: Mapping[str, str]) -> None:
    """A server's images must not include a test scan by content, and pool cases must have the content of the pool.

    All three map ids to content digests.

    Raises:
        RefereeError: a test scan in the training pool, or another scan under a pool case's name.
    """
    tested = {digest: case for case, digest in test.items()}
    for image, digest in held.items():
        if digest in tested:
            raise RefereeError(f"the server's image {image} is test case {tested[digest]}; remove it from the server")
        if image in pool and pool[image] != digest:
            raise RefereeError(f"the server's image {image} is not the scan that the study calls so; replace it")


def _part(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: values.get(key) for key in keys}


def _first_difference(mine: Any, theirs: Any, where: str = "") -> str:
    """The first entry, in order of names, in which two nested mappings differ."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*mine, *theirs}, key=str):
            if mine.get(key) != theirs.get(key):
                return _first_difference(mine.get(key), theirs.get(key), f"{where}.{key}" if where else str(key))
    return f"{where}: {mine} and {theirs}"
