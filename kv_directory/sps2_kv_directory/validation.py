"""What a request may hold: bounds on everything a client sets. Pure; InvalidArgument names the field."""

import math
from collections.abc import Sequence

from sps2.internal.v1.kv_directory_service_pb2 import (
    LeaseRenewal,
    PrefixHolder,
    RequestAdmission,
    RequestRecord,
)
from sps2.internal.v1.placement_pb2 import Attempt
from sps2.v1.cluster_pb2 import WorkerInfo, WorkerState
from sps2_service.errors import InvalidArgument

MAX_ID_CHARS = 128
MAX_REQUEST_ID_CHARS = 64
MAX_RENEWALS = 1024
MAX_SHARDS = 4096
MAX_ADMISSIONS = 256
MAX_NONCE_BYTES = 32
MAX_PREFIX_KEYS = 64
MAX_PREFIX_KEY_BYTES = 64
MAX_LAYOUT_BYTES = 1024
MAX_REQUEST_LEASE_S = 3600.0
DEFAULT_REQUEST_LEASE_S = 60.0
# Lua counts in doubles, which hold integers up to here; epochs in µs stay below until the year 2255.
MAX_EPOCH = 2**53


def check_id(field: str, value: str, max_chars: int = MAX_ID_CHARS) -> None:
    """1 to `max_chars` characters, none of them a control character."""
    _require(0 < len(value) <= max_chars, field, f"must have 1 to {max_chars} characters")
    _require(value.isprintable(), field, "must not hold control characters")


def check_epoch(field: str, epoch: int) -> None:
    """At most MAX_EPOCH."""
    _require(epoch <= MAX_EPOCH, field, f"must not exceed {MAX_EPOCH}")


def check_worker(worker: WorkerInfo) -> None:
    """A registration; `load` may be empty."""
    check_id("worker.worker_id", worker.worker_id)
    check_id("worker.group", worker.group)
    check_id("worker.process_incarnation", worker.process_incarnation)
    check_id("worker.grpc_address", worker.grpc_address)
    _require(worker.role != 0, "worker.role", "must be set")
    _require(0 <= worker.rank < worker.group_size, "worker.rank", "must be in [0, group_size)")
    _check_vital("worker", worker)


def check_renewals(renewals: Sequence[LeaseRenewal]) -> None:
    """At most MAX_RENEWALS heartbeats."""
    _require(len(renewals) <= MAX_RENEWALS, "renewals", f"must not be more than {MAX_RENEWALS}")
    for index, renewal in enumerate(renewals):
        field = f"renewals[{index}]"
        check_id(f"{field}.worker_id", renewal.worker_id)
        check_id(f"{field}.process_incarnation", renewal.process_incarnation)
        _check_vital(field, renewal)


def check_admissions(admissions: Sequence[RequestAdmission]) -> None:
    """At most MAX_ADMISSIONS calls."""
    _require(len(admissions) <= MAX_ADMISSIONS, "admissions", f"must not be more than {MAX_ADMISSIONS}")
    for index, one in enumerate(admissions):
        field = f"admissions[{index}]"
        check_id(f"{field}.request_id", one.request_id, MAX_REQUEST_ID_CHARS)
        check_id(f"{field}.call_id", one.call_id)
        check_id(f"{field}.router_address", one.router_address)
        _require(
            len(one.nonce) <= MAX_NONCE_BYTES, f"{field}.nonce", f"must not exceed {MAX_NONCE_BYTES} bytes"
        )


def check_attempt(field: str, attempt: Attempt) -> None:
    """A request id and a number from 1."""
    check_id(f"{field}.request_id", attempt.request_id, MAX_REQUEST_ID_CHARS)
    _require(attempt.number >= 1, f"{field}.number", "must be at least 1")


def check_record(record: RequestRecord) -> None:
    """An attempt and its shards: known workers by name only, ranges that are not reversed."""
    check_attempt("record.attempt", record.attempt)
    _require(len(record.shards) <= MAX_SHARDS, "record.shards", f"must not be more than {MAX_SHARDS}")
    for index, shard in enumerate(record.shards):
        field = f"record.shards[{index}]"
        check_id(f"{field}.worker_id", shard.worker_id)
        check_epoch(f"{field}.epoch", shard.epoch)
        _require(
            0 <= shard.layer_begin <= shard.layer_end, f"{field}.layer_begin", "must be in [0, layer_end]"
        )
        _require(
            0 <= shard.token_begin <= shard.token_end, f"{field}.token_begin", "must be in [0, token_end]"
        )
        _require(shard.num_blocks >= 0, f"{field}.num_blocks", "must not be negative")


def check_prefix_keys(keys: Sequence[bytes]) -> None:
    """At most MAX_PREFIX_KEYS, each of 1 to MAX_PREFIX_KEY_BYTES bytes."""
    _require(len(keys) <= MAX_PREFIX_KEYS, "keys", f"must not be more than {MAX_PREFIX_KEYS}")
    for index, key in enumerate(keys):
        _require(
            1 <= len(key) <= MAX_PREFIX_KEY_BYTES,
            f"keys[{index}]",
            f"must have 1 to {MAX_PREFIX_KEY_BYTES} bytes",
        )


def check_holder(holder: PrefixHolder) -> None:
    """A worker in one life, and a layout."""
    check_id("holder.worker_id", holder.worker_id)
    check_id("holder.process_incarnation", holder.process_incarnation)
    check_epoch("holder.epoch", holder.epoch)
    _require(holder.attention.WhichOneof("mask") is not None, "holder.attention", "must have a mask")
    _require(
        holder.attention.ByteSize() <= MAX_LAYOUT_BYTES,
        "holder.attention",
        f"must not exceed {MAX_LAYOUT_BYTES} bytes",
    )


def request_lease_s(lease_s: float) -> float:
    """The lease that a request asks for, in seconds; 0 asks for the default."""
    _require(
        math.isfinite(lease_s) and 0 <= lease_s <= MAX_REQUEST_LEASE_S,
        "lease_s",
        f"must be in [0, {MAX_REQUEST_LEASE_S:g}]",
    )
    return lease_s or DEFAULT_REQUEST_LEASE_S


def _check_vital(field: str, message: WorkerInfo | LeaseRenewal) -> None:
    _require(message.state in WorkerState.values() and message.state != 0, f"{field}.state", "must be set")
    check_epoch(f"{field}.epoch", message.epoch)
    _require(len(message.transfer_address) <= MAX_ID_CHARS, f"{field}.transfer_address", "is too long")


def _require(condition: bool, field: str, description: str) -> None:
    if not condition:
        raise InvalidArgument.of_field(field, description)
