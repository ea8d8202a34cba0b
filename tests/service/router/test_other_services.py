"""The router over real gRPC. ModelService, TokenizerService, ClusterService."""

import asyncio
from typing import Any

import grpc
import pytest

from sps2.v1 import (
    cluster_service_pb2,
    cluster_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    tokenizer_service_pb2,
    tokenizer_service_pb2_grpc,
)
from support.router_deployment import (
    Code,
    Deployment,
    failure,
    fields,
    prompt,
    until,
)
from support.tiny_model import BOS, CONTEXT_LENGTH, EOS, VOCABULARY_SIZE

pytestmark = pytest.mark.service


async def test_model_service(up: Deployment) -> None:
    models: Any = model_service_pb2_grpc.ModelServiceStub(up.channel)
    listed = (await models.ListModels(model_service_pb2.ListModelsRequest())).models
    got = (await models.GetModel(model_service_pb2.GetModelRequest(name="tiny"))).model
    assert list(listed) == [got]
    assert (got.name, got.model_hash, got.context_length) == ("tiny", "hash", CONTEXT_LENGTH)
    assert (got.vocabulary_size, list(got.eos_token_ids)) == (VOCABULARY_SIZE, [EOS])
    error = await failure(models.GetModel(model_service_pb2.GetModelRequest(name="other")))
    assert error.code() == Code.NOT_FOUND
    error = await failure(models.GetModel(model_service_pb2.GetModelRequest()))
    assert (error.code(), fields(error)) == (Code.INVALID_ARGUMENT, ["name"])


async def test_tokenizer_service(up: Deployment) -> None:
    pb = tokenizer_service_pb2
    stub: Any = tokenizer_service_pb2_grpc.TokenizerServiceStub(up.channel)
    ids = (await stub.TokenizeText(pb.TokenizeTextRequest(text="hello €"))).token_ids
    assert ids[0] == BOS
    assert (await stub.DetokenizeTokens(pb.DetokenizeTokensRequest(token_ids=ids))).text == "hello €"
    for call, field in (
        (stub.TokenizeText(pb.TokenizeTextRequest()), "text"),
        (stub.DetokenizeTokens(pb.DetokenizeTokensRequest(token_ids=[-1])), "token_ids[0]"),
    ):
        error = await failure(call)
        assert (error.code(), fields(error)) == (Code.INVALID_ARGUMENT, [field])


async def test_cluster_service(up: Deployment) -> None:
    stub: Any = cluster_service_pb2_grpc.ClusterServiceStub(up.channel)
    up.prefill.may_sample.clear()
    call = asyncio.ensure_future(up.generate(prompt()))
    await until(lambda: up.prefill.num_live)
    state = await stub.GetClusterState(cluster_service_pb2.GetClusterStateRequest())
    assert [worker.worker_id for worker in state.workers] == ["decode-0/0", "prefill-0/0"]
    assert state.directory_connected
    assert state.num_requests_live == 1
    assert dict(state.num_requests_by_group) == {"prefill-0": 1, "decode-0": 1}
    up.prefill.may_sample.set()
    await call


async def test_a_resize_goes_to_the_leader_that_decodes(up: Deployment) -> None:
    stub: Any = cluster_service_pb2_grpc.ClusterServiceStub(up.channel)
    up.decode.may_commit.clear()
    call = asyncio.ensure_future(up.generate(prompt()))
    await until(lambda: bool(up.decode.reserved))
    request_id = up.decode.reserved[0].attempt.request_id
    done = await stub.ResizeRequest(cluster_service_pb2.ResizeRequestRequest(request_id=request_id, degree=2))
    assert (done.group, list(done.holders)) == ("decode-0", [0, 1])
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stub.ResizeRequest(cluster_service_pb2.ResizeRequestRequest(request_id="nobody", degree=2))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    up.decode.may_commit.set()
    await call


async def test_a_drain_goes_to_the_leader_of_the_group(up: Deployment) -> None:
    stub: Any = cluster_service_pb2_grpc.ClusterServiceStub(up.channel)
    for _ in range(2):
        begun = await stub.DrainGroup(cluster_service_pb2.DrainGroupRequest(group="decode-0"))
        assert begun.budget_s == 7
    assert (up.decode.num_drains, up.prefill.num_drains) == (2, 0)
    for group, code in (("decode-1", grpc.StatusCode.NOT_FOUND), ("", grpc.StatusCode.INVALID_ARGUMENT)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.DrainGroup(cluster_service_pb2.DrainGroupRequest(group=group))
        assert refused.value.code() is code
