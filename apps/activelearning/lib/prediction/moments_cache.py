# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Cached moments: one posterior pass per round, shared by every uncertainty, unit and selector."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from lib.errors import PatchwiseError
from lib.models.checkpoints import Model
from lib.prediction.candidate_store import SummaryFile
from lib.prediction.moments_archive import ArchivedMoments, has_slabs, save_slabs
from lib.prediction.posterior import DEEP_ENSEMBLE, Ensemble, PosteriorSpec
from lib.prediction.tiled import is_large, streamed_moments
from lib.storage.atomic_files import text_digest, write_atomic
from lib.storage.volumes import Volume, load_image
from lib.uncertainty import Moments, PosteriorMoments

logger = logging.getLogger(__name__)

QUERY_OVERLAP = 0.25
# Moments in the format of older versions are computed again.
_FORMAT = 2

_Write = Callable[[BinaryIO], None]


class MomentsCache:
    """Moments of pool images on disk, keyed by (model digest, image digest, posterior options).

    Args:
        root: folder of the cache.
        path_of: file of an image by its id.
        digest_of: SHA-256 of that file.
        keep: how many models' moments stay.
    """

    def __init__(
        self, root: Path, path_of: Callable[[str], Path], digest_of: Callable[[str], str], keep: int = 1
    ) -> None:
        self.root = root
        self.path_of = path_of
        self.digest_of = digest_of
        self.keep = keep

    def path(self, model: Model, image: str, spec: PosteriorSpec = DEEP_ENSEMBLE) -> Path:
        """File of one image's moments."""
        return self.root / model.digest[:16] / _name(self.digest_of(image), spec)

    def missing(self, model: Model, digests: Mapping[str, str], spec: PosteriorSpec = DEEP_ENSEMBLE) -> list[str]:
        """Images whose moments for this model and posterior are not cached, given the digests of their files."""
        folder = self.root / model.digest[:16]
        cached = set(os.listdir(folder)) if folder.is_dir() else set()
        return [image for image, digest in digests.items() if _name(digest, spec) not in cached]

    def summaries(self, model: Model, digests: Mapping[str, str]) -> SummaryFile:
        """Store of the candidates that were computed from this model's moments."""
        return SummaryFile(self.root / model.digest[:16] / "summaries.sqlite", digests)

    def load(self, model: Model, image: str, spec: PosteriorSpec = DEEP_ENSEMBLE) -> PosteriorMoments:
        """Moments of one image.

        Raises:
            FileNotFoundError: not scored with this model.
        """
        path = self.path(model, image, spec)
        if has_slabs(path):
            return ArchivedMoments(path)
        with np.load(path) as arrays:
            return Moments.from_arrays(dict(arrays))

    def fill(
        self,
        model: Model,
        ensemble: Callable[[], Ensemble],
        digests: Mapping[str, str],
        report: Callable[[int, int], None],
        spec: PosteriorSpec = DEEP_ENSEMBLE,
        failed: Callable[[str, Exception], None] | None = None,
    ) -> int:
        """Compute what is missing and remove the moments of older models.

        Each image is read once, and files of one content count as one. Files appear whole, so a scorer that was killed
        goes on with the next image. With `failed`, an image that cannot be read or predicted does not stop the others:
        it is reported there with its error.

        Returns:
            The number of images computed.

        Raises:
            Exception: of an image, without `failed`; of the network, where it can predict no image at all.
        """
        broken, computed = list[Exception](), 0
        missing = list({digests[image]: image for image in self.missing(model, digests, spec)}.values())
        loaded = ensemble() if missing else None
        for done, image in enumerate(tqdm(missing, desc="scoring", unit="image", mininterval=5, disable=None), start=1):
            assert loaded is not None, "an ensemble is loaded whenever an image is missing"
            # Dropout and views follow from the image alone, whatever the order in which the pool is scored.
            seed = int(digests[image][:8], 16)
            try:
                volume = load_image(self.path_of(image))
                with loaded.lock:
                    write_atomic(
                        self.path(model, image, spec), _writer(loaded, volume, spec, seed, len(model.facts.classes))
                    )
                computed += 1
            except (PatchwiseError, OSError, RuntimeError, ValueError) as error:
                if failed is None:
                    raise
                failed(image, error)
                broken += [] if isinstance(error, PatchwiseError) else [error]
            report(done, len(missing))
        if broken and not computed:
            raise broken[0]
        self._prune(model)
        return computed

    def _prune(self, model: Model) -> None:
        if not self.root.is_dir():
            return
        others = [p for p in self.root.iterdir() if p.is_dir() and p.name != model.digest[:16]]
        for old in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)[self.keep - 1 :]:
            shutil.rmtree(old, ignore_errors=True)


@lru_cache(maxsize=1 << 16)
def _name(digest: str, spec: PosteriorSpec) -> str:
    return f"{text_digest(digest, asdict(spec), QUERY_OVERLAP, _FORMAT)[:32]}.npz"


def _writer(ensemble: Ensemble, volume: Volume, spec: PosteriorSpec, seed: int, classes: int) -> _Write:
    """Writer of an image's moments: in one piece, or slab by slab if they would fill the memory."""
    loss = ensemble.learning_loss(volume)
    if is_large(1 + classes, volume.shape):
        slabs = streamed_moments(ensemble, volume, QUERY_OVERLAP, spec, seed, 1 + classes)
        return partial(save_slabs, slabs, loss)
    moments = Moments.from_members(ensemble.members(volume, QUERY_OVERLAP, spec, seed), loss)
    return partial(_save, moments.to_arrays())


def _save(arrays: Mapping[str, Any], stream: BinaryIO) -> None:
    np.savez(stream, **arrays)
