"""InferenceService on the wire: unpack, call, pack."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from sps2.v1 import inference_service_pb2 as pb
from sps2_router.call import Call
from sps2_router.front_door import FrontDoor
from sps2_router.live_requests import LiveRequests
from sps2_router.relay import Event
from sps2_service.request_fields import check_request_id

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer:
    """Serves sps2.v1.InferenceService.

    The streamed method writes by itself instead of yielding: a cancellation then arrives inside of it, and a
    typed error can take its place, also while a client that does not read holds up a write.
    """

    def __init__(self, door: FrontDoor, live_requests: LiveRequests) -> None:
        self._door = door
        self._live_requests = live_requests

    async def GenerateText(  # noqa: N802
        self, request: pb.GenerateTextRequest, context: Context
    ) -> pb.GenerateTextResponse:
        """See inference_service.proto."""
        answer = pb.GenerateTextResponse()
        choices: list[pb.GenerateTextResponse | pb.GeneratedChoice] = [answer]
        texts: list[list[str]] = [[]]

        async def add(event: Event) -> None:
            while len(choices) <= event.choice_index:
                choices.append(answer.more_choices.add())
                texts.append([])
            choice = choices[event.choice_index]
            match event.WhichOneof("event"):
                case "delta":
                    texts[event.choice_index].append(event.delta.text)
                    choice.token_ids.extend(event.delta.token_ids)
                    choice.logprobs.extend(event.delta.logprobs)
                case "finish":
                    choice.finish.CopyFrom(event.finish)
                case "usage":
                    answer.usage.CopyFrom(event.usage)

        answer.request_id = await self._door.generate(request.spec, Call.of(context), add)
        for choice, parts in zip(choices, texts, strict=True):
            choice.text = "".join(parts)
        return answer

    async def StreamGenerateText(self, request: pb.StreamGenerateTextRequest, context: Context) -> None:  # noqa: N802
        """See inference_service.proto."""
        await self._door.generate(request.spec, Call.of(context), context.write)

    async def WatchGeneration(  # noqa: N802
        self, request: pb.WatchGenerationRequest, context: Context
    ) -> AsyncIterator[pb.WatchGenerationResponse]:
        """See inference_service.proto."""
        check_request_id(request.request_id, "request_id")
        async with aclosing(self._live_requests.watch(request.request_id, Call.of(context))) as responses:
            async for response in responses:
                yield response

    async def CancelGeneration(  # noqa: N802
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        """See inference_service.proto."""
        check_request_id(request.request_id, "request_id")
        await self._live_requests.cancel(request.request_id, Call.of(context))
        return pb.CancelGenerationResponse()
