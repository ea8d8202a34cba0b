"""The way to other prefill groups' leaders. Knows calls, and nothing of what they are for."""

from typing import Any, Protocol

import grpc

from sps2.internal.v1 import prefill_service_pb2
from sps2.internal.v1.prefill_service_pb2_grpc import PrefillServiceStub
from sps2_service.channel import open_channel
from sps2_service.errors import Unavailable
from sps2_service.status import from_rpc_error
from sps2_service.tls import Tls


class Holders(Protocol):
    """What a leader that fetches needs of them."""

    async def send_prefix(
        self, address: str, request: prefill_service_pb2.SendPrefixRequest, timeout_s: float
    ) -> int:
        """Has the group whose leader is at `address` send; the bytes that it has sent.

        Raises:
            ServiceError: it has not.
        """
        ...


class GrpcHolders:
    """Calls by a connection of their own: they are few, and last as long as the KV is under way."""

    def __init__(self, tls: Tls | None = None) -> None:
        """`tls` None: plaintext."""
        self._tls = tls

    async def send_prefix(
        self, address: str, request: prefill_service_pb2.SendPrefixRequest, timeout_s: float
    ) -> int:
        """See `Holders`."""
        try:
            async with open_channel(address, tls=self._tls) as channel:
                stub: Any = PrefillServiceStub(channel)  # the stubs are typed for synchronous channels
                response = await stub.SendPrefix(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except OSError as error:  # certificates that are just being replaced
            raise Unavailable("TLS_FILES", f"no channel to {address}: {error}") from error
        return int(response.bytes_sent)


PLAINTEXT_HOLDERS = GrpcHolders()
