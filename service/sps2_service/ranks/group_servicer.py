"""The leader's side of JoinGroup: one stream for each follower's supervisor."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from sps2.internal.v1 import engine_pb2, group_service_pb2
from sps2_service.errors import FailedPrecondition, InvalidArgument
from sps2_service.ranks.group import GroupLeader, Member

log = structlog.get_logger(__name__)


class GroupServicer:
    """Implements `sps2.internal.v1.GroupService` on rank 0."""

    def __init__(self, leader: GroupLeader, model_hash: str, tensor_ranks: int = 1) -> None:
        self._leader = leader
        self._model_hash = model_hash
        self._tensor_ranks = tensor_ranks

    async def JoinGroup(  # noqa: N802 - named by the proto
        self,
        requests: AsyncIterator[group_service_pb2.JoinGroupRequest],
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> AsyncIterator[group_service_pb2.JoinGroupResponse]:
        """See group_service.proto."""
        hello = (await anext(requests)).hello
        self._check(hello)
        commands: asyncio.Queue[engine_pb2.EngineCommand | None] = asyncio.Queue()
        member = self._leader.join(hello.rank, commands.put_nowait)
        log.info("a rank joined", rank=hello.rank)
        reading = asyncio.create_task(self._read(requests, hello.rank, member, commands))
        try:
            # Headers at once: the follower knows that it is in before the first command comes.
            await context.send_initial_metadata(())
            while (command := await commands.get()) is not None:
                yield group_service_pb2.JoinGroupResponse(command=command)
        finally:
            reading.cancel()
            name = f"{self._leader.name}/{hello.rank}"
            self._leader.leave(hello.rank, f"the supervisor of {name} is gone (its stream ended)", member)

    async def _read(
        self,
        requests: AsyncIterator[group_service_pb2.JoinGroupRequest],
        rank: int,
        member: Member,
        commands: "asyncio.Queue[engine_pb2.EngineCommand | None]",
    ) -> None:
        try:
            async for request in requests:
                if request.HasField("event"):
                    self._leader.on_event(rank, request.event, member)
                elif request.HasField("lost"):
                    self._leader.lose(rank, request.lost.reason, member)
        finally:
            commands.put_nowait(None)

    def _check(self, hello: group_service_pb2.FollowerHello) -> None:
        leader = self._leader
        if hello.group != leader.name or hello.group_size != leader.size or not 0 < hello.rank < leader.size:
            raise InvalidArgument(
                "WRONG_GROUP",
                f"rank {hello.rank} of {hello.group!r} ({hello.group_size} ranks) has no place in "
                f"{leader.name!r} ({leader.size} ranks): check --group, --rank and --group-size",
            )
        if hello.tensor_ranks != self._tensor_ranks:
            raise InvalidArgument(
                "WRONG_MESH",
                f"rank {hello.rank} of {hello.group!r} splits layers {hello.tensor_ranks} ways, rank 0 "
                f"{self._tensor_ranks}: check --tp",
            )
        if hello.model_hash != self._model_hash:
            raise FailedPrecondition(
                "MODEL_HASH_MISMATCH",
                f"rank {hello.rank} of {hello.group!r} serves another model than rank 0: check --model",
            )
