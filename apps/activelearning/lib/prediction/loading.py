# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""From the checkpoints of a training to an ensemble that predicts."""

from __future__ import annotations

import torch
from torch import nn

from lib.models.checkpoints import Model, ModelStore, trained_bundle
from lib.models.loss_head import LossHead, fresh_head
from lib.models.recipe import Bundle, RecipeError
from lib.prediction.posterior import Ensemble

QUERY_DROPOUT = 0.1


def load_ensemble(store: ModelStore, model: Model, bundle: Bundle, device: torch.device) -> Ensemble:
    """Return the ensemble of a finished training; checkpoints are read with `weights_only=True` and run no code.

    Raises:
        RecipeError: the weights do not fit the bundle's network.
    """
    bundle = trained_bundle(model, bundle)
    recipe = model.facts.recipe
    networks: list[nn.Module] = []
    heads: list[LossHead] = []
    for member in range(model.facts.members):
        # Dropout layers hold no weights and do nothing in evaluation; posteriors with Monte Carlo dropout need them.
        network = bundle.network(len(model.facts.classes), QUERY_DROPOUT, recipe.deep_supervision)
        path = store.member_path(model.digest, member)
        try:
            network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        except RuntimeError as error:  # torch lists every weight that is missing or of another shape
            raise RecipeError(
                f"{path}: its weights do not fit the network of {bundle.name}, which an earlier version of this "
                "project built in another way, or which was changed since; train again"
            ) from error
        networks.append(network)
        if store.head_path(model.digest, member).is_file():
            head = fresh_head(network, bundle.layers("loss_taps"), bundle.divisor)
            weights = torch.load(store.head_path(model.digest, member), map_location=device, weights_only=True)
            head.load_state_dict(weights)
            heads.append(head)
    taps = bundle.layers("loss_taps") if heads else []
    spacing, grey = model.facts.spacing, bundle.normalisation
    mirrored = recipe.mirror if recipe.mirror_predictions else ()
    crop, divisor, sure = recipe.patch, bundle.divisor, recipe.confidence
    known_mm3 = model.facts.smallest_mm3
    smallest_mm3 = {model.facts.classes[name]: recipe.smallest * mm3 for name, mm3 in known_mm3.items()}
    return Ensemble(
        networks,
        crop,
        divisor,
        spacing,
        device,
        heads,
        taps,
        normalisation=grey,
        mirrored=mirrored,
        confidence=sure,
        smallest_mm3=smallest_mm3,
        precision=recipe.precision,
        shifts=recipe.shifts,
        single=model.facts.one_piece if recipe.one_piece else (),
    )
