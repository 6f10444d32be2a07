# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The two kinds of MONAI Label infer tasks: segmentation by the ensemble, and the frame of the open regions."""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.transform.writer import Writer
from numpy.typing import NDArray

from lib.annotator.captions import cue_in_batch
from lib.annotator.markups import roi_document
from lib.errors import refuse
from lib.frames import FRAME_SEGMENT, frames
from lib.ledger.queries import QueryLedger
from lib.models.checkpoints import ModelStore, choose_device, trained_bundle
from lib.models.recipe import Bundle
from lib.options import AppOptions
from lib.prediction.loading import load_ensemble
from lib.prediction.posterior import Ensemble
from lib.prediction.segmentation import segment
from lib.storage.volumes import image_geometry, load_image, save_label

logger = logging.getLogger(__name__)

FRAME_LABEL = {FRAME_SEGMENT: 1}
MARKUPS = "markups"
FORMATS = ("segment", MARKUPS)
# By the last suffix of an image's name.
_NIFTI = {".gz": ".nii.gz", ".nii": ".nii"}


class SegmentationTask(InferTask):
    """Mean of the ensemble's probabilities, arg max, on the grid and affine of the requested image.

    The newest finished training is used, and a newly published one is loaded. A request with `"mirror": false` leaves
    out the mirror images of the recipe, which is faster.
    """

    def __init__(self, bundle: Bundle, store: ModelStore, classes: dict[str, int], options: AppOptions) -> None:
        super().__init__(
            type=InferType.SEGMENTATION,
            labels=classes,
            dimension=3,
            description=str(bundle.metadata.get("description", bundle.name)),
            config={"mirror": True},
        )
        self.bundle = bundle
        self.store = store
        self.options = options
        self._loaded: tuple[str, Ensemble] | None = None
        self._classes = 1 + len(classes)
        self._loading = threading.Lock()

    def is_valid(self) -> bool:
        """Listed also before the first training: clients read the labels of a project from its models."""
        return True

    def ensemble(self) -> Ensemble:
        """The current ensemble.

        Raises:
            PatchwiseError: 409 when nothing has been trained yet.
        """
        model = self.store.current()
        if model is None:
            refuse(f"{self.bundle.name} has not been trained yet; POST /train/{self.bundle.name} first", 409)
        with self._loading:
            if self._loaded is None or self._loaded[0] != model.digest:
                ensemble = load_ensemble(self.store, model, self.bundle, choose_device(self.options.device))
                self._loaded = (model.digest, ensemble)
                self._classes = 1 + len(model.facts.classes)
            return self._loaded[1]

    def trained_bundle(self) -> Bundle:
        """The bundle as the current model was trained with it."""
        return trained_bundle(self.store.current(), self.bundle)

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        started = time.time()
        mirror = request.get("mirror", True)
        if not isinstance(mirror, bool):
            refuse(f"mirror must be true or false, found {mirror!r}")
        volume = load_image(request["image"])
        ensemble = self.ensemble()
        with ensemble.lock:
            label_xyz = segment(ensemble, volume, self._classes, self.store.folder, mirror)
        names = dict(self.labels)
        facts = {"label_names": names, "latencies": {"total": round(time.time() - started, 3)}}
        return write_result(label_xyz, volume.affine, request), facts


class QueryRegionTask(InferTask):
    """The open regions of an image, so that unmodified clients show them.

    As a label map with one-voxel frames (`"format": "segment"`, the default), or as boxes in the file format of
    Slicer's markups (`"format": "markups"`), each labelled with the caption of its region.

    The app adds `image_id` and `client_id` to the request, since MONAI Label replaces the image's id by its path. The
    response contains the client's own open regions, or those of all clients if it holds none there.
    """

    def __init__(self, ledger: QueryLedger, classes: dict[str, int]) -> None:
        super().__init__(
            type=InferType.SEGMENTATION,
            # Slicer runs the first model whose labels contain the project's first class when a sample is loaded, so
            # the classes are named too; only the frame is ever drawn.
            labels={**FRAME_LABEL, **{name: value + 1 for name, value in classes.items()}},
            dimension=3,
            description="Frame around the region to annotate next; format: segment (label map) or markups (Slicer ROI)",
            # A list is a choice with the default first: Slicer and OHIF show it in their table of options.
            config={"format": list(FORMATS)},
        )
        self.ledger = ledger

    def is_valid(self) -> bool:
        return True

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        shape, affine = image_geometry(request["image"])
        wanted = _format(request)
        image_id = str(request.get("image_id", ""))
        client = request.get("client_id")
        mine = self.ledger.leases.open_queries(image_id, str(client)) if client else []
        queries = mine or self.ledger.leases.open_queries(image_id)
        regions = [query.region for query in queries]
        facts = {"label_names": FRAME_LABEL, "regions": [query.to_json() for query in queries]}
        # Slicer rejects a file without any markup; an empty label map is valid if no region is open.
        if wanted == MARKUPS and queries:
            cues = [cue_in_batch(query, self.ledger, shape, affine) for query in queries]
            return _write_json(roi_document(regions, cues, affine)), facts
        return write_result(frames(regions, shape), affine, request), facts


def _format(request: dict[str, Any]) -> str:
    given = request.get("format", FORMATS[0])
    # Clients may send the list of choices as they found it; its first entry is the one that is chosen.
    wanted = given[0] if isinstance(given, list) and given else given
    if wanted not in FORMATS:
        refuse(f"format must be {' or '.join(FORMATS)}, found {given!r}")
    return str(wanted)


def _write_json(document: dict[str, Any]) -> str:
    # Slicer distinguishes markups from a label map by the suffix.
    with tempfile.NamedTemporaryFile("w", suffix=".mrk.json", delete=False) as stream:
        json.dump(document, stream, indent=1)
    return stream.name


def write_result(label_xyz: NDArray[np.uint8], affine: NDArray[np.float64], request: dict[str, Any]) -> str:
    """Write a result file in the requested format (`result_extension`), on the stored grid."""
    ending = str(request.get("result_extension") or _NIFTI.get(Path(request["image"]).suffix, ""))
    if ending in _NIFTI.values() and request.get("result_write_to_file", True):
        # MONAI's own writer fails on sagittal and coronal scans, since it treats their affine as one of two dimensions.
        with tempfile.NamedTemporaryFile(suffix=ending, delete=False) as stream:
            path = Path(stream.name)
        save_label(path, label_xyz, affine)
        return str(path)
    data = {
        "pred": label_xyz,
        "pred_meta_dict": {"affine": affine},
        "image_path": request["image"],
        **{k: v for k, v in request.items() if k.startswith("result_")},
    }
    data["result_dtype"] = np.uint8
    written, _ = Writer(label="pred")(data)
    return str(written)
