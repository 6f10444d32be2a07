# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""MONAI Label's authentication with the PyJWT that it is installed with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import jwt
import requests
from monailabel.config import settings
from monailabel.endpoints.user import auth

# Algorithms of OpenID realms with an RSA key, the only kind of public key that MONAI Label reads.
ALGORITHMS = ["RS256", "RS384", "RS512"]


def accept_signed_tokens() -> None:
    """Set the algorithms that a token may be signed with, if authentication is on.

    MONAI Label names none, which PyJWT refuses since 2.0: every token would be answered with 401.
    """
    if settings.MONAI_LABEL_AUTH_ENABLE:
        auth.jwt = SimpleNamespace(decode=decode)


def decode(token: str, key: str, options: dict[str, Any]) -> dict[str, Any]:
    """Claims of a signed token with an expiry, a user and a list of roles.

    Raises:
        jwt.InvalidTokenError: it does not; MONAI Label answers with 401, where a missing claim would end it with 500.
    """
    wanted: Any = {**options, "require": ["exp"]}
    claims: dict[str, Any] = jwt.decode(token, key, algorithms=ALGORITHMS, options=wanted)
    if not isinstance(claims.get(settings.MONAI_LABEL_AUTH_TOKEN_USERNAME), str):
        raise jwt.InvalidTokenError(f"the token has no {settings.MONAI_LABEL_AUTH_TOKEN_USERNAME}")
    roles: Any = claims
    for step in settings.MONAI_LABEL_AUTH_TOKEN_ROLES.split("#"):
        roles = roles.get(step) if isinstance(roles, dict) else None
    if not (isinstance(roles, list) and all(isinstance(role, str) for role in roles)):
        raise jwt.InvalidTokenError(f"the token has no list of roles at {settings.MONAI_LABEL_AUTH_TOKEN_ROLES}")
    return claims


def unanswered(error: requests.RequestException) -> tuple[int, str]:
    """Status and sentence for another server that refused user and password, or did not answer as it should."""
    if error.response is not None and error.response.status_code in (400, 401):
        return 401, "user and password were not accepted"
    asked = getattr(error.request, "url", None)
    name = urlsplit(asked).netloc if asked else "that this request needs"
    return 503, f"the server {name} does not answer as it should; ask its administrator"
