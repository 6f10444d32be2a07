# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Facts about a batch of regions that show where a method looks: empty ones, ones at the border, and their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lib.regions import Region, Triple

# With a larger share of empty regions, the note of the answer says so.
MOST_EMPTY = 1 / 3
_BACKGROUND = "background"


def batch_facts(
    regions: Iterable[tuple[Region, Mapping[str, Any]]], shapes: Mapping[str, Triple]
) -> tuple[dict[str, Any], str | None]:
    """Facts of a batch, and a sentence if many of its regions are empty.

    - regions: their number n.
    - border: share of regions that touch the border of their image.
    - empty: share without predicted foreground, of those with a prediction; None without any prediction.
    - images: image id -> regions in it.

    Args:
        regions: each with the reason of its query, whose "predicted" holds the share of each predicted class.
        shapes: size of every image in voxels.
    """
    chosen = list(regions)
    border = sum(_touches(region, shapes[region.image]) for region, _ in chosen)
    predicted = [reason["predicted"] for _, reason in chosen if isinstance(reason.get("predicted"), Mapping)]
    empty = sum(not set(shares) - {_BACKGROUND} for shares in predicted)
    facts = {
        "regions": len(chosen),
        "border": round(border / len(chosen), 4) if chosen else 0.0,
        "empty": round(empty / len(predicted), 4) if predicted else None,
        "images": dict(sorted(Counter(region.image for region, _ in chosen).items())),
    }
    if not predicted or empty <= MOST_EMPTY * len(predicted):
        return facts, None
    advice = "a method with noise (power_pe) or with known foreground (random_fg66) asks for fewer of them"
    return facts, f"{empty} of {len(predicted)} regions hold no predicted structure; {advice}"


def _touches(region: Region, shape: Triple) -> bool:
    ends = zip(region.start, region.size, shape, strict=True)
    return any(a == 0 or a + d >= n for a, d, n in ends)
