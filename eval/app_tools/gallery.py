# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A page with the picks of every query method on the same phantom posterior (`python -m eval gallery`)."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy import ndimage

from eval.app_path import add_app

add_app()

from lib.querying.methods import MethodError, describe, resolve  # noqa: E402
from lib.querying.selection import Pick, PoolExhausted, PoolImage, select  # noqa: E402  the app's path comes first
from lib.regions import Box  # noqa: E402
from lib.uncertainty import Moments  # noqa: E402

SHAPE, SIZE, BATCH = (48, 48, 24), (10, 10, 8), 6
LABELS = {"background": 0, "outer": 1, "inner": 2}
TAKEN: dict[str, tuple[Box, ...]] = {"phantom_a": (((18, 4, 8), SIZE),)}
IMAGES = ("phantom_a", "phantom_b", "phantom_c")

_PAGE = Template(
    """<!doctype html><html lang="en"><meta charset="utf-8"><title>Query methods on one phantom posterior</title>
<style>body{font:15px/1.5 sans-serif;margin:2rem auto;max-width:76rem;color:#222}h2{margin:2rem 0 0;font-size:1.1rem}
p{margin:.2rem 0}img{max-width:100%}.facts{color:#666}</style>
<h1>Query methods on one phantom posterior</h1>
<p>Three phantoms, the largest predictive entropy along z, and the {{ batch }} regions each method asks for next
(numbers are ranks; the grey box was annotated before).</p>
{% for m in methods %}<h2 id="{{ m.name }}">{{ m.name }}</h2><p>{{ m.summary }}</p>
<p class="facts">{{ m.posterior or "no model" }} · {{ m.uncertainty or "no uncertainty" }} · {{ m.unit }} ·
{{ m.selector }} — {{ m.paper }}{% if m.note %} — {{ m.note }}{% endif %}</p>
{% if m.png %}<img alt="regions picked by {{ m.name }}" src="data:image/png;base64,{{ m.png }}">{% endif %}
{% endfor %}</html>""",
    autoescape=True,
)


class PhantomEvidence:
    """Members that disagree on the borders of two nested bodies, elsewhere for each image."""

    def __init__(self) -> None:
        self._moments = {image: Moments.from_members(_members(i)) for i, image in enumerate(IMAGES)}

    def moments(self, image: str) -> Moments:
        """Moments of a phantom."""
        return self._moments[image]

    def features(self, image: str, boxes: Sequence[Box]) -> NDArray[np.float64]:
        """Means and spreads of the class probabilities in each box."""
        mean = self._moments[image].mean
        cut = [mean[(slice(None), *(slice(a, a + d) for a, d in zip(*box, strict=True)))] for box in boxes]
        return np.array([np.r_[c.mean(axis=(1, 2, 3)), c.std(axis=(1, 2, 3))] for c in cut], dtype=np.float64)

    def labelled_features(self) -> NDArray[np.float64]:
        """Features of the boxes annotated before."""
        return np.concatenate([self.features(image, boxes) for image, boxes in TAKEN.items()])

    def gradients(self, image: str, boxes: Sequence[Box], layer: str) -> NDArray[np.float64]:
        """Products of features in place of gradients, which a phantom does not have."""
        found = self.features(image, boxes)
        return np.concatenate([found - found.mean(axis=0), found**2], axis=1)

    def class_frequencies(self) -> NDArray[np.float64]:
        """Shares of the classes in the annotated voxels."""
        return np.array([0.8, 0.15, 0.05])


def write_gallery(path: Path) -> Path:
    """Write the page, one self-contained HTML file, to `path`."""
    evidence, methods = PhantomEvidence(), []
    for entry in describe():
        picks, note = _picks(entry["name"], evidence)
        methods.append({**entry, "note": note, "png": _drawing(picks, evidence) if picks else None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PAGE.render(methods=methods, batch=BATCH), encoding="utf-8")
    return path


def _picks(name: str, evidence: PhantomEvidence) -> tuple[list[Pick], str]:
    method = resolve(name)
    pool = [PoolImage(image, SHAPE, taken=TAKEN.get(image, ())) for image in IMAGES]
    regions = [{"image": i, "start": (30, 30, 2), "size": SIZE} for i in IMAGES] if name == "precomputed" else ()
    batch = 2 if method.unit == "volume" else BATCH
    try:
        return select(
            method, pool, evidence, batch, size=SIZE, round_=1, labels=LABELS, hints=_hints(), regions=regions
        ), ""
    except PoolExhausted as short:
        return short.picks, str(short)
    except MethodError as error:
        return [], str(error)


def _members(image: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(image)
    x, y, z = np.indices(SHAPE, dtype=np.float64)
    centre = 24 + 7 * np.array([np.cos(2 * image), np.sin(2 * image)])
    members = []
    for _ in range(5):
        shift = rng.normal(0, 1.2, 3)
        radius = np.hypot(np.hypot(x - centre[0] - shift[0], y - centre[1] - shift[1]), 1.6 * (z - 12 - shift[2]))
        noise = ndimage.gaussian_filter(rng.normal(0, 1, SHAPE), 2) * 6
        outer, inner = (15 - radius + noise) / 2, (7 - radius + noise) / 1.5
        odds = np.exp(np.clip(np.stack([np.zeros(SHAPE), outer, outer + inner]), -30, 30))
        members.append((odds / odds.sum(axis=0)).astype(np.float32))
    return members


def _hints() -> list[dict[str, Any]]:
    spots = {"background": (4, 40, 12), "outer": (34, 24, 12), "inner": (24, 24, 12)}
    return [
        {"image": image, "voxel": list(voxel), "class": label, "area": area}
        for image in IMAGES
        for label, voxel in spots.items()
        for area in ("inside", "border")
    ]


def _drawing(picks: Sequence[Pick], evidence: PhantomEvidence) -> str:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, image in zip(figure.subplots(1, len(IMAGES)), IMAGES, strict=True):
        axes.imshow(evidence.moments(image).predictive_entropy().max(axis=2).T, cmap="viridis", origin="lower")
        for start, size in TAKEN.get(image, ()):
            axes.add_patch(_rectangle(start, size, "0.7"))
        for pick in (p for p in picks if p.image == image):
            axes.add_patch(_rectangle(pick.start, pick.size, "tab:red"))
            slice_of = f" z={pick.start[2]}" if pick.unit == "slice" else ""
            place = (pick.start[0] + 1, pick.start[1] + 1 + (4 * pick.rank if pick.unit == "slice" else 0))
            axes.text(*place, f"{pick.rank}{slice_of}", color="white", fontsize=8)
        axes.set(title=image, xticks=[], yticks=[])
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _rectangle(start: Sequence[int], size: Sequence[int], colour: str) -> Rectangle:
    return Rectangle((start[0] - 0.5, start[1] - 0.5), size[0], size[1], fill=False, edgecolor=colour, linewidth=1.6)
