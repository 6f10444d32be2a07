# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Redaction of logs and messages about DICOM objects: they contain no data of a patient."""

from __future__ import annotations

import logging
import traceback
import warnings
from pathlib import Path


def keep_patients_out() -> None:
    """Suppress log entries of other packages that contain data of patients.

    pydicom quotes the values that it warns about, such as birth dates and names. MONAI Label logs every sample that it
    serves, with PatientID and dates of the study; this project logs the regions only.
    """
    warnings.filterwarnings("ignore", module=r"pydicom|highdicom")
    logging.getLogger("monailabel.endpoints.activelearning").addFilter(_is_no_sample)


def redacted(error: BaseException) -> str:
    """Type and place of an error without its message, which may quote an object."""
    frames = traceback.extract_tb(error.__traceback__)
    where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])
    return f"{type(error).__name__} at {where}"


def _is_no_sample(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Next sample:")
