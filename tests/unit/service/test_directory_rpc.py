"""Calls to the directory: what a replica that goes away means for its callers."""

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from sps2_service.directory_rpc import call
from sps2_service.errors import DeadlineExceeded, ServiceError, Unavailable

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.UNAVAILABLE, Unavailable),
        # What a server says of calls that come while it stops, between its GOAWAY and the client's next connection.
        (Code.CANCELLED, Unavailable),
        (Code.DEADLINE_EXCEEDED, DeadlineExceeded),
    ],
)
async def test_a_replica_that_goes_away_is_a_directory_that_is_away(
    code: Code, kind: type[ServiceError]
) -> None:
    async def method(request: str, *, timeout: float) -> str:
        raise AioRpcError(
            code, Metadata(), Metadata(), details=f"{request} within {timeout}", debug_error_string=None
        )

    with pytest.raises(kind) as caught:
        await call(method, "asked", 1.0)  # type: ignore[arg-type] # as a stub's method is called
    assert caught.value.reason == code.name
