# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""DICOM's names: repeatable UIDs and coded names of structures."""

from __future__ import annotations

import hashlib
import uuid

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import UID

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "patchwise/sample-datasets")

# First match wins: longer phrases stand before the words they contain.
_TYPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("prostate or uterus",), ""),  # one class, either organ: no narrower code is true
    (("tumour", "tumor", "cancer", "neoplasm", "lesion"), "Neoplasm"),
    (("cyst",), "Cyst"),
    (("adrenal",), "AdrenalGland"),
    (("kidney",), "Kidney"),
    (("spleen",), "Spleen"),
    (("gallbladder", "gall bladder"), "Gallbladder"),
    (("oesophagus", "esophagus"), "Esophagus"),
    (("liver",), "Liver"),
    (("stomach",), "Stomach"),
    (("aorta",), "Aorta"),
    (("postcava", "inferior vena cava"), "InferiorVenaCava"),
    (("pancreas",), "Pancreas"),
    (("duodenum",), "Duodenum"),
    (("bladder",), "Bladder"),
    (("prostate",), "Prostate"),
    (("left ventricle",), "LeftVentricle"),
    (("right ventricle",), "RightVentricle"),
    (("anterior", "posterior", "hippocampus"), "Hippocampus"),
)
_ANATOMY = Code("123037004", "SCT", "Anatomical Structure")
_ABNORMALITY = Code("49755003", "SCT", "Morphologically Abnormal Structure")
_ANYTHING = Code("91723000", "SCT", "Anatomical structure")
_MYOCARDIUM = Code("74281007", "SCT", "Myocardium")
_ABNORMAL = ("Neoplasm", "Cyst")


def repeatable_uid(*parts: str) -> UID:
    """A UID 2.25.<name-based UUID> (PS3.5, B.2): the same parts give the same UID on every machine."""
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join(parts)).int}")


def digest(*parts: bytes) -> str:
    """SHA-256 over the parts, in hexadecimal."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def structure_codes(name: str) -> tuple[Code, Code, Code | None]:
    """Category, type and side (None: none) of a class name; an unknown name is an anatomical structure."""
    lower = name.lower()
    side: Code | None = next(
        (getattr(codes.SCT, word.title()) for word in ("right", "left") if word in lower.split()), None
    )
    if "myocardium" in lower:
        return _ANATOMY, _MYOCARDIUM, None
    found = next((keyword for words, keyword in _TYPES if any(word in lower for word in words)), "")
    category = _ABNORMALITY if found in _ABNORMAL else _ANATOMY
    kind: Code = getattr(codes.SCT, found) if found else _ANYTHING
    return category, kind, None if "ventricle" in lower else side
