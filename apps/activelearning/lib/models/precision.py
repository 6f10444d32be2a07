# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Number formats that a device computes in natively."""

from __future__ import annotations

import torch

from lib.errors import PatchwiseError


def autocast_type(device: torch.device, precision: str = "native") -> torch.dtype | None:
    """Reduced precision a device runs natively: bfloat16 on CPUs and GPUs that have it, float16 on older GPUs.

    A property of the hardware rather than a timing, so that a resumed training takes the same path. None where there
    is none, or `precision` is "full".
    """
    if precision == "full":
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


def check_device(name: str) -> None:
    """Check that this machine has the device.

    Raises:
        PatchwiseError: no such GPU, or torch cannot use it.
    """
    if not name.startswith("cuda"):
        return
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(name.partition(":")[2] or 0)
    if number >= found:
        has = f"GPUs 0 to {found - 1}" if found else "none that torch can use"
        raise PatchwiseError(f"--conf device {name}: expected a GPU of this machine, which has {has}; use device cpu")
