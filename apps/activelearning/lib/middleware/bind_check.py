# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Who may reach the server: nobody from outside unless somebody asked for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lib.options import OptionError


def check_listening(arguments: Sequence[str], authenticated: bool) -> None:
    """MONAI Label listens on every network of the machine unless `--host` is given; here that has to be asked for.

    Args:
        arguments: of the command that started this process.
        authenticated: whether MONAI Label asks for users and roles.

    Raises:
        OptionError: a server without `--host` and without authentication.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-i", "--host")
    given = parser.parse_known_args(list(arguments))[0].host
    if "start_server" in arguments and given is None and not authenticated:
        raise OptionError(
            "without --host every network of this machine could read and write the studies, without a password: add "
            "--host 127.0.0.1, or turn MONAI Label's authentication on, or ask for it with --host 0.0.0.0"
        )
