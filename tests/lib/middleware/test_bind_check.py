# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import socket

import pytest

from lib.middleware.bind_check import check_listening
from lib.options import OptionError

START = ["start_server", "--app", "a", "--studies", "s", "--port", "0"]


@pytest.mark.parametrize("host", [["--host", "127.0.0.1"], ["--host=0.0.0.0"], ["-i", "127.0.0.2"], ["-i127.0.0.2"]])
def test_a_host_that_is_named_is_taken(host):
    check_listening([*START, *host], authenticated=False)


def test_without_a_host_only_a_server_that_asks_for_users_starts():
    with pytest.raises(OptionError, match="without --host every network"):
        check_listening(START, authenticated=False)
    check_listening(START, authenticated=True)


def test_processes_that_do_not_listen_need_no_host():
    check_listening(["-m", "train", "-r", "{}"], authenticated=False)


def test_a_port_in_use_and_an_address_of_another_machine_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            with pytest.raises(OptionError, match="another program listens on it"):
                check_listening(["start_server", "--host", host, "--port", port], authenticated=False)
    for host, number in (("192.0.2.1", "0"), ("no such name", "0"), ("127.0.0.1", "70000")):
        with pytest.raises(OptionError, match="this machine cannot listen there"):
            check_listening(["start_server", "--host", host, "--port", number], authenticated=False)
