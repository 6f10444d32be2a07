# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""What is said about DICOM objects in logs and to administrators: never what they hold about a patient."""

from __future__ import annotations

import logging
import traceback
import warnings
from pathlib import Path


def keep_patients_out() -> None:
    """Silences what other packages of this process would write about patients into its log.

    pydicom quotes the values that it warns of, birth dates and names among them. MONAI Label writes down every sample
    that it hands out, with PatientID and dates of the study; this project's own line about it names regions only.
    """
    warnings.filterwarnings("ignore", module=r"pydicom|highdicom")
    logging.getLogger("monailabel.endpoints.activelearning").addFilter(_is_no_sample)


def redacted(error: BaseException) -> str:
    """What went wrong and where, without the error's own words, which may quote an object."""
    frames = traceback.extract_tb(error.__traceback__)
    where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])
    return f"{type(error).__name__} at {where}"


def _is_no_sample(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Next sample:")
