"""Calls to the KV directory: each with a deadline, failures as ServiceError; and how to pace retries."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import grpc

from sps2_service.errors import Cancelled, Unavailable
from sps2_service.status import from_rpc_error

Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(frozen=True)
class DirectoryOptions:
    """How long a client of the directory waits for what."""

    timeout_s: float = 1.0
    """Deadline of each call; renewals included, so it stays well below the lease's TTL."""
    first_snapshot_timeout_s: float = 3.0
    """A watch that brought nothing by then is given up and begun anew."""
    retry_min_s: float = 0.1
    """Pause after a first failure; doubles up to retry_max_s."""
    retry_max_s: float = 1.0
    """Longest pause: a directory that is back is found again within about this time."""
    renew_interval_s: float = 1.0
    """Pause between renewals until the directory has said what it wants."""
    lease_ttl_s: float = 5.0
    """Length of a lease until the directory has said it."""
    find_timeout_s: float = 0.02
    """Longest wait for a prefix: it comes before the first token, which does without."""
    max_queued_records: int = 4096
    """RecordShards and ReleaseRequest calls that may wait to be sent; more are dropped."""


async def call(method: "grpc.aio.UnaryUnaryMultiCallable[Q, R]", request: Q, timeout_s: float) -> R:
    """One unary call of a stub's method.

    Raises:
        ServiceError: the call failed; Unavailable or DeadlineExceeded when the directory is away.
    """
    try:
        return await method(request, timeout=timeout_s)
    except grpc.RpcError as error:
        found = from_rpc_error(error)
        if isinstance(found, Cancelled):  # not by us, who would see no status: by a replica that stops
            found = Unavailable(found.reason, found.message)
        raise found from None


def pauses(options: DirectoryOptions) -> Iterator[float]:
    """Seconds to wait after the first, second... failure in a row, jittered so that clients spread out."""
    pause = options.retry_min_s
    while True:
        yield pause * random.uniform(0.75, 1.25)
        pause = min(2 * pause, options.retry_max_s)
