"""PrefillService of a leader: unpack, call, pack."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from sps2.internal.v1 import prefill_service_pb2
from sps2_prefill_worker.coordinator import PrefillCoordinator


class PrefillServicer:
    """Implements `sps2.internal.v1.PrefillService`."""

    def __init__(self, coordinator: PrefillCoordinator) -> None:
        self._coordinator = coordinator

    async def Prefill(  # noqa: N802 - named by the proto
        self,
        request: prefill_service_pb2.PrefillRequest,
        _context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> AsyncIterator[prefill_service_pb2.PrefillResponse]:
        """See prefill_service.proto."""
        async with aclosing(self._coordinator.prefill(request)) as events:
            async for event in events:
                yield event
