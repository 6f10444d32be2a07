# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Which images can be used, and a sentence about every other one; looked at again when a file changes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lib.errors import PatchwiseError
from lib.ledger.queries import QueryLedger
from lib.regions import Triple, triple
from lib.storage.readers import why_unopenable
from lib.storage.volume_headers import ImageError
from lib.storage.volumes import check_image, image_geometry
from lib.studies.file_cache import FileCache, Stamped

logger = logging.getLogger(__name__)

# A file that changed so recently may still be on its way here, or its folder may have failed for a moment.
SETTLED_SECONDS = 60.0
# Such a file is looked at again after so long, even if its size and time stay.
AGAIN_SECONDS = 5.0
_TAG = ":problem"


class Geometry(NamedTuple):
    """Grid of an image: shape in voxels, 4 x 4 affine, spacing in mm along each axis."""

    shape: Triple
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]


class ImageChecks:
    """Grids and problems of image files.

    Headers are read before any image is asked about. Voxels are read before an image is asked about or learned from,
    and by every scoring. Problems are kept in the ledger, so that a scoring in a process of its own shares its finds.

    Args:
        ledger: where grids and problems are kept, as infos of the images.
    """

    def __init__(self, ledger: QueryLedger) -> None:
        self.ledger = ledger
        self._grids = FileCache[Geometry](ledger, ":grid", _read_geometry, _parse_geometry)
        self._read: dict[str, Stamped] = {}
        self._logged: set[str] = set()

    def geometries(self, files: Mapping[str, Stamped]) -> dict[str, Geometry]:
        """Grid of every file.

        Raises:
            ImageError: a file that cannot be used.
        """
        return self._grids.of(files)

    def usable(self, files: Mapping[str, Stamped]) -> tuple[dict[str, Geometry], dict[str, str]]:
        """Grids of the images that can be used as far as is known, and the sentences about the others."""
        wrong, again = self._noted(files)
        looked_at = self.read({image: files[image] for image in again})
        wrong = {image: sentence for image, sentence in wrong.items() if image not in again} | looked_at
        grids, failed = self._grids.readable({image: file for image, file in files.items() if image not in wrong})
        for image, error in failed.items():
            wrong[image] = _sentence(files[image], error)
            self.note(image, files[image], wrong[image])
        return grids, wrong

    def read(self, files: Mapping[str, Stamped]) -> dict[str, str]:
        """Sentences about the images that cannot be used, once all their voxels have been read."""
        wrong, again = self._noted(files)
        for image, file in files.items():
            if self._read.get(image) == file or (image in wrong and image not in again):
                continue
            try:
                _read_geometry(Path(file.path))
                check_image(file.path)
            except (PatchwiseError, OSError) as error:
                wrong[image] = _sentence(file, error)
                self.note(image, file, wrong[image])
            else:
                wrong.pop(image, None)
                self._read[image] = file
                if image in again:
                    self.ledger.update_info(image, {"sentence": None}, _TAG)
        return wrong

    def note(self, image: str, file: Stamped, sentence: str) -> None:
        """Leave an image out until its file changes."""
        self.log_once(sentence)
        kept = {"stamp": [file.size, file.changed], "sentence": sentence, "at": time.time()}
        self.ledger.update_info(image, kept, _TAG)

    def log_once(self, sentence: str) -> None:
        """Log a sentence about a file that is left out."""
        if sentence not in self._logged:
            self._logged.add(sentence)
            logger.warning("left out: %s", sentence)

    def _noted(self, files: Mapping[str, Stamped]) -> tuple[dict[str, str], list[str]]:
        """Sentences that the ledger has about these files, and the images among them to look at again."""
        wrong: dict[str, str] = {}
        again: list[str] = []
        for image, kept in self.ledger.infos(_TAG).items():
            file = files.get(image)
            if file is None or not kept.get("sentence") or kept.get("stamp") != [file.size, file.changed]:
                continue
            at = float(kept["at"])
            if at - file.changed / 1e9 < SETTLED_SECONDS and time.time() - at > AGAIN_SECONDS:
                again.append(image)
            wrong[image] = str(kept["sentence"])
        return wrong, again


def _sentence(file: Stamped, error: PatchwiseError | OSError) -> str:
    name = Path(file.path).name
    sentence = str(error) if isinstance(error, PatchwiseError) else f"{name}: not readable ({error.strerror})"
    if time.time() - file.changed / 1e9 < SETTLED_SECONDS:
        return f"{sentence}; it has just changed, and is looked at again in case that it is still being copied"
    return sentence


def _read_geometry(path: Path) -> dict[str, Any]:
    try:
        sentence = why_unopenable(path)
        if sentence is not None:
            raise ImageError(sentence)
        shape, affine = image_geometry(path)
    except (PatchwiseError, OSError):
        raise
    except Exception as error:
        # No file may end a request that is about all of them.
        logger.exception("%s was not read", path.name)
        raise ImageError(f"{path.name}: not readable ({type(error).__name__}); replace the file") from error
    return {"shape": shape, "affine": affine.tolist()}


def _parse_geometry(fact: dict[str, Any]) -> Geometry:
    affine = np.array(fact["affine"], dtype=np.float64)
    x, y, z = (float((affine[:3, axis] ** 2).sum() ** 0.5) for axis in range(3))
    return Geometry(triple(fact["shape"]), affine, (x, y, z))
