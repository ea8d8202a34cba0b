"""Process groups: what their timeouts mean."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from sps2_engine import collectives
from sps2_engine.collectives import CONNECT_TIMEOUT, GroupError, TorchCommunicator, form_groups

CPU = torch.device("cpu")


def test_a_silent_peer_is_given_up_after_the_group_s_own_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeout of collectives is the caller's, not the one for connecting."""
    store = dist.HashStore()  # type: ignore[attr-defined,unused-ignore] # the stubs do not export it
    monkeypatch.setattr(collectives, "CONNECT_TIMEOUT", timedelta(seconds=0.5))
    timeout = timedelta(seconds=2)
    with ThreadPoolExecutor(2) as pool:
        groups = list(
            pool.map(lambda rank: form_groups(store, 1, rank, 2, CPU, "127.0.0.1", timeout), range(2))
        )
    waiting = TorchCommunicator(groups[0], CPU)
    began = time.monotonic()
    with pytest.raises(GroupError):
        waiting.all_to_all(torch.zeros(4, dtype=torch.uint8), [0, 4], [0, 4], "test").wait()
    assert 1.5 < time.monotonic() - began < 10


def test_a_peer_that_never_connects_is_given_up_soon() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined,unused-ignore] # the stubs do not export it
    began = time.monotonic()
    with pytest.raises(GroupError, match="could not form"):
        form_groups(store, 1, 0, 2, CPU, "127.0.0.1", timedelta(seconds=120))
    assert time.monotonic() - began < 2 * CONNECT_TIMEOUT.total_seconds()
