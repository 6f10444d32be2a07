# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The parts of the app that routes may touch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lib.adapters.infer_tasks import SegmentationTask
from lib.adapters.train_task import EnsembleTrainTask
from lib.annotator.explanations import Explanations
from lib.annotator.predicted_regions import PredictedRegions
from lib.automation.ticker import Ticker
from lib.dashboard.snapshot import Snapshot
from lib.ledger.queries import QueryLedger
from lib.middleware.client_identity import Clients
from lib.options import AppOptions
from lib.studies.datastore import PartialLabelDatastore


@dataclass(frozen=True)
class Services:
    """Objects that `main` creates and routes use."""

    options: AppOptions
    classes: Mapping[str, int]
    """Class name -> id."""
    studies: str
    """Value of `--studies`, a folder or an address."""
    store: PartialLabelDatastore
    """The pool."""
    ledger: QueryLedger
    trainers: Mapping[str, EnsembleTrainTask]
    """Training tasks by bundle name."""
    segmenters: Mapping[str, SegmentationTask]
    """Segmentation tasks by bundle name."""
    clients: Clients
    """Ids of the clients of requests."""
    reasons: Explanations
    """Store of the pictures and reasons of queries."""
    predictions: PredictedRegions
    """Store of the labels that the model proposed for queried regions."""
    progress: Snapshot
    """Data of the progress page."""
    background: Ticker
    """Thread that keeps `progress` up to date."""
    sessions: Callable[[], Any]
    """MONAI Label's sessions; returns None if they are turned off."""
    opened: Callable[[str], None]
    """Callback for the download of an image."""
