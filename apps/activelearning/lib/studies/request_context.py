# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Facts of the request that is being answered: its client, and the answer it has saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from lib.errors import PatchwiseError

CLIENT: ContextVar[str | None] = ContextVar("client", default=None)
SENT_FILE: ContextVar[str | None] = ContextVar("sent_file", default=None)
SAVED_ANSWER: ContextVar[int | None] = ContextVar("saved_answer", default=None)


def current_client() -> str | None:
    """`~user@address` of the request that is being answered; None outside of one."""
    return CLIENT.get()


def saved_answer() -> int | None:
    """Number of the answer that the current request has saved; None where it saved none."""
    return SAVED_ANSWER.get()


@contextmanager
def as_sent(received: Path) -> Iterator[None]:
    """Refusals inside of the block name the file as the client called it, not the server's temporary copy."""
    try:
        yield
    except PatchwiseError as error:
        sent = SENT_FILE.get()
        if sent and error.args:
            error.args = (str(error).replace(received.name, sent), *error.args[1:])
        raise
