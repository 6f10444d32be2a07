# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Client of a DICOMweb server, with errors that name the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from dicomweb_client.session_utils import create_session_from_gcp_credentials, create_session_from_user_pass
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX
from pydicom.dataset import Dataset
from pydicom.uid import UID
from requests.adapters import HTTPAdapter

from lib.dicom.log_redaction import redacted
from lib.errors import PatchwiseError

# Seconds to wait for a connection and for the next bytes; otherwise an unresponsive server would block its caller
# forever.
_TIMEOUT = (5.0, 120.0)
_PAGE = 1000
# Fields of a sample that OHIF shows.
SAMPLE_FIELDS = (
    "Modality",
    "StudyDate",
    "StudyTime",
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "RetrieveURL",
)
_FIELDS = [field for field in SAMPLE_FIELDS if field != "RetrieveURL"]


class PacsError(PatchwiseError):
    """A request to a DICOMweb server failed; the message names the server and the remedy."""

    status = 503


@dataclass(frozen=True)
class Series:
    """A series as the server lists it; `instances` is None where it does not count them."""

    uid: str
    study: str
    instances: int | None
    facts: dict[str, str]


class DicomWebClient:
    """Client of a DICOMweb server with MONAI Label's settings for user, password and prefixes.

    Args:
        url: base address of QIDO-RS, WADO-RS and STOW-RS.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        session = _session(self.url)
        for scheme in ("http://", "https://"):
            session.mount(scheme, _TimeoutAdapter())
        self._client = DICOMwebClientX(
            url=self.url,
            session=session,
            qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
            wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
            stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
        )
        # Callers of this client repeat their requests.
        self._client.set_http_retry_params(retry=False)

    def series(self, filters: Mapping[str, Any]) -> list[Series]:
        """All matching series, over all pages of the server's response."""
        fields = [*_FIELDS, "NumberOfSeriesRelatedInstances"]
        found: dict[str, Series] = {}
        while True:
            with self._speaking("list its series"):
                page = self._client.search_for_series(
                    search_filters=dict(filters), fields=fields, limit=_PAGE, offset=len(found)
                )
            # The UID becomes a file name, so the server's response is checked.
            found_now = [series for series in map(self._series, page or []) if UID(series.uid).is_valid]
            new = {series.uid: series for series in found_now}
            # A short page may be a server's own limit; a server without paging returns the first page again.
            if not new.keys() - found.keys():
                return list(found.values())
            found |= new

    def instances(self, study: str, series: str) -> list[str]:
        """SOP instance UIDs of a series."""
        with self._speaking("list the instances of a series"):
            found = self._client.search_for_instances(study, series, fields=["SOPInstanceUID"])
        return [str(Dataset.from_json(item).SOPInstanceUID) for item in found]

    def instance(self, study: str, series: str, instance: str) -> Dataset:
        """One object with all it holds."""
        with self._speaking("return an object"):
            found: Dataset = self._client.retrieve_instance(study, series, instance)
            return found

    def headers(self, study: str, series: str) -> list[Dataset]:
        """The objects of a series without their pixels."""
        with self._speaking("return the headers of a series"):
            return [Dataset.from_json(item) for item in self._client.retrieve_series_metadata(study, series)]

    def download(self, study: str, series: str, folder: Path) -> list[Path]:
        """Write the objects of a series as files and return their paths."""
        files = []
        with self._speaking("return a series"):
            for number, item in enumerate(self._client.iter_series(study, series)):
                files.append(folder / f"{number}.dcm")
                item.save_as(files[-1], write_like_original=False)
        return files

    def store(self, item: Dataset) -> None:
        """Store an object.

        Raises:
            PacsError: it was not taken, whole or in part.
        """
        with self._speaking("store a segmentation"):
            answer = self._client.store_instances([item])
        failed = answer.get("FailedSOPSequence")
        if failed:
            reason = failed[0].get("FailureReason", "no reason given")
            raise PacsError(f"the DICOMweb server {self.url} refused {item.SOPInstanceUID}: {reason}")

    def _series(self, item: dict[str, Any]) -> Series:
        data = Dataset.from_json(item)
        uid, study = str(data.SeriesInstanceUID), str(data.StudyInstanceUID)
        facts = {field: str(data.get(field) or "UNK") for field in SAMPLE_FIELDS}
        if not data.get("RetrieveURL"):
            facts["RetrieveURL"] = f"{self.url}/studies/{study}/series/{uid}"
        count = data.get("NumberOfSeriesRelatedInstances")
        return Series(uid, study, None if count is None else int(count), facts)

    @contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        where = f"the DICOMweb server {self.url}"
        try:
            yield
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403):
                hint = "set MONAI_LABEL_DICOMWEB_USERNAME and MONAI_LABEL_DICOMWEB_PASSWORD to an account that may"
            elif status == 404:
                hint = "check the address given as --studies, and that the object is still there"
            else:
                hint = "see its log"
            raise PacsError(f"{where} does not {what} (HTTP {status}): {hint}") from error
        except requests.Timeout as error:
            raise PacsError(f"{where} does not {what}: no answer in time; check that it is not overloaded") from error
        except requests.ConnectionError as error:
            raise PacsError(f"{where} cannot be reached: start it, or check the address given as --studies") from error
        except (requests.RequestException, ValueError, KeyError, AttributeError) as error:
            raise PacsError(
                f"{where} returns a response that is not DICOMweb ({redacted(error)}); check the address"
            ) from error


class _TimeoutAdapter(HTTPAdapter):
    """HTTP adapter that sends every request with a time limit."""

    def send(self, request: Any, *args: Any, **options: Any) -> Any:
        options["timeout"] = options.get("timeout") or _TIMEOUT
        return super().send(request, *args, **options)


def _session(url: str) -> requests.Session:
    if "googleapis.com" in url:
        return create_session_from_gcp_credentials()
    user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
    return create_session_from_user_pass(user, password) if user and password else requests.Session()
