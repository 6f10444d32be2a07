# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Memory that a training step may take on this machine."""

from __future__ import annotations

import psutil
import torch

from lib.planning.planner import GIB, REFERENCE_GIB, Budget


def measure_budget(device: str, memory_gib: float | None = None) -> Budget:
    """Budget of this machine: given, or measured.

    For a GPU, nine tenths of its memory but at most 8 GiB, as in nnU-Net's plans for any GPU: plans are then the same
    on all GPUs that have as much. For a CPU, a quarter of the RAM: the pool is in memory as well.
    """
    if device.startswith("cuda"):
        measured = torch.cuda.get_device_properties(device).total_memory / GIB if memory_gib is None else 0.0
        return Budget("cuda", memory_gib or round(min(0.9 * measured, REFERENCE_GIB), 2))
    return Budget("cpu", memory_gib or round(psutil.virtual_memory().total / GIB / 4, 2))
