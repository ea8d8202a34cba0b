"""Bad input is refused by the name of its field."""

import math
from collections.abc import Callable

import pytest

from sps2.internal.v1.kv_directory_service_pb2 import RequestRecord
from sps2.internal.v1.placement_pb2 import Attempt
from sps2.v1.cluster_pb2 import WORKER_STATE_UNSPECIFIED, WorkerInfo
from sps2_kv_directory.validation import (
    MAX_EPOCH,
    MAX_RENEWALS,
    MAX_SHARDS,
    check_attempt,
    check_record,
    check_renewals,
    check_worker,
    request_lease_s,
)
from sps2_service.directory_registration import renewal_of
from sps2_service.errors import InvalidArgument
from support.directory import make_record, make_worker


def field_of(check: Callable[[], object]) -> str:
    with pytest.raises(InvalidArgument) as caught:
        check()
    return caught.value.violations[0].field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("worker_id", ""),
        ("worker_id", "x" * 129),
        ("worker_id", "a\nb"),
        ("group", ""),
        ("process_incarnation", ""),
        ("grpc_address", ""),
        ("role", 0),
        ("rank", -1),
        ("rank", 64),
        ("state", WORKER_STATE_UNSPECIFIED),
        ("state", 99),
        ("epoch", MAX_EPOCH + 1),
        ("transfer_address", "x" * 129),
    ],
)
def test_a_worker_is_whole_and_bounded(field: str, value: str | int) -> None:
    worker = make_worker()
    setattr(worker, field, value)
    assert field_of(lambda: check_worker(worker)) == f"worker.{field}"


def test_what_is_right_passes() -> None:
    check_worker(make_worker(epoch=MAX_EPOCH))
    worker = make_worker()
    worker.ClearField("load")
    check_worker(worker)
    check_renewals([renewal_of(make_worker())] * MAX_RENEWALS)
    check_renewals([])
    check_record(make_record())
    check_record(RequestRecord(attempt=Attempt(request_id="r", number=1)))


def test_renewals() -> None:
    good, bad = renewal_of(make_worker()), renewal_of(make_worker(state=WORKER_STATE_UNSPECIFIED))
    assert field_of(lambda: check_renewals([good, bad])) == "renewals[1].state"
    assert field_of(lambda: check_renewals([good] * (MAX_RENEWALS + 1))) == "renewals"
    assert field_of(lambda: check_worker(WorkerInfo())) == "worker.worker_id"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("worker_id", ""),
        ("epoch", 2**64 - 1),
        ("layer_begin", 5),
        ("layer_begin", -1),
        ("token_begin", 129),
        ("num_blocks", -1),
    ],
)
def test_shards(field: str, value: str | int) -> None:
    record = make_record()
    setattr(record.shards[0], field, value)
    assert field_of(lambda: check_record(record)) == f"record.shards[0].{field}"


def test_attempts_and_the_number_of_shards() -> None:
    assert field_of(lambda: check_attempt("attempt", Attempt(request_id="r"))) == "attempt.number"
    assert field_of(lambda: check_attempt("attempt", Attempt(number=1))) == "attempt.request_id"
    long = Attempt(request_id="x" * 65, number=1)
    assert field_of(lambda: check_attempt("attempt", long)) == "attempt.request_id"
    record = make_record()
    record.shards.extend([record.shards[0]] * MAX_SHARDS)
    assert field_of(lambda: check_record(record)) == "record.shards"


def test_leases_of_requests() -> None:
    assert request_lease_s(0) == 60
    assert request_lease_s(1.5) == 1.5
    for wrong in (-1.0, math.nan, math.inf, 1e9):
        assert field_of(lambda wrong=wrong: request_lease_s(wrong)) == "lease_s"  # type: ignore[misc]
