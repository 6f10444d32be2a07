# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""MONAI Label's authentication with the PyJWT that it is installed with."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jwt
from monailabel.config import settings
from monailabel.endpoints.user import auth

# What OpenID realms sign with whose public key is an RSA key, the only kind that MONAI Label reads.
ALGORITHMS = ["RS256", "RS384", "RS512"]


def accept_signed_tokens() -> None:
    """Names the algorithms that a token may be signed with, where authentication is on.

    MONAI Label names none, which PyJWT refuses since 2.0: every token would be answered with 401.
    """
    if settings.MONAI_LABEL_AUTH_ENABLE:
        auth.jwt = SimpleNamespace(decode=partial(jwt.decode, algorithms=ALGORITHMS))
