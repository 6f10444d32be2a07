# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Inference and task routes: the names in a request are checked before work starts or a file is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, File, Form, UploadFile
from fastapi.background import BackgroundTasks
from monailabel.endpoints import batch_infer as upstream_batch
from monailabel.endpoints import infer as upstream_infer
from monailabel.endpoints import scoring as upstream_scoring
from monailabel.endpoints import train as upstream_train
from monailabel.endpoints.infer import ResultType
from monailabel.endpoints.user.auth import User
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType

from lib.automation.background_tasks import Kind, give_way, is_running
from lib.automation.shutdown import check_open
from lib.errors import refuse
from lib.middleware.request_checks import check_plain_name
from lib.middleware.roles import ADMIN, ANNOTATOR, USER
from lib.routes.datastore_routes import cleaned, received
from lib.routes.services import Services
from lib.storage.atomic_files import folded
from lib.storage.volumes import EXTENSIONS, check_image
from lib.studies.datastore import FINAL
from lib.uncertainty import SCORE_MAPS

# MONAI Label's own tasks use these values as a part of a file name.
_RESULTS = frozenset({*EXTENSIONS, ".seg.nrrd", ".json", ".mrk.json"})
_ALL: Any = BatchInferImageType.IMAGES_ALL


def infer_routes(services: Services) -> APIRouter:
    """Inference on an image of the pool, a session's or an uploaded one."""
    router = APIRouter(tags=["Infer"])

    @router.post("/infer/{model}", summary="Run a model on an image")
    async def infer(
        background: BackgroundTasks,
        model: str,
        image: str = "",
        session_id: str = "",
        params: str = Form("{}"),
        file: UploadFile = File(None),  # noqa: B008
        label: UploadFile = File(None),  # noqa: B008
        output: ResultType | None = None,
        user: User = USER,
    ) -> Any:
        _check_model(services, model)
        wanted = json.loads(params) if params else {}
        _check_params(wanted, {"model": model, "image": image})
        if not (file or image or session_id):
            refuse("there is no image to run on; name one with image=ID, a session_id, or send a file")
        if label or output == ResultType.dicom_seg:
            refuse("models of this server take no label and answer no DICOM segmentation; leave both out")
        # 3D Slicer sends the name of its volume along with a session, whose image counts.
        if image and not session_id:
            services.store.image_path(image)
        if session_id and services.sessions().get_session(session_id) is None:
            refuse(f"there is no session {session_id}; PUT /session/ makes one", 404)
        if file:
            with received(file) as path:
                check_image(path, uploaded=True)
        with cleaned(background):
            return upstream_infer.run_inference(background, model, image, session_id, params, file, None, output)

    @router.post("/infer/wsi/{model}", include_in_schema=False)
    @router.post("/infer/wsi_v2/{model}", summary="Refused: this app works on volumes")
    async def slides(model: str, user: User = USER) -> None:
        refuse("this app segments volumes, not slides of pathology; use POST /infer/{model}", 404)

    @router.post("/batch/infer/{model}", summary="Run a model on many images")
    async def batch(
        model: str,
        images: BatchInferImageType = _ALL,
        params: dict[str, Any] | None = None,
        run_sync: bool = False,
        user: User = ADMIN,
    ) -> Any:
        _check_model(services, model)
        wanted = dict(params or {})
        _check_params(wanted, {"model": model})
        listed = wanted.get("images", images)
        if isinstance(listed, list):
            for one in listed:
                services.store.image_path(str(one))
        elif listed not in list(BatchInferImageType):
            refuse(f"images must be all, labeled, unlabeled or a list of ids, found {listed!r:.80}")
        for name in ("max_workers", "max_batch_size"):
            number = wanted.get(name, 0)
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                refuse(f"{name} must be a whole number of at least 0, found {number!r:.80}")
        # The device of a network is an option of the app; MONAI Label would distribute images over zero GPUs.
        return upstream_batch.run(
            model, images, {"max_workers": 1, **wanted, "device": "cpu", "multi_gpu": False}, run_sync
        )

    return router


def task_routes(services: Services) -> APIRouter:
    """Trainings and scorings: requests that would fail in the started process are refused here."""
    router = APIRouter()

    @router.post("/train/", include_in_schema=False)
    async def train_all(params: dict[str, Any] | None = None, run_sync: bool = False, user: User = ADMIN) -> Any:
        _check_names(params, list(services.trainers), "model to train")
        return start_trainings(services, {name: _object(params, name) for name in services.trainers}, run_sync)

    @router.post("/scoring/", include_in_schema=False)
    async def score_all(params: dict[str, Any] | None = None, run_sync: bool = False, user: User = ANNOTATOR) -> Any:
        _check_names(params, list(SCORE_MAPS), "uncertainty")
        chosen = {name: _object(params, name) for name in SCORE_MAPS}
        for name, wanted in chosen.items():
            _same(wanted, {"method": name})
        _check_idle("scoring", enqueue=False)
        return upstream_scoring.run(params, run_sync)

    @router.post("/scoring/{method}", tags=["Scoring"], summary="Score the pool for an uncertainty")
    async def score(
        method: str, params: dict[str, Any] | None = None, run_sync: bool = False, user: User = ANNOTATOR
    ) -> Any:
        if method not in SCORE_MAPS:
            refuse(f"no uncertainty {method[:80]!r}; known ones are {', '.join(SCORE_MAPS)}", 404)
        _same(params or {}, {"method": method})
        _check_idle("scoring", enqueue=False)
        return upstream_scoring.run_method(method, params, run_sync)

    return router


def start_trainings(
    services: Services, wanted: Mapping[str, dict[str, Any]], run_sync: bool, enqueue: bool = False
) -> dict[str, Any]:
    """Trainings by bundle, once it is clear that each can begin; the one way in for every route.

    Raises:
        PatchwiseError: 4xx with a sentence, before any is started: unknown bundles or options, no answer yet, another
            training at work.
    """
    _check_names(wanted, list(services.trainers), "model to train")
    for name, params in wanted.items():
        services.trainers[name].parse(params)
        _same(params, {"model": name})
    if not services.store.get_labeled_images():
        refuse("nothing is annotated yet, so there is nothing to train on; annotate a region first", 409)
    _check_idle("train", enqueue)
    started: dict[str, Any] = {}
    for name, params in wanted.items():
        started[name] = upstream_train.run_model(name, params, run_sync, enqueue or bool(started))
    return started


def _check_idle(kind: Kind, enqueue: bool) -> None:
    check_open()
    if kind == "scoring":
        give_way(kind)
    if not enqueue and is_running(kind):
        what = "training" if kind == "train" else "scoring"
        refuse(f"a {what} is already running; ask again when it has ended, or DELETE /{kind}/ stops it", 429)


def _check_names(params: Mapping[str, Any] | None, known: Sequence[str], what: str) -> None:
    unknown = sorted(set(params or {}) - set(known))
    if unknown:
        refuse(
            f"no {what} {unknown[0][:80]!r}; expected a JSON object by name, and known names are {', '.join(known)}",
            404,
        )


def _object(params: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    found = (params or {}).get(name) or {}
    if not isinstance(found, dict):
        refuse(f"what is asked of {name} must be a JSON object, found {found!r:.80}")
    return found


def _check_model(services: Services, model: str) -> None:
    known: Sequence[str] = ["query_region", *services.segmenters]
    if model not in known:
        refuse(f"no model {model[:80]!r}; known models are {', '.join(known)}", 404)


def _check_params(params: Mapping[str, Any], asked: Mapping[str, str]) -> None:
    """Refuse parameters that concern more than the request: other files, or labels by annotators."""
    _same(params, asked)
    taken = sorted({"file", "session", "label", "image_path"} & params.keys())
    if taken:
        refuse(f"{taken[0]} is not taken from params; send files as parts of the form")
    extension = params.get("result_extension")
    if extension is not None and str(extension) not in _RESULTS:
        refuse(f"result_extension {extension!r:.80} is not known; known ones are {', '.join(sorted(_RESULTS))}")
    tag = params.get("label_tag")
    if tag is not None:
        check_plain_name(str(tag), "label_tag")
    if tag is not None and folded(str(tag)) == FINAL:
        refuse("predictions are not saved as tag final, which holds labels by annotators; use label_tag original")


def _same(params: Mapping[str, Any], asked: Mapping[str, str]) -> None:
    for name, value in asked.items():
        if params.get(name, value) != value:
            refuse(f"{name} is {value[:80]!r} in the address and {params[name]!r:.80} in params; name it once")
