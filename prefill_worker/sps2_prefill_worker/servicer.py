"""PrefillService of a leader: unpack, check, call, pack."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from sps2.internal.v1 import prefill_service_pb2
from sps2_prefill_worker.coordinator import PrefillCoordinator
from sps2_prefill_worker.validation import check_prefill, check_send_prefix
from sps2_service.request_fields import Vocabulary
from sps2_service.telemetry import bind_request


class PrefillServicer:
    """Implements `sps2.internal.v1.PrefillService`."""

    def __init__(self, coordinator: PrefillCoordinator, vocabulary: Vocabulary) -> None:
        self._coordinator = coordinator
        self._vocabulary = vocabulary

    async def Prefill(  # noqa: N802 - named by the proto
        self,
        request: prefill_service_pb2.PrefillRequest,
        _context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> AsyncIterator[prefill_service_pb2.PrefillResponse]:
        """See prefill_service.proto."""
        check_prefill(request, self._vocabulary)
        bind_request(request.attempt.request_id, request.attempt.number)
        async with aclosing(self._coordinator.prefill(request)) as events:
            async for event in events:
                yield event

    async def SendPrefix(  # noqa: N802 - named by the proto
        self,
        request: prefill_service_pb2.SendPrefixRequest,
        _context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> prefill_service_pb2.SendPrefixResponse:
        """See prefill_service.proto."""
        check_send_prefix(request)
        bytes_sent = await self._coordinator.send_prefix(request)
        return prefill_service_pb2.SendPrefixResponse(bytes_sent=bytes_sent)
