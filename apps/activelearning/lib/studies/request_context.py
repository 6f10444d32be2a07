# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Facts of the request that is being answered: its client, and the answer it has saved."""

from __future__ import annotations

from contextvars import ContextVar

CLIENT: ContextVar[str | None] = ContextVar("client", default=None)
SAVED_ANSWER: ContextVar[int | None] = ContextVar("saved_answer", default=None)


def current_client() -> str | None:
    """`~user@address` of the request that is being answered; None outside of one."""
    return CLIENT.get()


def saved_answer() -> int | None:
    """Number of the answer that the current request has saved; None where it saved none."""
    return SAVED_ANSWER.get()
