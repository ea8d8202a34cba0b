"""ServiceError to google.rpc.Status and back."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from sps2_service.errors import (
    ERROR_OF_CODE,
    FieldViolation,
    Internal,
    InvalidArgument,
    QuotaViolation,
    ServiceError,
    Unavailable,
)
from sps2_service.status import MAX_VIOLATIONS, from_proto, to_grpc_status, to_proto


def equal(one: ServiceError, other: ServiceError) -> bool:
    return type(one) is type(other) and vars(one) == vars(other)


def test_every_status_code_but_ok_and_unknown_has_a_class() -> None:
    assert set(grpc.StatusCode) - set(ERROR_OF_CODE) == {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN}


@given(
    error=st.builds(
        lambda cls, *args, **kwargs: cls(*args, **kwargs),
        st.sampled_from(sorted(ERROR_OF_CODE.values(), key=lambda cls: cls.__name__)),
        st.from_regex(r"[A-Z][A-Z0-9_]{1,40}", fullmatch=True),
        st.text(max_size=100),
        violations=st.lists(
            st.builds(FieldViolation, st.text(max_size=30), st.text(max_size=40)), max_size=4
        ),
        quota=st.lists(st.builds(QuotaViolation, st.text(max_size=30), st.text(max_size=40)), max_size=2),
        retry_after=st.none() | st.integers(0, 10_000).map(lambda ms: ms / 1000),
        metadata=st.dictionaries(st.text(min_size=1, max_size=20), st.text(max_size=20), max_size=4),
    )
)
def test_round_trip(error: ServiceError) -> None:
    assert equal(from_proto(to_proto(error)), error)


def test_details_are_the_standard_ones() -> None:
    error = Unavailable(
        "QUEUE_FULL",
        "the queue is full",
        retry_after=1.5,
        quota=[QuotaViolation("queue", "at most 9 tokens")],
    )
    status = to_proto(error)
    assert [detail.type_url.rpartition(".")[2] for detail in status.details] == [
        "ErrorInfo",
        "QuotaFailure",
        "RetryInfo",
    ]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("sps2", "QUEUE_FULL")


def test_of_field_names_the_field() -> None:
    error = InvalidArgument.of_field("spec.sampling.top_p", "must be in (0, 1], is 2")
    assert error.violations == (FieldViolation("spec.sampling.top_p", "must be in (0, 1], is 2"),)
    assert str(error) == "INVALID_ARGUMENT INVALID_FIELD: spec.sampling.top_p: must be in (0, 1], is 2"


def test_a_huge_error_still_fits_into_trailers() -> None:
    many = [FieldViolation(f"spec.stop[{n}]" * 50, "é" * 5000) for n in range(1000)]
    quota = [QuotaViolation("tenant:" + "é" * 1000, "é" * 5000) for _ in range(1000)]
    status = to_grpc_status(InvalidArgument("X", "é" * 100_000, violations=many, quota=quota))
    escaped_message = 3 * len((status.details or "").encode())
    base64_details = sum(len(value) for _, value in status.trailing_metadata or ()) * 4 // 3
    assert escaped_message + base64_details < 8 * 1024


def test_lone_surrogates_are_no_failure() -> None:
    assert from_proto(to_proto(InvalidArgument("X", "a\ud800b"))).message == "a?b"


def test_many_violations_are_cut() -> None:
    many = [FieldViolation(f"spec.stop[{n}]", "empty") for n in range(1000)]
    assert len(from_proto(to_proto(InvalidArgument("X", "m", violations=many))).violations) == MAX_VIOLATIONS


@pytest.mark.parametrize("code", [2, 99])
def test_unknown_codes_are_bugs(code: int) -> None:
    error = from_proto(status_pb2.Status(code=code, message="what?"))
    assert equal(error, Internal("UNKNOWN", "what?"))


def test_broken_details_leave_code_and_message() -> None:
    status = to_proto(Unavailable("DRAINING", "draining", retry_after=2))
    status.details[0].value = b"\xff\xff\xff"
    status.details.add(type_url="type.googleapis.com/some.thing.Else", value=b"\x01")
    assert equal(from_proto(status), Unavailable("UNAVAILABLE", "draining", retry_after=2))
