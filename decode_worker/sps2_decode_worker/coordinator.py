"""The leader of a decode group: rows and plans, and what the ranks report of them.

Runs in rank 0's supervisor, on its event loop.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import structlog

from sps2.internal.v1 import decode_service_pb2, engine_pb2
from sps2.v1 import cluster_pb2, generation_pb2
from sps2_decode_worker import resize_requests
from sps2_decode_worker.admitting import Line, check_group, check_request
from sps2_decode_worker.attempts import ChoiceToken, LiveAttempt
from sps2_decode_worker.control import ControlTime
from sps2_decode_worker.messages import BLOCK_TOKENS, FormedGroup, plan_message, reserve_message
from sps2_decode_worker.metrics import LeaderMetrics
from sps2_decode_worker.move_messages import blocks_per_step
from sps2_decode_worker.recording import ShardRecords
from sps2_decode_worker.scheduler import DecodeScheduler, Plan
from sps2_decode_worker.spans import DecodeSpans
from sps2_decode_worker.tenants import RowState
from sps2_engine.mesh import Mesh
from sps2_layout.placement import num_held
from sps2_service.directory_client import DirectoryClient
from sps2_service.errors import PREEMPTED, InvalidArgument, ServiceError, Unavailable
from sps2_service.ranks.failures import attempt_failure, group_draining
from sps2_service.ranks.group import GroupLeader, GroupState
from sps2_service.tracing import Tracing

RESERVE_TIMEOUT_S = 30.0
"""Longest wait for the ranks to take a reservation up (a step may be computing)."""
RECEIVE_TIMEOUT_S = 60.0
"""Longest wait, from the first token on, for the rest of a prompt's KV."""
PREEMPTED_RETRY_S = 0.25
"""What a preempted request is told to wait: about as long as rows take to end or to be preempted in turn."""

log = structlog.get_logger(__name__)


class DecodeCoordinator:
    """Implements `sps2_service.ranks.group.Coordinator` for decode."""

    def __init__(
        self,
        directory: DirectoryClient,
        model_hash: str,
        min_holder_tokens: int,
        *,
        tp: int = 1,
        debug_invariants: bool = False,
        metrics: LeaderMetrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """Leads ranks of which `tp` together stand where the scheduler has one rank: its ranks are sequence indices.

        With `debug_invariants` every plan tells the ranks how many blocks they must have in use after it. `tracing`
        takes spans of the ranks.
        """
        self._records = ShardRecords(directory)
        self._model_hash = model_hash
        self._min_holder_tokens = min_holder_tokens
        self._tp = tp
        self._debug_invariants = debug_invariants
        self._metrics = metrics or LeaderMetrics()
        self._control = ControlTime(time.thread_time)
        self._spans = DecodeSpans(tracing)
        self._leader: GroupLeader | None = None
        self._ranks: list[engine_pb2.EngineLoaded] = []
        self._scheduler = DecodeScheduler((), BLOCK_TOKENS, min_holder_tokens)
        self._attempts: set[LiveAttempt] = set()
        self._rows: dict[int, LiveAttempt] = {}
        """The attempt of each row that has not ended."""
        self._reported: dict[int, int] = {}
        """Ranks that have reported each step under way, by its sequence."""
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def attach(self, leader: GroupLeader) -> None:
        """Names the group; before anything else."""
        self._leader = leader
        self._line = Line(leader.name)

    @property
    def _group(self) -> GroupLeader:
        assert self._leader is not None, "attach comes first"
        return self._leader

    @property
    def _mesh(self) -> Mesh:
        return Mesh.of(self._group.size, self._tp)

    @property
    def _formed(self) -> FormedGroup:
        return FormedGroup(self._group.name, self._group.epoch, self._mesh, self._ranks)

    def fill_load(self, load: cluster_pb2.WorkerLoad) -> None:
        """Adds what waits for its KV and what decodes."""
        load.num_requests_running = self._scheduler.num_rows(RowState.ACTIVE)
        load.num_requests_waiting = self._scheduler.num_rows(RowState.RESERVED)
        load.num_resizes = self._scheduler.num_resizes
        load.num_blocks_moved = self._scheduler.num_blocks_moved
        load.control_share = self._control.share

    async def drain(self) -> None:
        """Takes no more attempts and waits until the last one ends."""
        self._draining = True
        await self._idle.wait()

    def hand_back(self) -> int:
        """Ends every attempt: their routers have them go on elsewhere. Returns how many there were."""
        count = len(self._attempts)
        self.on_broken(group_draining(self._group.name))
        return count

    # --- one attempt -----------------------------------------------------------------------------------------

    async def reserve(self, request: decode_service_pb2.ReserveKv) -> LiveAttempt:
        """Gives an attempt room on every rank of its placement; `release` it whatever happens.

        Raises:
            ServiceError: no room (now, or ever), or the group is not ready.
        """
        live = self._place(request)
        try:
            reserving = self._formed.ranks_at(live.row.tenant.places.holders)
            await self._wait(live, lambda: live.reserved >= reserving, RESERVE_TIMEOUT_S, "RESERVE")
        except BaseException:
            self.release(live)
            raise
        return live

    async def commit(self, live: LiveAttempt, start: decode_service_pb2.StartDecode) -> None:
        """Waits until every holder has verified its part of the KV, then lets the rows decode.

        Raises:
            ServiceError: the KV did not come in time, or the group broke.
        """
        first_tokens = [start.first_token_id, *start.more_first_token_ids]
        if len(first_tokens) != len(live.rows):
            raise InvalidArgument.of_field(
                "start", f"{len(first_tokens)} first tokens for {len(live.rows)} choices"
            )
        await self._wait(live, lambda: live.received >= live.holders, RECEIVE_TIMEOUT_S, "KV_NOT_DELIVERED")
        for row, token_id in zip(live.rows, first_tokens, strict=True):
            live.first_token_ids[row.row_id] = token_id
            self._scheduler.admit(row.row_id)
        self._spans.begin(live)
        log.info("decode starts", **request_fields(live.request), home=live.row.home)
        self._pump()
        # Only now: a row that leaves must not take the end of the prompt with it before the others have copied it.
        for index in start.finished_choices:
            self.stop(live, index)
        self._records.keep(self._formed, live)

    async def tokens(self, live: LiveAttempt) -> AsyncIterator[ChoiceToken]:
        """The choices' tokens after the first, each to the one with a finish reason or to its stop.

        Raises:
            ServiceError: a row failed, or the group broke.
        """
        while not live.tokens.empty() or self._rows.keys() & live.choices.keys():
            item = await live.tokens.get()
            if isinstance(item, ServiceError):
                raise item
            if item is not None:
                yield item

    def stop(self, live: LiveAttempt, choice_index: int) -> None:
        """Ends one choice; again is no news. An attempt that has no such choice fails."""
        if not 0 <= choice_index < len(live.rows):
            error = InvalidArgument.of_field("choice_index", f"is {choice_index} of {len(live.rows)} choices")
            self._fail(live, error)
            return
        row_id = live.rows[choice_index].row_id
        if self._rows.pop(row_id, None) is not None:
            live.tokens.put_nowait(None)
            self._scheduler.release(row_id)
            self._pump()

    def release(self, live: LiveAttempt) -> None:
        """Frees all that the attempt holds; again is no news."""
        if live not in self._attempts:
            return
        self._attempts.remove(live)
        self._spans.end(live, self._mesh)
        for row in live.rows:
            self._rows.pop(row.row_id, None)
            self._scheduler.release(row.row_id)
        self._pump()
        self._records.release(live)
        live.changed.set()
        if not self._attempts:
            self._idle.set()

    async def resize(
        self, request: decode_service_pb2.ResizeAttemptRequest
    ) -> decode_service_pb2.ResizeAttemptResponse:
        """Spreads an attempt that decodes over other ranks, and returns when that is done.

        Raises:
            ServiceError: as decode_service.proto has it.
        """
        live = resize_requests.find(self._attempts, request, self._group, self._mesh.sp)
        begun, moved_before = asyncio.get_running_loop().time(), live.num_blocks_moved
        resize_requests.begin(self._scheduler, live, request, self._group.name)
        await resize_requests.done(live, self._group.name)
        return resize_requests.response(live, self._group.name, begun, live.num_blocks_moved - moved_before)

    # --- the group -------------------------------------------------------------------------------------------

    def on_formed(self, epoch: int, ranks: list[engine_pb2.EngineLoaded]) -> None:
        """See `Coordinator.on_formed`."""
        self._ranks = ranks
        mesh = self._mesh
        blocks = tuple(
            min(ranks[rank].kv_blocks_total for rank in mesh.ranks_at(position))
            for position in range(mesh.sp)
        )
        self._scheduler = DecodeScheduler(
            blocks,
            BLOCK_TOKENS,
            self._min_holder_tokens,
            blocks_per_plan=blocks_per_step(ranks[0], BLOCK_TOKENS),
            num_resizes=self._scheduler.num_resizes,
            num_blocks_moved=self._scheduler.num_blocks_moved,
        )
        self._reported.clear()
        self._control = ControlTime(time.thread_time)

    def on_broken(self, error: Unavailable) -> None:
        """See `Coordinator.on_broken`."""
        for live in list(self._attempts):
            self._fail(live, error)
            self.release(live)

    def on_event(self, rank: int, event: engine_pb2.EngineEvent) -> None:
        """See `Coordinator.on_event`."""
        if event.HasField("step_result"):
            self._spans.step(rank, event.step_result.step_s)
            with self._control.spent():
                is_done = self._on_step(event.step_result)
            if is_done:
                self._control.step(event.step_result.step_s)
                self._metrics.step(event.step_result.step_s)
            self._pump()
        elif event.HasField("rows_reserved"):
            for row_id in event.rows_reserved.rows:
                self._note(row_id, rank, "reserved")
        elif event.HasField("row_received"):
            self._note(event.row_received.row, rank, "received")
        elif event.HasField("attempt_failed"):
            live = self._rows.get(event.attempt_failed.row)
            if live is not None:
                self._fail(live, attempt_failure(event.attempt_failed, self._group.name))

    def _note(self, row_id: int, rank: int, what: str) -> None:
        live = self._rows.get(row_id)
        if live is not None:
            (live.reserved if what == "reserved" else live.received).add(rank)
            live.changed.set()

    def _fail(self, live: LiveAttempt, error: ServiceError) -> None:
        live.error = error
        live.failed.set()
        live.tokens.put_nowait(error)
        live.changed.set()

    def _on_step(self, result: engine_pb2.StepResult) -> bool:
        """Takes a rank's report; whether it is the last one of its step."""
        now, num_wanted = asyncio.get_running_loop().time(), 0
        for token in result.tokens:
            live = self._rows.get(token.row)
            if live is None:
                continue  # a row that has left meanwhile; its last step's token is dropped
            num_wanted += 1
            live.tokens.put_nowait(ChoiceToken(live.choices[token.row], token))
            live.pace.note(result.sequence, now)
            live.changed.set()
            if token.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED:
                del self._rows[token.row]
                self._scheduler.release(token.row)
        if num_wanted:
            self._metrics.drawn(num_wanted)
        reported = self._reported.get(result.sequence, 0) + 1
        self._reported[result.sequence] = reported
        if reported < self._group.size:
            return False
        del self._reported[result.sequence]
        self._scheduler.step_done()
        return True

    def _pump(self) -> None:
        """Sends every plan that is due."""
        with self._control.spent():
            while (
                self._group.state is GroupState.FORMED and (plan := self._scheduler.next_plan()) is not None
            ):
                self._tell_preempted(plan)
                self._note_moves(plan)
                told = plan_message(plan, self._rows, with_blocks_used=self._debug_invariants)
                self._group.broadcast(engine_pb2.EngineCommand(step_plan=told))

    def _tell_preempted(self, plan: Plan) -> None:
        """Their callers learn it; tokens of theirs that are still computed are dropped."""
        attempts = {row_id: live for row_id in plan.preempted if (live := self._rows.pop(row_id, None))}
        for live in dict.fromkeys(attempts.values()):
            log.info("preempted", **request_fields(live.request))
            self._metrics.preempted()
            self._fail(live, preempted(self._group.name))

    def _note_moves(self, plan: Plan) -> None:
        for one in plan.moves:
            live = self._rows[one.rows[0]]
            live.moved_with = plan.sequence
            live.num_blocks_moved += one.num_blocks
            self._records.soon(self._formed, live)

    def _place(self, request: decode_service_pb2.ReserveKv) -> LiveAttempt:
        if self._draining:
            raise group_draining(self._group.name)
        check_group(self._group)
        check_request(request, self._group.name, self._model_hash, self._attempts)
        rows = self._line.room(self._scheduler, request)
        live = LiveAttempt(rows, reserve_message(self._formed, request, rows), request)
        if num_shared := num_held(live.reserve.placement):
            log.info("shares", **request_fields(request), num_tokens=num_shared)
        self._attempts.add(live)
        self._rows.update(dict.fromkeys(live.choices, live))
        self._idle.clear()
        self._pump()
        return live

    async def _wait(
        self, live: LiveAttempt, ready: Callable[[], bool], timeout_s: float, reason: str
    ) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not ready() and live.error is None:
                    live.changed.clear()
                    await live.changed.wait()
        except TimeoutError:
            raise Unavailable(
                reason,
                f"decode group {self._group.name}: ranks {sorted(live.holders - live.received)} were not "
                f"ready within {timeout_s:g} s",
                retry_after=1.0,
                metadata={"component": self._group.name},
            ) from None
        if live.error is not None:  # also of one that failed just as it became ready: its rows are gone
            raise live.error


def preempted(group: str) -> Unavailable:
    """What a call ends with whose blocks an earlier request needs; no failure, and not its last attempt."""
    return Unavailable(
        PREEMPTED,
        f"decode group {group} has given its KV room to an earlier request",
        retry_after=PREEMPTED_RETRY_S,
        metadata={"component": group},
    )


def request_fields(request: decode_service_pb2.ReserveKv) -> dict[str, object]:
    """What a log line about an attempt carries, where no call's own task says it."""
    return {"request_id": request.attempt.request_id, "attempt": request.attempt.number}
