"""What tests of the KV directory share: workers, a simulated clock, and the directory as a process.

Imports the wire, and nothing else of SPS2: the directory is started by its module's name.
"""

import signal
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import Protocol, Self

import pytest

from sps2.internal.v1.kv_directory_service_pb2 import RequestRecord, RequestShard
from sps2.internal.v1.placement_pb2 import Attempt
from sps2.v1.cluster_pb2 import (
    WORKER_ROLE_DECODE,
    WORKER_STATE_READY,
    WorkerCapabilities,
    WorkerInfo,
    WorkerLoad,
    WorkerState,
)
from support.ports import free_port
from support.process import ManagedProcess


def make_worker(
    worker_id: str = "decode-0/0",
    incarnation: str = "life-1",
    *,
    state: "WorkerState.ValueType" = WORKER_STATE_READY,
    epoch: int = 7,
    running: int = 0,
) -> WorkerInfo:
    """A rank with every part set."""
    group, _, rank = worker_id.partition("/")
    return WorkerInfo(
        worker_id=worker_id,
        role=WORKER_ROLE_DECODE,
        group=group,
        rank=int(rank or 0),
        group_size=64,
        epoch=epoch,
        process_incarnation=incarnation,
        grpc_address="127.0.0.1:1",
        transfer_address="127.0.0.1:2",
        state=state,
        capabilities=WorkerCapabilities(model_name="demo", model_hash="abc", dtype="fp32", device="cpu"),
        load=WorkerLoad(num_requests_running=running, bytes_posted={"q_exchange": 1, "all_to_all": running}),
    )


def make_record(request_id: str = "r", number: int = 1, epoch: int = 7) -> RequestRecord:
    """One shard on one worker."""
    return RequestRecord(
        attempt=Attempt(request_id=request_id, number=number),
        prefill_group="prefill-0",
        decode_group="decode-0",
        shards=[RequestShard(worker_id="decode-0/0", epoch=epoch, layer_end=4, token_end=128, num_blocks=2)],
    )


class SimulatedClock:
    """The wall clock of a store under test; stands still unless it is moved."""

    def __init__(self) -> None:
        self.us = 1_700_000_000_000_000

    def __call__(self) -> int:
        """Now, in µs."""
        return self.us

    def move(self, seconds: float) -> None:
        """Forward, or back."""
        self.us += round(seconds * 1e6)


class Expiring(Protocol):
    """A store, of which this module must not import the type."""

    async def expire(self) -> object:
        """Ends leases that are over."""


async def recover(store: Expiring, clock: SimulatedClock, ttl_s: float = 5.0) -> None:
    """Lets the TTL pass in which a directory whose data began anew is RECOVERING."""
    for _ in range(10):
        await store.expire()
        clock.move(ttl_s / 10)
    await store.expire()


class DirectoryProcess:
    """One replica on a port that it keeps over restarts."""

    def __init__(self, redis_url: str, *flags: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._command = [
            *(sys.executable, "-P", "-m", "sps2_kv_directory", "--listen", self.address),
            *("--redis", redis_url, *flags),
        ]
        self._process: ManagedProcess | None = None

    @property
    def process(self) -> ManagedProcess:
        """The running process."""
        assert self._process is not None
        return self._process

    def start(self) -> Self:
        """Starts it and waits until it serves."""
        self._process = ManagedProcess(
            self._command, name="kv_directory", env={"GRPC_ENABLE_FORK_SUPPORT": "0"}
        ).start()
        try:
            self._process.wait_for_line(r'"event": "serving"')
        except BaseException:
            self._process.kill()
            raise
        return self

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """SIGSTOP."""
        self.process.send(signal.SIGSTOP)


@pytest.fixture
def start_directory() -> Generator[Callable[..., DirectoryProcess]]:
    """`start_directory(redis_url, *flags)` starts a replica that ends with the test."""
    with ExitStack() as stack:

        def start(redis_url: str, *flags: str) -> DirectoryProcess:
            directory = DirectoryProcess(redis_url, *flags)
            stack.callback(directory.kill)
            return directory.start()

        yield start
