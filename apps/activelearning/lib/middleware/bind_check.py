# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Check of the server's address: access from outside requires an explicit option."""

from __future__ import annotations

import argparse
import errno
import socket
from collections.abc import Sequence

from monailabel.config import settings

from lib.options import OptionError


def check_listening(arguments: Sequence[str], authenticated: bool) -> None:
    """Require `--host` or authentication, since MONAI Label listens on every network of the machine by default.

    Args:
        arguments: arguments of the command that started this process.
        authenticated: whether MONAI Label's authentication is on.

    Raises:
        OptionError: a server without `--host` and without authentication.
    """
    if "start_server" not in arguments:
        return
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-i", "--host")
    parser.add_argument("-p", "--port", type=int, default=settings.MONAI_LABEL_SERVER_PORT)
    known = parser.parse_known_args(list(arguments))[0]
    given = known.host
    if given is None and not authenticated:
        raise OptionError(
            "without --host every network of this machine could read and write the studies, without a password: add "
            "--host 127.0.0.1, or turn MONAI Label's authentication on, or ask for it with --host 0.0.0.0"
        )
    _check_port(given or "0.0.0.0", known.port)


def _check_port(host: str, port: int) -> None:
    """Bind the port before the app is loaded; the web server does so later, and without a clear error."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # `getaddrinfo` takes the port modulo 65,536.
            probe.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise OptionError(
                f"--port {port}: expected a free port, and another program listens on it; "
                "choose another or stop that one"
            ) from None
        raise OptionError(f"--host {host} --port {port}: this machine cannot listen there ({error})") from None
