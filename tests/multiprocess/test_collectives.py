"""Process groups: what their timeouts mean."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from sps2_engine import collectives
from sps2_engine.collectives import (
    CONNECT_TIMEOUT,
    LANES,
    Communicator,
    GroupError,
    PendingExchange,
    TorchCommunicator,
    form_groups,
)
from support.ranks import run_ranks

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


def test_an_agreement_overtakes_what_is_under_way() -> None:
    """Rank 1 posts its halves of the exchanges only after both have agreed: in one queue they would wait for ever."""
    sent = torch.arange(8, dtype=torch.uint8)

    def on_rank(communicator: Communicator) -> list[int]:
        peer = 1 - communicator.rank
        counts = [8 if rank == peer else 0 for rank in range(2)]

        def post() -> list[PendingExchange]:
            lanes = [lane % LANES for lane in range(3 * LANES)]
            return [communicator.all_to_all(sent, counts, counts, "test", lane) for lane in lanes]

        early = post() if communicator.rank == 0 else []
        assert communicator.agree(communicator.rank == 0)
        return [int(pending.wait().sum()) for pending in early or post()]

    assert run_ranks(2, on_rank) == [[28] * 3 * LANES] * 2
