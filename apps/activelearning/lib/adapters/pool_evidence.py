# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Evidence about images of the pool for the selection, from caches, the current model and the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lib.adapters.infer_tasks import SegmentationTask
from lib.models.checkpoints import Model
from lib.partial_labels import UNLABELLED
from lib.prediction.features import bottleneck_features, gradient_embeddings
from lib.prediction.intensity_features import describe
from lib.prediction.moments_cache import MomentsCache
from lib.prediction.posterior import PosteriorSpec
from lib.querying.methods import QueryMethod, members_of
from lib.regions import Box
from lib.storage.volumes import load_image, load_label
from lib.studies.datastore import FINAL, PartialLabelDatastore
from lib.uncertainty import PosteriorMoments

# Name of a method that a request composes from parts.
COMPOSE = "compose"

_LAYERS = {"bottleneck": "bottleneck_weights", "last_decoder": "last_decoder", "decoder": "decoder"}


def spec_of(method: QueryMethod) -> PosteriorSpec:
    """The predictions that a method's posterior is made of."""
    return PosteriorSpec.of(members_of(method.posterior or "ensemble"), method.options)


class ModelEvidence:
    """Moments from the cache; features and gradients from the current ensemble.

    Args:
        cache, model, spec: which moments are read.
        digests: of the files of the pool.
        segmenter: the ensemble and its bundle.
        datastore: images, labels and the ledger.
        classes: class name -> id.
    """

    def __init__(
        self,
        cache: MomentsCache,
        model: Model,
        spec: PosteriorSpec,
        digests: Mapping[str, str],
        segmenter: SegmentationTask,
        datastore: PartialLabelDatastore,
        classes: Mapping[str, int],
    ) -> None:
        self.cache = cache
        self.model = model
        self.summaries = cache.summaries(model, digests)
        self.spec = spec
        self.segmenter = segmenter
        self.datastore = datastore
        self.classes = classes

    def moments(self, image: str) -> PosteriorMoments:
        return self.cache.load(self.model, image, self.spec)

    def features(self, image: str, boxes: Sequence[Box]) -> NDArray[np.float32]:
        (layer,) = self.segmenter.trained_bundle().layers("bottleneck")
        volume, ensemble = load_image(self.datastore.image_path(image)), self.segmenter.ensemble()
        with ensemble.lock:
            return bottleneck_features(ensemble, layer, volume, boxes)

    def labelled_features(self) -> NDArray[np.float32]:
        return _labelled(self.datastore, self.features)

    def gradients(self, image: str, boxes: Sequence[Box], layer: str) -> NDArray[np.float32]:
        layers = self.segmenter.trained_bundle().layers(_LAYERS[layer])
        volume, ensemble = load_image(self.datastore.image_path(image)), self.segmenter.ensemble()
        with ensemble.lock:
            return gradient_embeddings(ensemble, layers, volume, boxes)

    def class_frequencies(self) -> NDArray[np.float64]:
        total = np.zeros(len(self.classes) + 1)
        for image in self.datastore.get_labeled_images():
            label_xyz = load_label(self.datastore.get_label_uri(image, FINAL)).array_xyz
            counts = np.bincount(label_xyz[label_xyz != UNLABELLED], minlength=len(total))
            total += counts[: len(total)] / label_xyz.size
        return total


class DescriptorEvidence:
    """Features without a model: hand-crafted descriptors, for a first batch before any annotation."""

    def __init__(self, datastore: PartialLabelDatastore) -> None:
        self.datastore = datastore

    def moments(self, image: str) -> PosteriorMoments:
        raise AssertionError(f"a method without a posterior asked for moments of {image}")

    def features(self, image: str, boxes: Sequence[Box]) -> NDArray[np.float32]:
        return describe(load_image(self.datastore.image_path(image)).array_xyz, boxes)

    def labelled_features(self) -> NDArray[np.float32]:
        return _labelled(self.datastore, self.features)


def _labelled(
    datastore: PartialLabelDatastore, features: Callable[[str, Sequence[Box]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Features of every annotated region, (L, D)."""
    known = set(datastore.pool()[0])
    answered = datastore.ledger.answers.regions()
    rows = [features(i, [r.box for r in regions]) for i, regions in sorted(answered.items()) if i in known]
    return np.concatenate(rows) if rows else np.zeros((0, 1), np.float32)
