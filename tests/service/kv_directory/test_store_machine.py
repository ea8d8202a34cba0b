"""The directory in random order, with faults; and that the machine notices when a fence is missing."""

from unittest import mock

import pytest

from sps2_kv_directory import script_runner
from sps2_service.lease_fence import LeaseFence
from support.directory_machine import run_machine
from support.redis_server import RedisServer

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]

RUNS, STEPS = 25, 40


def test_the_store_does_what_the_model_does(redis_server: RedisServer) -> None:
    assert run_machine(redis_server.url, RUNS, STEPS) >= RUNS
