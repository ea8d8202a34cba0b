"""The router over real gRPC. How far a request has come, and what changes of the cluster."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from sps2.v1 import cluster_pb2, cluster_service_pb2, cluster_service_pb2_grpc
from sps2.v1 import inference_service_pb2 as pb
from support.fake_workers import FakeDecode
from support.router_deployment import Code, Deployment, failure, fields, prompt, reason, until

pytestmark = pytest.mark.service

Seen = list[pb.WatchGenerationResponse]


async def read_until(watch: Any, seen: Seen, phase: "pb.GenerationPhase.ValueType") -> None:
    async with asyncio.timeout(5):
        while not seen or seen[-1].phase != phase:
            seen.append(await watch.read())


async def test_a_request_is_watched_from_the_queue_to_its_end() -> None:
    async with Deployment(prefills_per_group=1) as up:
        up.prefill.may_sample.clear()
        up.decode.may_commit.clear()
        up.decode.tokens, up.decode.pause_s = [9] * 10, 0.02
        first = asyncio.ensure_future(up.generate(prompt(request_id="first")))
        watch_first = up.inference.WatchGeneration(pb.WatchGenerationRequest(request_id="first"), timeout=20)
        begun: Seen = []
        await read_until(watch_first, begun, pb.GENERATION_PHASE_PREFILLING)
        second = asyncio.ensure_future(up.generate(prompt(request_id="second")))
        third = asyncio.ensure_future(up.generate(prompt(request_id="third")))
        waiting = up.inference.WatchGeneration(pb.WatchGenerationRequest(request_id="third"), timeout=20)
        assert (await waiting.read()).phase == pb.GENERATION_PHASE_QUEUED
        up.prefill.may_sample.set()
        await read_until(watch_first, begun, pb.GENERATION_PHASE_TRANSFERRING)
        up.decode.may_commit.set()
        await read_until(watch_first, begun, pb.GENERATION_PHASE_ENDED)
        assert not isinstance(
            await watch_first.read(), pb.WatchGenerationResponse
        )  # it ends with that, and OK
        await asyncio.gather(first, second, third)
        phases = [one.phase for one in begun]
        assert phases == sorted(phases)
        assert pb.GENERATION_PHASE_DECODING in phases
        assert [one.prefill_fraction for one in begun] == sorted(one.prefill_fraction for one in begun)
        assert {one.prefill_fraction for one in begun} >= {0.5, 1.0}
        assert (begun[-1].num_tokens, begun[-1].attempt) == (11, 1)
        waiting.cancel()


async def test_the_place_in_the_line() -> None:
    async with Deployment(prefills_per_group=1) as up:
        up.prefill.may_sample.clear()
        calls = []
        for number in range(3):  # one after the other, each in its place
            calls.append(asyncio.ensure_future(up.generate(prompt(request_id=f"r{number}"))))
            await until(
                lambda n=number: up.prefill.num_live + len(up.router._scheduler._line._places) == n + 1
            )

        async def position(request_id: str, wanted: Callable[[pb.WatchGenerationResponse], bool]) -> None:
            watch = up.inference.WatchGeneration(pb.WatchGenerationRequest(request_id=request_id), timeout=9)
            while not wanted(await watch.read()):
                pass
            watch.cancel()

        await position("r2", lambda one: one.queue_position == 1)
        await position("r1", lambda one: one.phase == pb.GENERATION_PHASE_QUEUED and one.queue_position == 0)
        up.prefill.may_sample.set()
        await asyncio.gather(*calls)


async def test_a_watch_of_nothing(up: Deployment) -> None:
    error = await failure(up.inference.WatchGeneration(pb.WatchGenerationRequest(request_id="who")))
    assert (error.code(), reason(error)) == (Code.NOT_FOUND, "REQUEST_NOT_FOUND")
    error = await failure(up.inference.WatchGeneration(pb.WatchGenerationRequest()))
    assert (error.code(), fields(error)) == (Code.INVALID_ARGUMENT, ["request_id"])


async def test_the_cluster_is_watched(up: Deployment) -> None:
    stub: Any = cluster_service_pb2_grpc.ClusterServiceStub(up.channel)
    watch = stub.WatchClusterState(cluster_service_pb2.WatchClusterStateRequest(), timeout=20)
    first = await watch.read()
    assert first.snapshot
    assert [worker.worker_id for worker in first.updated] == ["decode-0/0", "prefill-0/0"]
    up.decodes.append(FakeDecode("decode-1/0"))
    await up.add(up.decodes[-1])
    change = await watch.read()
    assert not change.snapshot
    assert change.revision > first.revision
    assert [worker.worker_id for worker in change.updated] == ["decode-1/0"]
    await up.view.put(up.decode.info(state=cluster_pb2.WORKER_STATE_DRAINING))
    change = await watch.read()
    assert [worker.state for worker in change.updated] == [cluster_pb2.WORKER_STATE_DRAINING]
    del up.view.workers["decode-1/0"]
    assert list((await watch.read()).removed_worker_ids) == ["decode-1/0"]
    watch.cancel()
