# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Errors with a text for the sender of the request, and the refusal of requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn


class PatchwiseError(Exception):
    """A request or a file that cannot be used: one sentence, and its HTTP status.

    The sentence names the expected value, the found value and the remedy. The server returns it with `status`; a
    command ends with exit code 2.
    """

    status = 400

    def __init__(self, sentence: str, status: int | None = None) -> None:
        super().__init__(sentence)
        if status is not None:
            self.status = status


def refuse(sentence: str, status: int = 400) -> NoReturn:
    """End a request with a 4xx status and one sentence.

    Raises:
        PatchwiseError: always.
    """
    raise PatchwiseError(sentence, status)


def listed_problems(errors: Iterable[Mapping[str, Any]]) -> str:
    """The entries of a validation error as one line; at most the first few, since a request may hold thousands."""
    listed = list(errors)
    shown = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}, found {p.get('input')!r:.80}" for p in listed[:5]]
    rest = [f"and {len(listed) - 5} more"] if len(listed) > 5 else []
    return " ".join("; ".join([*shown, *rest]).split())
