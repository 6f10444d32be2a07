# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The page of the catalogue, written from the registry.

The page holds per method the equation, source, needs, cost, advice, options and a picture of the regions it picks on
the posterior of the gallery. A picture carries its picks as metadata, so that a test notices an outdated one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval.app_path import APP, add_app
from eval.app_tools.catalogue.facts import FACTS, POSTERIORS, UNCERTAINTIES
from eval.app_tools.gallery import BATCH, PhantomEvidence, _picks

add_app()

from lib.querying.methods import describe  # noqa: E402
from lib.querying.registry import POSTERIOR_OPTIONS  # noqa: E402
from lib.querying.types import Pick  # noqa: E402  the app's path comes first

ROOT = APP.parents[1]
PAGE = ROOT / "docs" / "reference" / "methods.md"
PICTURES = ROOT / "docs" / "images" / "methods"

_COSTS = {
    "none": "no model",
    "posterior": "one pass of the posterior over the pool",
    "features": "features of every unit",
    "gradients": "a backward pass per unit",
}
_NEEDS = {
    "model": "a trained model",
    "ensemble": "an ensemble",
    "mc_dropout": "a network with dropout",
    "features": "features",
    "gradients": "gradients",
    "hints": "hints of foreground",
    "regions": "regions of the request",
}
_INTRO = f"""\
# Query methods

<!-- Written by `make reference`; edit lib/querying/registry.py or eval/app_tools/catalogue/facts.py instead. -->

A query method is a composition of a posterior, an uncertainty, a unit and a selector. Every method works in requests
and studies by its name. The option `methods` selects those that the clients list; by default the recommended ones.

Notation:

- $p_{{mc}}(v)$ is the probability of class c by member m at voxel v, and $\\bar p$ its mean over the M members.
- $s(R)$ is the mean of the uncertainty $u(v)$ over the region R; $k$ is the batch.
- L are the annotated regions, A the regions chosen so far; $f_R$ and $g_R$ are features and gradients of R.
- Logarithms are natural. Regions never overlap an annotated, open or chosen region.

The pictures show the {BATCH} regions (2 whole images) that a method picks on one posterior of three phantoms. The
background is the largest predictive entropy: along z for patches and images, along y for slices, which are lines from
the side. Numbers are ranks. The dashed box was annotated before. Boxes that overlap in the picture differ in depth.
Phantoms show the geometry of a choice and not its value for patients.
"""


def catalogue(pictures: str = "../images/methods") -> str:
    """Return the page; `pictures` is the address of their folder, relative to it."""
    rows = describe()
    parts = [_INTRO, "## Overview\n", _overview(rows), "## Posteriors\n", _posteriors(), "## Uncertainties\n"]
    parts += [_uncertainties()]
    papers: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        papers.setdefault(row["paper"], []).append(row)
    for paper, methods in papers.items():
        parts += [f"## {paper}\n", *(_section(row, pictures) for row in methods)]
    return "\n".join(parts).rstrip("\n") + "\n"


def _overview(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| method | regions | posterior | uncertainty | selector | cost |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name = f"[{row['name']}](#{row['name']})" + (" (recommended)" if row["recommended"] else "")
        parts = (row["unit"], row["posterior"] or "", row["uncertainty"] or "", row["selector"], row["cost"])
        lines.append(f"| {name} | {' | '.join(str(part) for part in parts)} |")
    costs = "; ".join(f"`{name}`: {meaning}" for name, meaning in _COSTS.items())
    return "\n".join(lines) + f"\n\nCost classes: {costs}.\n"


def _posteriors() -> str:
    lines = ["| posterior | meaning | options (default) |", "| --- | --- | --- |"]
    for name, options in POSTERIOR_OPTIONS.items():
        given = ", ".join(f"`{key}` ({_shown(option.default)})" for key, option in options.items())
        lines.append(f"| `{name}` | {POSTERIORS[name]} | {given} |")
    return "\n".join(lines) + "\n\nPosteriors combine, for example `ensemble*tta`.\n"


def _uncertainties() -> str:
    lines = ["| uncertainty | u(v) |", "| --- | --- |"]
    lines += [f"| `{name}` | ${formula}$ |" for name, formula in UNCERTAINTIES.items()]
    return "\n".join(lines) + "\n"


def _section(row: Mapping[str, Any], pictures: str) -> str:
    facts, name = FACTS[row["name"]], row["name"]
    needs = [_NEEDS[need] for need in _NEEDS if need in row["needs"]] or ["nothing"]
    others = [unit for unit in row["units"] if unit != row["unit"]]
    cells = [
        ("composition", " × ".join(f"`{row[k]}`" for k in ("posterior", "uncertainty", "unit", "selector") if row[k])),
        ("source", f"{row['paper']}, section {row['section']}"),
        ("needs", ", ".join(needs)),
        ("cost", f"{_COSTS[row['cost']]}; choice: {facts.cost}"),
        ("suits", facts.advice),
        ("other units", ", ".join(others)),
        ("other names", ", ".join(f"`{alias}`" for alias in row["aliases"])),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in cells if value)
    summary = row["summary"][0].upper() + row["summary"][1:]
    text = f"### {name}\n\n{summary}.\n\n{_displayed(facts.equation)}\n\n| | |\n| --- | --- |\n{table}\n"
    options = "\n".join(_option(key, option) for key, option in row["options"].items())
    if options:
        text += f"\n| option | default | values | meaning |\n| --- | --- | --- | --- |\n{options}\n"
    return f"{text}\n![Regions picked by {name}]({pictures}/{name}.png)\n"


def _displayed(equation: str) -> str:
    lines = equation.split(r";\quad ")
    body = lines[0] if len(lines) == 1 else "\\begin{gathered}\n" + " \\\\\n".join(lines) + "\n\\end{gathered}"
    return f"```math\n{body}\n```"


def _option(key: str, option: Mapping[str, Any]) -> str:
    if option["choices"]:
        values = ", ".join(option["choices"])
    elif option["kind"] == "bool":
        values = "true, false"
    else:
        values = f"{option['low']:,.10g} to {option['high']:,.10g}"
    return f"| `{key}` | {_shown(option['default'])} | {values} | {option['help']} |"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def picked() -> Iterator[tuple[str, list[Pick], PhantomEvidence]]:
    """Name and picks of every method on the gallery's posterior, and that posterior."""
    evidence = PhantomEvidence()
    for row in describe():
        yield row["name"], _picks(row["name"], evidence)[0], evidence


def digest(picks: Sequence[Pick]) -> str:
    """Return a digest of rank, image and box of every pick."""
    boxes = [[pick.rank, pick.image, *map(int, pick.start), *map(int, pick.size)] for pick in picks]
    return hashlib.sha256(json.dumps(boxes).encode()).hexdigest()[:16]
