"""A router whose queue is full: raw calls are shed at once, and what had a place in it is answered."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from sps2.v1 import generation_pb2, inference_service_pb2
from sps2.v1.inference_service_pb2_grpc import InferenceServiceStub
from sps2_client import Client
from support.waiting import wait_until

NUM_TOKENS = 2
ANSWER_S = 120.0
LONG_TOKENS = 24_000
"""Of a prompt that keeps the only prefill group busy for seconds."""


def check_full_queue(client: Client, address: str, max_queued_tokens: int) -> float:
    """Fills the queue behind a long prompt, then calls once more than it has room for.

    Args:
        client: of the router.
        address: its HOST:PORT.
        max_queued_tokens: its limit.

    Returns:
        Seconds until that call was refused with UNAVAILABLE, QUEUE_FULL and a RetryInfo.
    """

    def ask(num_prompt_tokens: int) -> int:
        ids = [7 + index % 1000 for index in range(num_prompt_tokens)]
        answer = client.generate(token_ids=ids, max_tokens=NUM_TOKENS, ignore_eos=True, timeout=ANSWER_S)
        return len(answer.token_ids)

    def is_prefilling() -> bool:
        workers = client.cluster_state().workers
        return any(one.num_requests_running for one in workers if one.role == "prefill")

    with ThreadPoolExecutor(2) as pool, grpc.insecure_channel(address) as channel:
        running = pool.submit(ask, LONG_TOKENS)
        wait_until(is_prefilling)
        queued = pool.submit(ask, max_queued_tokens)
        # The one that follows takes the same steps to the queue behind it.
        wait_until(lambda: client.cluster_state().num_requests_live == 2)
        refused_s = _refused(channel)
        assert running.result() == queued.result() == NUM_TOKENS
    return refused_s


def _refused(channel: grpc.Channel) -> float:
    spec = generation_pb2.GenerationSpec(token_ids=generation_pb2.TokenIds(ids=[5] * 64))
    began = time.monotonic()
    try:
        InferenceServiceStub(channel).GenerateText(
            inference_service_pb2.GenerateTextRequest(spec=spec), timeout=ANSWER_S
        )
    except grpc.RpcError as error:
        seconds = time.monotonic() - began
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        _unpack(error, info, retry)
        assert info.reason == "QUEUE_FULL", info
        assert retry.retry_delay.ToMilliseconds() > 0
        return seconds
    raise AssertionError("a call beyond the queue's limit was answered")


def _unpack(error: Any, *kinds: Message) -> None:
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        for kind in kinds:
            detail.Unpack(kind)
