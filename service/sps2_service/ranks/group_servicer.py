"""GroupService of a leader: JoinGroup, one stream for each follower's supervisor, and DrainGroup."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from sps2.internal.v1 import engine_pb2, group_service_pb2
from sps2_service.errors import Aborted, FailedPrecondition, FieldViolation, InvalidArgument
from sps2_service.ranks.carried_renewals import CarriedRenewals, Outgoing, Passenger
from sps2_service.ranks.group import GroupLeader, Member

log = structlog.get_logger(__name__)


class GroupServicer:
    """Implements `sps2.internal.v1.GroupService` on rank 0."""

    def __init__(
        self,
        leader: GroupLeader,
        model_hash: str,
        tensor_ranks: int = 1,
        drain_budget_s: float = 0.0,
        renewals: CarriedRenewals | None = None,
    ) -> None:
        """`drain_budget_s`: what requests get to finish when the group drains."""
        self._drain_budget_s = drain_budget_s
        self._leader = leader
        self._model_hash = model_hash
        self._tensor_ranks = tensor_ranks
        self._renewals = renewals or CarriedRenewals()

    async def JoinGroup(  # noqa: N802 - named by the proto
        self,
        requests: AsyncIterator[group_service_pb2.JoinGroupRequest],
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> AsyncIterator[group_service_pb2.JoinGroupResponse]:
        """See group_service.proto."""
        first = await anext(requests, group_service_pb2.JoinGroupRequest())
        if not first.HasField("hello"):
            raise InvalidArgument.of_field("hello", "must be the first message of a JoinGroup call")
        hello = first.hello
        self._check(hello)
        outgoing: Outgoing = asyncio.Queue()

        def send(command: engine_pb2.EngineCommand) -> None:
            outgoing.put_nowait(group_service_pb2.JoinGroupResponse(command=command))

        def dismiss() -> None:
            outgoing.put_nowait(group_service_pb2.JoinGroupResponse(leave=group_service_pb2.LeaveGroup()))
            outgoing.put_nowait(None)

        member = self._leader.join(hello.rank, send, dismiss)
        log.info("a rank joined", rank=hello.rank)
        passenger = self._renewals.board(outgoing)
        reading = asyncio.create_task(self._read(requests, hello.rank, member, passenger))
        try:
            # Headers at once: the follower knows that it is in before the first command comes.
            await context.send_initial_metadata(())
            while (response := await outgoing.get()) is not None:
                yield response
        finally:
            reading.cancel()
            self._renewals.alight(passenger)
            name = f"{self._leader.name}/{hello.rank}"
            self._leader.leave(hello.rank, f"the supervisor of {name} is gone (its stream ended)", member)

    async def DrainGroup(  # noqa: N802 - named by the proto
        self,
        request: group_service_pb2.DrainGroupRequest,
        _context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> group_service_pb2.DrainGroupResponse:
        """See group_service.proto."""
        if request.group != self._leader.name:
            raise Aborted("WRONG_GROUP", f"{self._leader.name!r} serves here now, not {request.group!r}")
        self._leader.on_leave("an operator asked for it")
        return group_service_pb2.DrainGroupResponse(budget_s=self._drain_budget_s)

    async def _read(
        self,
        requests: AsyncIterator[group_service_pb2.JoinGroupRequest],
        rank: int,
        member: Member,
        passenger: Passenger,
    ) -> None:
        try:
            async for request in requests:
                if request.HasField("event"):
                    self._leader.on_event(rank, request.event, member)
                elif request.HasField("lost"):
                    self._leader.lose(rank, request.lost.reason, member)
                elif request.HasField("leaving"):
                    self._leader.on_leave(f"rank {rank} was told to end")
                elif request.HasField("renewal"):
                    passenger.answer(request.renewal)
        finally:
            passenger.outgoing.put_nowait(None)

    def _check(self, hello: group_service_pb2.FollowerHello) -> None:
        leader = self._leader
        wrong = {
            "group": hello.group != leader.name,
            "group_size": hello.group_size != leader.size,
            "rank": not 0 < hello.rank < leader.size,
        }
        if any(wrong.values()):
            why = (
                f"rank {hello.rank} of {hello.group!r} ({hello.group_size} ranks) has no place in "
                f"{leader.name!r} ({leader.size} ranks): check --group, --rank and --group-size"
            )
            fields = [FieldViolation(f"hello.{name}", why) for name, is_wrong in wrong.items() if is_wrong]
            raise InvalidArgument("WRONG_GROUP", why, violations=fields)
        if hello.tensor_ranks != self._tensor_ranks:
            raise InvalidArgument.of_field(
                "hello.tensor_ranks",
                f"rank {hello.rank} of {hello.group!r} splits layers {hello.tensor_ranks} ways, rank 0 "
                f"{self._tensor_ranks}: check --tp",
                "WRONG_MESH",
            )
        if hello.model_hash != self._model_hash:
            raise FailedPrecondition(
                "MODEL_HASH_MISMATCH",
                f"rank {hello.rank} of {hello.group!r} serves another model than rank 0: check --model",
            )
