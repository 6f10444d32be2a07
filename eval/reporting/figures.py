# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Figures of the report: learning curves, and regions drawn on their scans. No global plotting state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from eval.metrics.cost import TITLES as COST_TITLES
from eval.reporting.summary import full_line, mean_curves

# Okabe and Ito's colours are distinct with any colour vision; markers are distinct in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
TITLES = {
    **COST_TITLES,
    "mean_dice": "mean Dice of the test cases",
    "mean_hd95": "mean HD95 in mm",
}
_OUTLINES = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
_INK, _GRID = "#333333", "#DDDDDD"


@dataclass(frozen=True)
class Picture:
    """One region on its scan: the slice through its middle, the box in that slice and the true classes there."""

    title: str
    image_xy: NDArray[np.float32]
    label_xy: NDArray[np.uint8]
    corner: tuple[float, float]
    extent: tuple[float, float]
    aspect: float


def learning_curves(
    rounds: pd.DataFrame, values: Sequence[str], costs: Sequence[str], titles: Mapping[str, str] | None = None
) -> Figure:
    """One panel per value and cost: one line per method, a band of one standard deviation where seeds repeat."""
    names = {**TITLES, **(titles or {})}
    panels = [(value, cost) for value in values for cost in costs]
    columns = min(2, len(panels))  # more would be too small to read on the page
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.6 * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=len(values) == 1).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for panel, (axis, (value, cost)) in enumerate(zip(axes, panels, strict=False)):
        curves = mean_curves(rounds, value, cost)
        for i, (method, curve) in enumerate(curves.items()):
            colour = COLOURS[i % len(COLOURS)]
            axis.plot(
                curve["cost"],
                curve["mean"],
                marker=MARKERS[i % len(MARKERS)],
                color=colour,
                label=method,
                linewidth=1.8,
                markersize=5.5,
                linestyle="-" if i < len(COLOURS) else "--",
            )
            # Bands of more methods than colours hide the curves; the tables have the deviations.
            if curve["sd"].notna().any() and len(curves) <= len(COLOURS):
                low, high = curve["mean"] - curve["sd"], curve["mean"] + curve["sd"]
                axis.fill_between(curve["cost"], low, high, color=colour, alpha=0.15, linewidth=0)
        full = full_line(rounds, value)
        if full is not None and np.isfinite(full):
            axis.axhline(full, color=_INK, linestyle=":", linewidth=1.4, label="full data")
        _plain(axis)
        axis.set_xlabel(names.get(cost, cost))
        if panel % columns == 0 or len(values) > 1:
            axis.set_ylabel(names.get(value, value))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=min(max(2, 5 * columns // 2), len(labels)), frameon=False
    )
    return figure


def penalty_matrix(matrix: pd.DataFrame) -> Figure:
    """Share of budgets at which the row's method beats the column's significantly; rows beat columns."""
    side = 1.6 + 0.55 * len(matrix)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(matrix.to_numpy(), cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(matrix.to_numpy()):
        if value > 0:
            axis.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", color=_INK if value < 0.6 else "white"
            )
    names = [str(name) for name in matrix.index]
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_xlabel("is beaten")
    axis.set_ylabel("beats")
    figure.colorbar(image, ax=axis, shrink=0.7, label="share of budgets")
    return figure


def region_pictures(pictures: Sequence[Picture], columns: int = 4) -> Figure:
    """A sheet of regions: the queried box in yellow, outlines of the true classes in colour."""
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, picture in zip(axes, pictures, strict=False):
        low, high = np.percentile(picture.image_xy, [1, 99])
        axis.imshow(picture.image_xy.T, cmap="gray", origin="lower", vmin=low, vmax=high, aspect=picture.aspect)
        for value in np.unique(picture.label_xy[picture.label_xy > 0]):
            colour = _OUTLINES[(int(value) - 1) % len(_OUTLINES)]
            axis.contour((picture.label_xy == value).T, levels=[0.5], colors=[colour], linewidths=1.2)
        axis.add_patch(Rectangle(picture.corner, *picture.extent, fill=False, edgecolor="#F0E442", linewidth=1.8))
        axis.set_title(picture.title, fontsize=8, color=_INK)
    return figure


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG with text kept as text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _plain(axis: Axes) -> None:
    """Set a light grid without a frame, so that the curves stand out."""
    axis.grid(color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_INK)
    axis.tick_params(colors=_INK, labelsize=9)
