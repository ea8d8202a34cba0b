"""Calls to a router without the SDK: with metadata of their own."""

from typing import Any

import grpc

from sps2.v1 import generation_pb2, inference_service_pb2, inference_service_pb2_grpc

TIMEOUT_S = 120.0


def generate(
    address: str, spec: generation_pb2.GenerationSpec, *metadata: tuple[str, str]
) -> inference_service_pb2.GenerateTextResponse:
    """The whole answer.

    Raises:
        grpc.RpcError: the call's status.
    """
    with grpc.insecure_channel(address) as channel:
        call: Any = inference_service_pb2_grpc.InferenceServiceStub(channel).GenerateText
        request = inference_service_pb2.GenerateTextRequest(spec=spec)
        answer: inference_service_pb2.GenerateTextResponse = call(
            request, timeout=TIMEOUT_S, metadata=metadata
        )
        return answer
