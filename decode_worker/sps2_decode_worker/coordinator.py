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
from sps2_decode_worker.attempts import ChoiceToken, LiveAttempt
from sps2_decode_worker.control import ControlTime
from sps2_decode_worker.messages import BLOCK_TOKENS, FormedGroup, reserve_message, shard_record
from sps2_decode_worker.metrics import LeaderMetrics
from sps2_decode_worker.move_messages import blocks_per_step, move_message
from sps2_decode_worker.placing import Asked, max_new_tokens
from sps2_decode_worker.scheduler import DecodeScheduler, NeverFitsError, NoRoomError, Plan
from sps2_decode_worker.sharing import NO_PREFIX, Prefix
from sps2_decode_worker.spans import DecodeSpans
from sps2_decode_worker.tenants import Row, RowState
from sps2_engine.mesh import Mesh
from sps2_layout.placement import num_held
from sps2_layout.wire import unpack_attention
from sps2_service.directory_client import DirectoryClient
from sps2_service.errors import (
    PREEMPTED,
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    ServiceError,
    Unavailable,
)
from sps2_service.ranks.failures import attempt_failure, group_draining
from sps2_service.ranks.group import GroupLeader, GroupState
from sps2_service.tracing import Tracing
from sps2_service.turns import turn_us

RESERVE_TIMEOUT_S = 30.0
"""Longest wait for the ranks to take a reservation up (a step may be computing)."""
RECORD_LEASE_S = 60.0
"""How long the directory keeps a record of shards that is not renewed."""
RECORD_SOON_S = 0.5
"""How long after blocks have moved the directory is told, at most."""
RECEIVE_TIMEOUT_S = 60.0
"""Longest wait, from the first token on, for the rest of a prompt's KV."""
LINE_LEASE_S = 5.0
"""How long a request that found no room keeps its place in line without asking again: several of its pauses."""
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
        self._directory = directory
        self._model_hash = model_hash
        self._min_holder_tokens = min_holder_tokens
        self._tp = tp
        self._debug_invariants = debug_invariants
        self._metrics = metrics or LeaderMetrics()
        self._control = ControlTime(time.thread_time)
        self._spans = DecodeSpans(tracing)
        self._line_leases: dict[str, asyncio.TimerHandle] = {}
        """End the places in line of requests that do not come back."""
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
        self._record(live)

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
        if live.record_timer is not None:
            live.record_timer.cancel()
            self._directory.release(live.request.attempt)
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
                self._group.broadcast(engine_pb2.EngineCommand(step_plan=self._message(plan)))

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
            self._record_soon(live)

    def _message(self, plan: Plan) -> engine_pb2.StepPlan:
        # A row may be released before the plan that was to reserve it went out; both then go in one plan, in
        # which the release comes first and names a row that no rank knows yet: neither is sent.
        # A message reserves the rows of all choices and stands under the first one's.
        reserve = [
            live for row_id in plan.reserve if (live := self._rows.get(row_id)) and live.row.row_id == row_id
        ]
        release = [row_id for row_id in plan.release if row_id not in plan.reserve]
        return engine_pb2.StepPlan(
            sequence=plan.sequence,
            reserve=[live.reserve for live in reserve],
            admit=[
                engine_pb2.AdmitRow(row=row_id, first_token_id=self._rows[row_id].first_token_ids[row_id])
                for row_id in plan.admit
                if row_id in self._rows
            ],
            release_rows=release,
            run=plan.run,
            moves=[move_message(one) for one in plan.moves],
            blocks_used=plan.blocks_used if self._debug_invariants else (),
        )

    def _place(self, request: decode_service_pb2.ReserveKv) -> LiveAttempt:
        self._check(request)
        asked = Asked(
            request.num_prompt_tokens,
            max_new_tokens(request.choice),
            max(1, request.choice.num_choices),
            _prefix(request),
        )
        rows = self._give_room(asked, request)
        live = LiveAttempt(rows, reserve_message(self._formed, request, rows), request)
        if num_shared := num_held(live.reserve.placement):
            log.info("shares", **request_fields(request), num_tokens=num_shared)
        self._attempts.add(live)
        self._rows.update(dict.fromkeys(live.choices, live))
        self._idle.clear()
        self._pump()
        return live

    def _give_room(self, asked: Asked, request: decode_service_pb2.ReserveKv) -> list[Row]:
        """Rows of an attempt, or a place in line, which it keeps as long as it asks again.

        Raises:
            ServiceError: there is no room now, or never.
        """
        name, group = _name_in_line(request), self._group.name
        if (lease := self._line_leases.pop(name, None)) is not None:
            lease.cancel()
        try:
            return self._scheduler.reserve(asked, turn_us(request.asked_at_us, request.priority), name)
        except NeverFitsError:
            raise FailedPrecondition(
                "REQUEST_TOO_LARGE",
                f"{asked.num_tokens} prompt tokens and {asked.num_choices} times {asked.max_new_tokens} more "
                f"need more KV than decode group {group} has: raise --kv-tokens or use more ranks",
            ) from None
        except NoRoomError:
            self._line_leases[name] = asyncio.get_running_loop().call_later(
                LINE_LEASE_S, self._leave_line, name
            )
            raise Unavailable(
                "NO_KV_ROOM", f"decode group {group} has no KV room now", retry_after=0.5
            ) from None

    def _leave_line(self, name: str) -> None:
        del self._line_leases[name]
        self._scheduler.leave_line(name)

    def _check(self, request: decode_service_pb2.ReserveKv) -> None:
        group = self._group
        if self._draining:
            raise group_draining(group.name)
        if group.state is not GroupState.FORMED:
            why = f"decode group {group.name} is not ready ({group.missing})"
            raise Unavailable("GROUP_NOT_READY", why, retry_after=1.0)
        group.check_lease()
        if request.model_hash != self._model_hash:
            raise FailedPrecondition(
                "MODEL_HASH_MISMATCH", f"decode group {group.name} serves another model than prefill"
            )
        if any(live.request.attempt == request.attempt for live in self._attempts):
            raise Aborted(
                "DUPLICATE_ATTEMPT",
                f"attempt {request.attempt.number} of request {request.attempt.request_id!r} is served already: "
                "two live requests may not share an id",
            )

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

    def _record_soon(self, live: LiveAttempt) -> None:
        """Of what moves in many steps the directory is told once."""
        loop = asyncio.get_running_loop()
        if live.record_timer is not None and live.record_timer.when() > loop.time() + RECORD_SOON_S:
            live.record_timer.cancel()
            live.record_timer = loop.call_later(RECORD_SOON_S, self._record, live)

    def _record(self, live: LiveAttempt) -> None:
        """Tells the directory where the KV lies, in the background, for as long as the row lives."""
        record = shard_record(self._formed, live)
        self._directory.record_shards(record, RECORD_LEASE_S)
        loop = asyncio.get_running_loop()
        live.record_timer = loop.call_later(RECORD_LEASE_S / 3, self._record, live)


def _prefix(request: decode_service_pb2.ReserveKv) -> Prefix:
    """By what its blocks are compared with those of others.

    Raises:
        InvalidArgument: it names blocks that it does not have, or no mask.
    """
    if len(request.block_hashes) > request.num_prompt_tokens // BLOCK_TOKENS:
        raise InvalidArgument.of_field("block_hashes", "there is one for each full block of the prompt")
    if not request.block_hashes:
        return NO_PREFIX
    try:
        attention = unpack_attention(request.attention)
    except ValueError as error:
        raise InvalidArgument.of_field("attention", str(error)) from None
    # Dense KV depends on nothing but the tokens before it; under CSA, on the whole layout.
    return Prefix(attention if attention.layout else None, tuple(request.block_hashes))


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


def _name_in_line(request: decode_service_pb2.ReserveKv) -> str:
    """The same for all attempts at a request, or at one of its choices that goes on by itself."""
    return f"{request.attempt.request_id}/{request.choice.sampling.first_choice}"
