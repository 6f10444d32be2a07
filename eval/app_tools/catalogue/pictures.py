# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""One picture per query method for the catalogue: the picked regions over the gallery's posterior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eval.app_tools.gallery import IMAGES, TAKEN, PhantomEvidence

if TYPE_CHECKING:
    from lib.querying.types import Pick

KEY = "picks"  # entry of a picture's metadata
_DARK = "#101018"


def write_picture(path: Path, picks: Sequence[Pick], evidence: PhantomEvidence, digest: str) -> None:
    """Draw `picks` into `path`, a PNG whose metadata holds `digest`."""
    side = any(pick.unit == "slice" for pick in picks)  # slices along z are lines when seen along y
    figure = Figure(figsize=(6.0, 1.55 if side else 2.15), dpi=100, layout="constrained")
    for axes, image in zip(figure.subplots(1, len(IMAGES)), IMAGES, strict=True):
        entropy = evidence.moments(image).predictive_entropy()
        shown = entropy.max(axis=1 if side else 2).T
        axes.imshow(shown, cmap="viridis", origin="lower", aspect="auto" if side else "equal")
        for start, size in TAKEN.get(image, ()):
            _box(axes, start, size, side, "--")
        for pick in (p for p in picks if p.image == image):
            _box(axes, pick.start, pick.size, side, "-")
            _rank(axes, pick, side)
        axes.set_title(image.replace("_", " "), fontsize=9)
        axes.set(xticks=[], yticks=[])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # 128 colours are as good to the eye and halve the file.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(128, dither=Image.Dither.NONE)
    note = PngInfo()
    note.add_text(KEY, digest)
    picture.save(path, pnginfo=note, optimize=True)


def digest_in(path: Path) -> str:
    """Return the digest of the picks that a picture was drawn from; empty if it has none."""
    with Image.open(path) as picture:
        return str(picture.info.get(KEY, ""))


def _box(axes: Axes, start: Sequence[int], size: Sequence[int], side: bool, style: str) -> None:
    along = 2 if side else 1
    inset = 0.0 if size[along] == 1 else 0.4  # keeps the line inside the axes
    corner = (start[0] - 0.1, start[along] - 0.5 + inset)
    width, height = size[0] - 0.8, size[along] - 2 * inset
    effect = [withStroke(linewidth=3, foreground=_DARK)]
    axes.add_patch(
        Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=1.4, ls=style, path_effects=effect)
    )


def _rank(axes: Axes, pick: Pick, side: bool) -> None:
    start, size = pick.start, pick.size
    place = (start[0] + size[0] / 2 - 0.5, start[1] + size[1] / 2 - 0.5)
    if side:  # ranks of neighbouring slices stand beside each other
        place = (2.0 + 5 * (pick.rank - 1), float(start[2]))
    effect = [withStroke(linewidth=2.5, foreground=_DARK)]
    axes.text(
        *place,
        str(pick.rank),
        color="white",
        fontsize=9,
        fontweight="bold",
        ha="center",
        va="center",
        path_effects=effect,
    )
