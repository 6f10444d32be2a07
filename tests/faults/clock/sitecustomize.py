# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""On a server's path: its clock stands still at the time of a file for as long as that file is there."""

import os
import time

_FILE = os.environ.get("STOPPED_CLOCK")
_running = time.time


def _time() -> float:
    try:
        return os.stat(_FILE).st_mtime
    except OSError:
        return _running()


if _FILE:
    time.time = _time
