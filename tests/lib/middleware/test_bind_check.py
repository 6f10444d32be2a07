# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import pytest

from lib.middleware.bind_check import check_listening
from lib.options import OptionError

START = ["start_server", "--app", "a", "--studies", "s"]


@pytest.mark.parametrize("host", [["--host", "127.0.0.1"], ["--host=0.0.0.0"], ["-i", "10.0.0.1"], ["-i10.0.0.1"]])
def test_a_host_that_is_named_is_taken(host):
    check_listening([*START, *host], authenticated=False)


def test_without_a_host_only_a_server_that_asks_for_users_starts():
    with pytest.raises(OptionError, match="without --host every network"):
        check_listening(START, authenticated=False)
    check_listening(START, authenticated=True)


def test_processes_that_do_not_listen_need_no_host():
    check_listening(["-m", "train", "-r", "{}"], authenticated=False)
