# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Random regions: uniform, aware of foreground by hints, and the starting budget (nnActive, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from lib.regions import Box, Triple, boxes_overlap, centred, triple
from lib.selectors.greedy import open_grid

AREAS = ("all", "inside", "border")
FG66 = (1 / 3, 1 / 3, 1 / 3)
FG33 = (4 / 6, 1 / 6, 1 / 6)
BACKGROUND = "background"


@dataclass(frozen=True)
class Hint:
    """A voxel where an annotator saw a class: `area` is "inside" or "border" of it."""

    image: str
    voxel: Triple
    label: str
    area: str


@dataclass
class Space:
    """One image to draw from: its shape, the size of a region there, and boxes that may not be touched."""

    shape: Triple
    size: Triple
    taken: list[Box] = field(default_factory=list)

    def is_free(self, box: Box) -> bool:
        """Return whether `box` touches no taken voxel."""
        return not any(boxes_overlap(box, other) for other in self.taken)


@dataclass(frozen=True)
class Draw:
    """One drawn region, with the area and class it was drawn for ("all" and None for a uniform draw)."""

    image: str
    start: Triple
    size: Triple
    area: str = "all"
    label: str | None = None


HintsOf = Callable[[str], Sequence[Hint]]


def parse_hints(hints: Iterable[Mapping[str, object]]) -> dict[str, list[Hint]]:
    """Hints of a request, `{"image", "voxel": [x, y, z], "class", "area": "inside" | "border"}`, by image.

    Raises:
        ValueError: a field is missing or malformed.
    """
    found: dict[str, list[Hint]] = {}
    for hint in hints:
        missing = [k for k in ("image", "voxel", "class") if k not in hint]
        if missing:
            raise ValueError(f"a hint needs image, voxel, class and area, found {dict(hint)} without {missing[0]}")
        area = str(hint.get("area", "inside"))
        if area not in AREAS[1:]:
            raise ValueError(f'the area of a hint must be "inside" or "border", found {area!r}')
        voxel = hint["voxel"]
        if not isinstance(voxel, (list, tuple)):
            raise ValueError(f"the voxel of a hint must be [x, y, z], found {voxel!r}")
        item = Hint(str(hint["image"]), triple(voxel, "voxel of a hint"), str(hint["class"]), area)
        found.setdefault(item.image, []).append(item)
    return found


def uniform_start(shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> Triple:
    """Start of a box of `size` inside `shape`, uniform over every valid one, the last (S - P) included."""
    return triple(int(rng.integers(0, max(s - p, 0) + 1)) for s, p in zip(shape, size, strict=True))


def draw_uniform(space: Space, rng: np.random.Generator, trials: int = 600) -> Box | None:
    """Box uniform over the free positions of `space`, which may be None when there is no free one.

    `trials` random positions are tried first; if all fail, the free positions are listed and one of them is drawn.
    """
    for _ in range(trials):
        box = (uniform_start(space.shape, space.size, rng), space.size)
        if space.is_free(box):
            return box
    positions = tuple(s - k + 1 for s, k in zip(space.shape, space.size, strict=True))
    free = np.flatnonzero(open_grid(np.zeros(positions, np.float32), space.size, (1, 1, 1), space.taken) == 0)
    if free.size == 0:
        return None
    return triple(int(i) for i in np.unravel_index(rng.choice(free), positions)), space.size


def draw_hinted(
    space: Space, hints: Sequence[Hint], area: str, rng: np.random.Generator, trials: int = 200
) -> tuple[Box, Hint] | None:
    """Box centred on a hint of a class drawn uniformly among those hinted at, pushed inside the image.

    Hints of the other area serve where `area` has none. None after `trials` boxes that were not free.
    """
    foreground = [h for h in hints if h.label != BACKGROUND]
    usable = [h for h in foreground if h.area == area] or foreground
    by_class = {label: [h for h in usable if h.label == label] for label in sorted({h.label for h in usable})}
    for _ in range(trials if usable else 0):
        label = list(by_class)[int(rng.integers(len(by_class)))]
        hint = by_class[label][int(rng.integers(len(by_class[label])))]
        box = centred(hint.voxel, space.size, space.shape)
        if space.is_free(box):
            return box, hint
    return None


def random_regions(
    spaces: Mapping[str, Space],
    n: int,
    rng: np.random.Generator,
    weights: Sequence[float] = (1.0, 0.0, 0.0),
    hints_of: HintsOf = lambda image: (),
) -> list[Draw]:
    """Up to `n` regions, one image after the other in an order shuffled once from sorted ids; none overlaps another.

    `weights` are the probabilities of the areas all, inside and border, drawn anew for each region: (1, 0, 0) is
    `random`, `FG33` and `FG66` the foreground-aware baselines. Where a hinted draw is not possible a uniform one takes
    its place; an image without a free position drops out. The boxes drawn are added to `spaces`.
    """
    order = sorted(spaces)
    rng.shuffle(order)
    found: list[Draw] = []
    while order and len(found) < n:
        for image in list(order):
            if len(found) == n:
                break
            draw = _draw(image, spaces[image], rng, weights, hints_of)
            if draw is None:
                order.remove(image)
                continue
            spaces[image].taken.append((draw.start, draw.size))
            found.append(draw)
    return found


def _draw(
    image: str, space: Space, rng: np.random.Generator, weights: Sequence[float], hints_of: HintsOf
) -> Draw | None:
    area = AREAS[int(rng.choice(3, p=np.asarray(weights) / np.sum(weights)))]
    hinted = None if area == "all" else draw_hinted(space, hints_of(image), area, rng)
    if hinted is not None:
        (start, size), hint = hinted
        return Draw(image, start, size, hint.area, hint.label)
    box = draw_uniform(space, rng)
    return None if box is None else Draw(image, *box)


def starting_budget(
    spaces: Mapping[str, Space],
    n: int,
    rng: np.random.Generator,
    hints: Mapping[str, Sequence[Hint]],
    per_class: int = 2,
) -> list[Draw]:
    """`per_class` regions of every class named in the hints, each in another image, then Random 33 % FG up to `n`.

    Classes hinted at in the fewest images come first; an image serves one class only while others are left, so that
    cross-validation over images can give every class to every training split. A class seen in too few images gets as
    many regions as it has images; where every hint of it lies in a region drawn before, that region counts.
    """
    images_of: dict[str, list[str]] = {}
    for image in sorted(set(hints) & set(spaces)):
        for label in sorted({h.label for h in hints[image]}):
            images_of.setdefault(label, []).append(image)
    found: list[Draw] = []
    used: set[str] = set()
    for label in sorted(images_of, key=lambda c: (len(images_of[c]), c)):
        candidates = images_of[label]
        rng.shuffle(candidates)
        candidates.sort(key=lambda image: image in used)  # stable: unused images first, shuffled among themselves
        wanted = per_class
        for image in candidates:
            if wanted == 0 or len(found) == n:
                break
            seen = [h for h in hints[image] if h.label == label]
            draw = _draw_class(image, spaces[image], seen, rng)
            if draw is not None:
                spaces[image].taken.append((draw.start, draw.size))
                found.append(draw)
                used.add(image)
                wanted -= 1
            elif any(_holds(d, h) for d in found for h in seen):
                wanted -= 1
    rest = random_regions(spaces, n - len(found), rng, FG33, lambda image: hints.get(image, ()))
    return found + rest


def _draw_class(image: str, space: Space, hints: Sequence[Hint], rng: np.random.Generator) -> Draw | None:
    """Free box centred on one of `hints` or, where none is free, holding it somewhere else."""
    order = [hints[i] for i in rng.permutation(len(hints))]
    for hint in order:
        start, size = centred(hint.voxel, space.size, space.shape)
        if space.is_free((start, size)):
            return Draw(image, start, size, hint.area, hint.label)
    positions = tuple(s - k + 1 for s, k in zip(space.shape, space.size, strict=True))
    free = open_grid(np.zeros(positions, np.float32), space.size, (1, 1, 1), space.taken) == 0
    for hint in order:
        low = [max(0, v - k + 1) for v, k in zip(hint.voxel, space.size, strict=True)]
        around = np.argwhere(free[tuple(slice(a, v + 1) for a, v in zip(low, hint.voxel, strict=True))])
        if len(around):
            start = triple(int(i) + a for i, a in zip(around[rng.integers(len(around))], low, strict=True))
            return Draw(image, start, space.size, hint.area, hint.label)
    return None


def _holds(draw: Draw, hint: Hint) -> bool:
    return draw.image == hint.image and boxes_overlap((draw.start, draw.size), (hint.voxel, (1, 1, 1)))


def border(mask_xyz: ArrayLike) -> NDArray[np.bool_]:
    """Voxels of `mask_xyz` with a face neighbour outside of it, outside of the image included."""
    mask = np.asarray(mask_xyz, dtype=bool)
    return np.asarray(mask & ~ndimage.binary_erosion(mask))


def hints_from_labels(
    labels_xyz: ArrayLike, image: str, names: Mapping[int, str], rng: np.random.Generator, per_class: int = 64
) -> list[Hint]:
    """Up to `per_class` hints for each area of each class of a label map (X, Y, Z); `names` maps values to classes."""
    labels = np.asarray(labels_xyz)
    found: list[Hint] = []
    for value in sorted(names):
        mask = labels == value
        for area, voxels in (("inside", mask), ("border", border(mask))):
            flat = np.flatnonzero(voxels)
            chosen = flat if flat.size <= per_class else np.sort(rng.choice(flat, per_class, replace=False))
            at = np.stack(np.unravel_index(chosen, labels.shape), axis=1)
            found += [Hint(image, triple(int(i) for i in v), names[value], area) for v in at]
    return found
