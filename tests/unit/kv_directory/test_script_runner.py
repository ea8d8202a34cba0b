"""When the runner leaves a failed Redis alone, and when not."""

import time

import pytest

from sps2_kv_directory.config import StoreConfig
from sps2_kv_directory.script_runner import ScriptRunner
from sps2_service.errors import Unavailable
from support.ports import free_port


async def test_after_a_failure_redis_is_left_alone_for_a_while() -> None:
    runner = ScriptRunner.connect(f"redis://127.0.0.1:{free_port()}", StoreConfig(pause_s=30))
    with pytest.raises(Unavailable, match="cannot be reached"):
        await runner.run("state")
    with pytest.raises(Unavailable, match="failed just now"):
        await runner.run("state")
    await runner.close()


async def test_the_late_failure_of_an_older_call_does_not_undo_an_answer() -> None:
    runner = ScriptRunner.connect(f"redis://127.0.0.1:{free_port()}", StoreConfig(pause_s=30))
    began = time.monotonic()
    runner._note_answer()
    runner._note_failure(began, "timed out")
    with pytest.raises(Unavailable, match="cannot be reached"):  # it was tried
        await runner.run("state")
    await runner.close()
