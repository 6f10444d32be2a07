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
from lib.automation.ticker import Ticker
from lib.dashboard.snapshot import Snapshot
from lib.ledger.queries import QueryLedger
from lib.middleware.client_identity import Clients
from lib.options import AppOptions
from lib.studies.datastore import PartialLabelDatastore


@dataclass(frozen=True)
class Services:
    """What `main` wires and routes call.

    Args:
        options: of the app.
        classes: class name -> id.
        studies: the `--studies` argument, a folder or an address.
        store, ledger: the pool, and who was asked what.
        trainers, segmenters: by bundle name.
        clients: ids of the people and programs that ask.
        reasons: pictures of queries.
        progress, background: the progress page's report, and the thread that keeps it up to date.
        sessions: MONAI Label's sessions; None where they are turned off.
        opened: notes the download of an image.
    """

    options: AppOptions
    classes: Mapping[str, int]
    studies: str
    store: PartialLabelDatastore
    ledger: QueryLedger
    trainers: Mapping[str, EnsembleTrainTask]
    segmenters: Mapping[str, SegmentationTask]
    clients: Clients
    reasons: Explanations
    progress: Snapshot
    background: Ticker
    sessions: Callable[[], Any]
    opened: Callable[[str], None]
