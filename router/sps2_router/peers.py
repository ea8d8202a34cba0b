"""Calls about a request that another router serves: found through the directory, handed on to it.

What is handed on names the very call (metadata CALL_KEY), so that it never goes round, and never hits a later call of
the same id. The caller's own credentials go with it: the other router judges by them.
"""

from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
import structlog

from sps2.internal.v1 import kv_directory_service_pb2 as directory_pb
from sps2.v1 import inference_service_pb2 as pb
from sps2.v1 import inference_service_pb2_grpc as rpc
from sps2_router.call import AUTHORIZATION, CALL_KEY, SUPERSEDED_KEY
from sps2_router.channels import LeaderChannels
from sps2_router.claims import RequestDirectory
from sps2_service.errors import ServiceError, Unavailable
from sps2_service.status import from_rpc_error

HAND_ON_TIMEOUT_S = 5.0
RETRY_AFTER_S = 1.0

log = structlog.get_logger(__name__)


class Peers:
    """The other routers."""

    def __init__(
        self, directory: RequestDirectory, channels: LeaderChannels, own_address: Callable[[], str]
    ) -> None:
        self._directory = directory
        self._channels = channels
        self._own_address = own_address

    async def find(self, request_id: str) -> directory_pb.RequestAdmission | None:
        """The call by which another router serves a request, as the directory knows now; None when it knows none.

        Raises:
            Unavailable: the directory is away.
        """
        try:
            call = await self._directory.locate_call(request_id)
        except ServiceError as error:
            raise Unavailable(
                error.reason,
                f"request {request_id!r} is not on this router, and the directory does not say where: "
                f"{error.message}",
                retry_after=error.retry_after or RETRY_AFTER_S,
            ) from None
        return None if call is None or call.router_address == self._own_address() else call

    async def cancel(
        self, call: directory_pb.RequestAdmission, authorization: str, *, superseded: bool = False
    ) -> None:
        """Ends a call on its router.

        Raises:
            ServiceError: what the other router answers; Unavailable when it does not.
        """
        extra = ((SUPERSEDED_KEY, "1"),) if superseded else ()
        async with self._channels.use(call.router_address) as channel:
            stub: Any = rpc.InferenceServiceStub(channel)
            request = pb.CancelGenerationRequest(request_id=call.request_id)
            try:
                await stub.CancelGeneration(
                    request, timeout=HAND_ON_TIMEOUT_S, metadata=_metadata(call, authorization) + extra
                )
            except grpc.RpcError as error:
                raise from_rpc_error(error) from None

    async def supersede(self, call: directory_pb.RequestAdmission, authorization: str) -> None:
        """Ends an earlier call of the same client; its router may be gone, and the call with it."""
        try:
            await self.cancel(call, authorization, superseded=True)
        except ServiceError as error:
            log.info("superseded call not ended", request_id=call.request_id, reason=error.reason)

    async def watch(
        self, call: directory_pb.RequestAdmission, authorization: str
    ) -> AsyncGenerator[pb.WatchGenerationResponse]:
        """Watches a call on its router. Raises like `cancel`."""
        async with self._channels.use(call.router_address) as channel:
            stub: Any = rpc.InferenceServiceStub(channel)
            request = pb.WatchGenerationRequest(request_id=call.request_id)
            watch = stub.WatchGeneration(request, metadata=_metadata(call, authorization))
            try:
                async for response in watch:
                    yield response
            except grpc.RpcError as error:
                raise _broken_off(from_rpc_error(error), call) from None
            finally:
                watch.cancel()


def _broken_off(error: ServiceError, call: directory_pb.RequestAdmission) -> ServiceError:
    """Why a watch ended early, for whoever may ask again.

    No router cancels a watch by itself, and each gives a reason of its own for what is not available: by these two
    gRPC says that the router has stopped, or is out of reach.
    """
    if (
        error.code not in {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
        or error.reason != error.code.name
    ):
        return error
    message = (
        f"the router that served request {call.request_id!r} has stopped, or cannot be reached: watch again"
    )
    return Unavailable("ROUTER_STOPPED", message, retry_after=RETRY_AFTER_S)


def _metadata(call: directory_pb.RequestAdmission, authorization: str) -> tuple[tuple[str, str], ...]:
    token = ((AUTHORIZATION, authorization),) if authorization else ()
    return ((CALL_KEY, call.call_id), *token)
