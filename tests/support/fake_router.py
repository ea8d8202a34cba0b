"""A scripted router: a real gRPC server on a real port that answers as a test tells it to.

`FakeRouter` runs in the test's process; `python fake_router.py` runs one in a process of its own, to be
stopped or killed, and prints "listening on HOST:PORT".
"""

import hashlib
import itertools
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from types import TracebackType
from typing import Self

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from sps2.v1 import cluster_pb2, cluster_service_pb2, generation_pb2, model_service_pb2, tokenizer_service_pb2
from sps2.v1 import cluster_service_pb2_grpc as cluster_grpc
from sps2.v1 import inference_service_pb2 as inference
from sps2.v1 import inference_service_pb2_grpc as inference_grpc
from sps2.v1 import model_service_pb2_grpc as model_grpc
from sps2.v1 import tokenizer_service_pb2_grpc as tokenizer_grpc

Response = inference.StreamGenerateTextResponse
Script = Callable[[inference.StreamGenerateTextRequest, grpc.ServicerContext], Iterable[Response]]

TOKENS = ((5, "Hel"), (6, "lo "), (7, "wörld"))
USAGE = generation_pb2.Usage(
    prompt_tokens=11,
    cached_tokens=2,
    output_tokens=3,
    timings=generation_pb2.Timings(
        queue=0.1, prefill=0.2, transfer=0.3, ttft=0.4, tpot=0.5, e2e=0.6, tbt_p50=0.7, tbt_p99=0.8
    ),
    bytes=generation_pb2.BytesMoved(collective=100, q_exchange=200, kv_transfer=300),
    attention_profile="exact",
)


def digest(token_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(b"".join(struct.pack("<i", one) for one in token_ids)).digest()


def delta(text: str, token_ids: Sequence[int], first_index: int) -> Response:
    return Response(delta=generation_pb2.Delta(text=text, token_ids=token_ids, first_index=first_index))


def finish(token_ids: Sequence[int], **changes: object) -> Response:
    message = generation_pb2.Finish(
        reason=generation_pb2.FINISH_REASON_LENGTH, token_count=len(token_ids), digest=digest(token_ids)
    )
    for name, value in changes.items():
        setattr(message, name, value)
    return Response(finish=message)


def usage() -> Response:
    return Response(usage=USAGE)


def good_events(tokens: Sequence[tuple[int, str]] = TOKENS) -> list[Response]:
    ids = [one for one, _ in tokens]
    deltas = [delta(text, [one], index) for index, (one, text) in enumerate(tokens)]
    return [*deltas, finish(ids), usage()]


def numbered(events: Iterable[Response], request_id: str = "") -> Iterator[Response]:
    """The events with their sequence numbers, the first with the request's id."""
    for number, event in enumerate(events):
        event.sequence_number = number
        event.request_id = request_id if number == 0 else ""
        yield event


def play(events: Iterable[Response]) -> Script:
    """A script that sends these events and ends OK."""
    return lambda request, _: numbered(events, request.spec.request_id)


def fail(code: grpc.StatusCode, message: str, *details: Message, after: Iterable[Response] = ()) -> Script:
    """A script that ends in a rich error status."""

    def script(
        request: inference.StreamGenerateTextRequest, context: grpc.ServicerContext
    ) -> Iterator[Response]:
        yield from numbered(after, request.spec.request_id)
        number: int = code.value[0]
        status = status_pb2.Status(code=number, message=message)
        for one in details:
            status.details.add().Pack(one)
        context.abort_with_status(rpc_status.to_status(status))

    return script


def error_info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain="sps2", metadata=metadata)


def workers(
    state: cluster_pb2.WorkerState.ValueType = cluster_pb2.WORKER_STATE_READY,
) -> list[cluster_pb2.WorkerInfo]:
    """Two pools of one group of two ranks."""
    roles = {"prefill": cluster_pb2.WORKER_ROLE_PREFILL, "decode": cluster_pb2.WORKER_ROLE_DECODE}
    return [
        cluster_pb2.WorkerInfo(
            worker_id=f"{role}-0/{rank}",
            role=roles[role],
            group=f"{role}-0",
            rank=rank,
            group_size=2,
            epoch=7,
            grpc_address="127.0.0.1:1",
            state=state,
            capabilities=cluster_pb2.WorkerCapabilities(
                model_name="demo", dtype="fp32", device="cpu", kv_blocks_total=100
            ),
            load=cluster_pb2.WorkerLoad(kv_blocks_used=25, load_fraction=1.0, num_requests_waiting=rank),
        )
        for role, rank in itertools.product(("decode", "prefill"), range(2))
    ]


class FakeRouter(
    inference_grpc.InferenceServiceServicer,
    model_grpc.ModelServiceServicer,
    tokenizer_grpc.TokenizerServiceServicer,
    cluster_grpc.ClusterServiceServicer,
):
    """Plays one script per stream, in order; the last one repeats. Records the requests that came."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts) or [play(good_events())]
        self.requests: list[inference.StreamGenerateTextRequest] = []
        self.cancelled_ids: list[str] = []
        self.stream_ended_early = threading.Event()
        self.cluster = workers()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(16),
            options=[("grpc.http2.min_ping_interval_without_data_ms", 500), ("grpc.so_reuseport", 0)],
        )
        inference_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        model_grpc.add_ModelServiceServicer_to_server(self, self._server)
        tokenizer_grpc.add_TokenizerServiceServicer_to_server(self, self._server)
        cluster_grpc.add_ClusterServiceServicer_to_server(self, self._server)
        self.address = ""

    def start(self, listen: str = "127.0.0.1:0") -> Self:
        host = listen.rpartition(":")[0]
        self.address = f"{host}:{self._server.add_insecure_port(listen)}"
        self._server.start()
        return self

    def stop(self) -> None:
        self._server.stop(0).wait(5)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.stop()

    def StreamGenerateText(  # noqa: N802
        self, request: inference.StreamGenerateTextRequest, context: grpc.ServicerContext
    ) -> Iterator[Response]:
        self.requests.append(request)
        done = threading.Event()
        context.add_callback(lambda: None if done.is_set() else self.stream_ended_early.set())
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        for event in script(request, context):
            copy = Response()
            copy.CopyFrom(event)
            yield copy
        done.set()

    def GenerateText(  # noqa: N802
        self, request: inference.GenerateTextRequest, context: grpc.ServicerContext
    ) -> inference.GenerateTextResponse:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "the SDK streams")
        raise AssertionError("abort raises")

    def CancelGeneration(  # noqa: N802
        self, request: inference.CancelGenerationRequest, context: grpc.ServicerContext
    ) -> inference.CancelGenerationResponse:
        self.cancelled_ids.append(request.request_id)
        if request.request_id == "unknown":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such request")
        return inference.CancelGenerationResponse()

    def WatchGeneration(  # noqa: N802
        self, request: inference.WatchGenerationRequest, context: grpc.ServicerContext
    ) -> Iterator[inference.WatchGenerationResponse]:
        if request.request_id == "unknown":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such request")
        yield inference.WatchGenerationResponse(phase=inference.GENERATION_PHASE_QUEUED, queue_position=2)
        yield inference.WatchGenerationResponse(
            phase=inference.GENERATION_PHASE_ENDED, num_tokens=3, attempt=1
        )

    def WatchClusterState(  # noqa: N802
        self, request: cluster_service_pb2.WatchClusterStateRequest, context: grpc.ServicerContext
    ) -> Iterator[cluster_service_pb2.WatchClusterStateResponse]:
        yield cluster_service_pb2.WatchClusterStateResponse(revision=4, snapshot=True, updated=self.cluster)
        yield cluster_service_pb2.WatchClusterStateResponse(revision=5, removed_worker_ids=["decode-0/0"])

    def ListModels(  # noqa: N802
        self, request: model_service_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> model_service_pb2.ListModelsResponse:
        model = model_service_pb2.Model(
            name="demo", model_hash="ab", context_length=4096, vocabulary_size=300, eos_token_ids=[1]
        )
        return model_service_pb2.ListModelsResponse(models=[model])

    def GetModel(  # noqa: N802
        self, request: model_service_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> model_service_pb2.GetModelResponse:
        context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        raise AssertionError("abort raises")

    def TokenizeText(  # noqa: N802
        self, request: tokenizer_service_pb2.TokenizeTextRequest, context: grpc.ServicerContext
    ) -> tokenizer_service_pb2.TokenizeTextResponse:
        return tokenizer_service_pb2.TokenizeTextResponse(token_ids=request.text.encode())

    def DetokenizeTokens(  # noqa: N802
        self, request: tokenizer_service_pb2.DetokenizeTokensRequest, context: grpc.ServicerContext
    ) -> tokenizer_service_pb2.DetokenizeTokensResponse:
        return tokenizer_service_pb2.DetokenizeTokensResponse(text=bytes(request.token_ids).decode())

    def GetClusterState(  # noqa: N802
        self, request: cluster_service_pb2.GetClusterStateRequest, context: grpc.ServicerContext
    ) -> cluster_service_pb2.GetClusterStateResponse:
        return cluster_service_pb2.GetClusterStateResponse(
            workers=self.cluster,
            directory_connected=True,
            num_requests_live=1,
            num_requests_by_group={"decode-0": 1},
            num_queued_tokens=1234,
        )

    def ResizeRequest(  # noqa: N802
        self, request: cluster_service_pb2.ResizeRequestRequest, context: grpc.ServicerContext
    ) -> cluster_service_pb2.ResizeRequestResponse:
        return cluster_service_pb2.ResizeRequestResponse(
            group="decode-0", holders=range(request.degree), num_blocks_moved=3
        )

    def DrainGroup(  # noqa: N802
        self, request: cluster_service_pb2.DrainGroupRequest, context: grpc.ServicerContext
    ) -> cluster_service_pb2.DrainGroupResponse:
        if request.group not in {worker.group for worker in self.cluster}:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no group {request.group!r}")
        return cluster_service_pb2.DrainGroupResponse(budget_s=7)


def hang(before: Sequence[Response] = ()) -> Script:
    """A script that sends `before` and then nothing until the client gives up (at most 30 s)."""

    def script(
        request: inference.StreamGenerateTextRequest, context: grpc.ServicerContext
    ) -> Iterator[Response]:
        yield from numbered(before, request.spec.request_id)
        ended = threading.Event()
        if context.add_callback(ended.set):
            ended.wait(30)

    return script


def main() -> None:
    """One token, then silence."""
    router = FakeRouter(hang([delta("a", [1], 0)])).start()
    sys.stdout.write(f"listening on {router.address}\n")
    sys.stdout.flush()
    threading.Event().wait(60)


if __name__ == "__main__":
    main()
