"""The leader of a prefill group: starts prompts on all ranks and gathers what they report.

Runs in rank 0's supervisor, on its event loop.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import structlog

from sps2.internal.v1 import engine_pb2, prefill_service_pb2
from sps2.v1 import cluster_pb2
from sps2_engine.attention.cost_model import Choice
from sps2_layout.block_hash import BLOCK_TOKENS
from sps2_prefill_worker.admission import attention_of, check_placement, check_room
from sps2_prefill_worker.fetch_costs import BY_COST, FetchCosts
from sps2_prefill_worker.fetch_counts import FetchCounts
from sps2_prefill_worker.fetching import PrefixFetcher
from sps2_prefill_worker.holders import PLAINTEXT_HOLDERS, Holders
from sps2_prefill_worker.lending import PrefixLender
from sps2_prefill_worker.planning import PromptPlanner, Sharing
from sps2_prefill_worker.prefix_cache import Prompt
from sps2_prefill_worker.prefix_index import NO_INDEX, PrefixIndex, fill_cached
from sps2_prefill_worker.reuse import PrefixReuse, Wish
from sps2_prefill_worker.scheduler import AttemptKey, Job, PrefillScheduler, Start
from sps2_prefill_worker.spans import take_rank_spans
from sps2_service.errors import Aborted, InvalidArgument, ServiceError, Unavailable
from sps2_service.ranks.failures import attempt_failure, group_draining
from sps2_service.ranks.group import GroupLeader, GroupState
from sps2_service.trace_context import Place, current_place
from sps2_service.tracing import Tracing

MAX_WAITING = 1024

log = structlog.get_logger(__name__)

Event = prefill_service_pb2.PrefillResponse | ServiceError


@dataclass
class Attempt:
    """One attempt's prefill, as the leader sees it."""

    request: prefill_service_pb2.PrefillRequest
    prompt: Prompt
    """What is looked for in the cache."""
    wish: Wish
    """How its prompt is computed, by what is cached."""
    number: int
    """Its place in line, which it keeps whatever becomes of what is cached."""
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    fetched_bytes: int = 0
    """Of its beginning, that another group had cached."""
    dispatched: bool = False
    """Whether the ranks know of it."""
    speaker: int = 0
    """Rank whose word on its beginning and progress counts."""
    cancelling: bool = False
    num_tokens_on: list[int] = field(default_factory=list)
    """By rank, once dispatched."""
    delivered: dict[int, engine_pb2.PrefillReport] = field(default_factory=dict)
    """By rank, what it said when all of its KV was there."""
    cancelled: set[int] = field(default_factory=set)
    place: Place | None = field(default_factory=current_place.get)
    """The router's span, for those of the ranks."""

    @property
    def key(self) -> AttemptKey:
        """The attempt as a dictionary key."""
        return self.request.attempt.request_id, self.request.attempt.number


class PrefillCoordinator:
    """Implements `sps2_service.ranks.group.Coordinator` for prefill.

    Args:
        exchange: the schedule that serves prompts, or "auto".
        threads: of each rank, on a CPU.
        tp: tensor ranks; divides the group.
        sharing: which prompts all ranks share.
        index: is told what the group has cached.
        fetch_costs: what is fetched of that which other groups have cached.
        holders: the way to them.
        tracing: takes spans of the ranks.
    """

    def __init__(
        self,
        exchange: Choice = "auto",
        threads: int = 1,
        tp: int = 1,
        sharing: Sharing = "auto",
        index: PrefixIndex = NO_INDEX,
        fetch_costs: FetchCosts = BY_COST,
        holders: Holders = PLAINTEXT_HOLDERS,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self._reuse = PrefixReuse(index)
        self._fetch_costs = fetch_costs
        self._fetcher = PrefixFetcher(self._reuse, fetch_costs, holders)
        self._lender = PrefixLender(self._reuse)
        self._exchange: Choice = exchange
        self._threads = threads
        self._tp = tp
        self._sharing: Sharing = sharing
        self._planner: PromptPlanner | None = None
        self._scheduler = PrefillScheduler()
        self._attempts: dict[AttemptKey, Attempt] = {}
        self._leader: GroupLeader | None = None
        self._slice_flops = 0
        self._short_tokens = 0
        self._fetched_token_cost = 0.0
        self._num_started = 0
        self._numbers = itertools.count()
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
    def _of_group(self) -> PromptPlanner:
        assert self._planner is not None, "a group that is formed has told its shape"
        return self._planner

    @property
    def fetches(self) -> FetchCounts:
        """What was fetched from other groups."""
        return self._fetcher.counts

    def fill_load(self, load: cluster_pb2.WorkerLoad) -> None:
        """Adds what waits and runs."""
        load.num_requests_waiting = len(self._scheduler.waiting)
        load.num_requests_running = len(self._attempts) - len(self._scheduler.waiting)
        load.queued_tokens = self._scheduler.num_tokens
        load.short_prompt_tokens = self._short_tokens
        load.fetched_token_cost = self._fetched_token_cost
        load.prompt_tokens, load.cached_tokens = self._reuse.num_prompt_tokens, self._reuse.num_cached_tokens

    async def prefill(
        self, request: prefill_service_pb2.PrefillRequest
    ) -> AsyncGenerator[prefill_service_pb2.PrefillResponse, None]:
        """Serves one attempt; leaving the iterator early cancels it on every rank.

        Raises:
            ServiceError: it was refused, or has failed.
        """
        attempt = self._admit(request)
        try:
            await self._stand_in_line(attempt)
            while True:
                event = await attempt.events.get()
                if isinstance(event, ServiceError):
                    raise event
                yield event
                if event.HasField("delivered"):
                    return
        finally:
            self._end(attempt)

    async def send_prefix(self, request: prefill_service_pb2.SendPrefixRequest) -> int:
        """Sends cached KV to another group, also while this one drains; the bytes sent.

        Raises:
            ServiceError: it was refused, or has failed.
        """
        self._check_group()
        if (request.attempt.request_id, request.attempt.number) in self._attempts:
            raise Aborted("DUPLICATE_ATTEMPT", "this group is the one that computes the prompt")
        num_tokens = len(request.block_hashes) * BLOCK_TOKENS
        check_placement(request.placement, num_tokens, self._of_group)
        return await self._lender.send(self._group, request)

    async def drain(self) -> None:
        """Takes no more prompts and waits until the last one's KV is delivered, and what others fetch is sent."""
        self._draining = True
        await self._idle.wait()
        await self._lender.idle.wait()

    def hand_back(self) -> int:
        """Ends every attempt: their routers have them prefilled elsewhere. Returns how many there were."""
        count = len(self._attempts)
        for attempt in self._attempts.values():
            self._cancel(attempt)
        self.on_broken(group_draining(self._group.name))
        return count

    def on_formed(self, epoch: int, ranks: list[engine_pb2.EngineLoaded]) -> None:
        """See `Coordinator.on_formed`."""
        planner = PromptPlanner.of(ranks, self._exchange, self._threads, self._tp, self._sharing)
        costs = planner.costs
        self._planner, self._num_started = planner, 0
        self._slice_flops = costs.slice_flops
        self._short_tokens = planner.short_tokens
        self._fetched_token_cost = self._fetch_costs.token_cost(planner)
        self._scheduler = PrefillScheduler(planner.mesh.sp, costs.short_flops, costs.kv_blocks)
        self._reuse.begin_epoch(planner)

    def on_broken(self, error: Unavailable) -> None:
        """See `Coordinator.on_broken`."""
        self._scheduler.clear()
        self._reuse.end_epoch()
        self._fetcher.on_broken(error)
        self._lender.on_broken(error)
        for attempt in list(self._attempts.values()):
            attempt.events.put_nowait(error)
            self._forget(attempt)

    def on_event(self, rank: int, event: engine_pb2.EngineEvent) -> None:
        """See `Coordinator.on_event`."""
        if event.HasField("attempt_failed"):
            self._on_failed(event.attempt_failed)
        elif event.HasField("prefill"):
            key = (event.prefill.attempt.request_id, event.prefill.attempt.number)
            attempt = self._attempts.get(key)
            if attempt is None:
                self._lender.on_report(self._group, rank, event.prefill)
            elif attempt.dispatched:
                self._on_report(rank, attempt, event.prefill)
            else:
                self._fetcher.on_report(self._group, rank, event.prefill)

    def _admit(self, request: prefill_service_pb2.PrefillRequest) -> Attempt:
        attempt = self._check(request)
        if attempt.key in self._attempts:
            raise Aborted("DUPLICATE_ATTEMPT", f"attempt {attempt.key} is being prefilled already")
        self._attempts[attempt.key] = attempt
        self._idle.clear()
        return attempt

    async def _stand_in_line(self, attempt: Attempt) -> None:
        """With what is cached of it, here or, where that pays, in another group, which sends it meanwhile."""
        request, prompt = attempt.request, attempt.prompt
        self._submit(attempt, is_fetching=True)
        attempt.fetched_bytes = await self._fetcher.fetch(self._group, self._of_group, request, prompt)
        if self._attempts.get(attempt.key) is not attempt:
            return  # the epoch has ended meanwhile; its events say so
        if attempt.fetched_bytes:
            attempt.wish = self._reuse.plan(prompt)
        self._scheduler.withdraw(attempt.key)
        self._submit(attempt)
        self._start_waiting()

    def _submit(self, attempt: Attempt, *, is_fetching: bool = False) -> None:
        """Puts it in line as what it is, with what is cached of it."""
        num_tokens, wish = attempt.prompt.num_tokens, attempt.wish
        planned = wish.planned
        self._scheduler.submit(
            Job(
                attempt.key,
                num_tokens,
                planned.interlude_flops,
                planned.alone,
                wish.num_blocks,
                attempt.number,
                is_fetching,
            )
        )

    def _check(self, request: prefill_service_pb2.PrefillRequest) -> Attempt:
        group = self._group
        if self._draining:
            raise group_draining(group.name)
        self._check_group()
        if len(self._scheduler.waiting) >= MAX_WAITING:
            raise Unavailable("QUEUE_FULL", f"prefill group {group.name} has a full queue", retry_after=1.0)
        if not request.token_ids:
            raise InvalidArgument.of_field("token_ids", "a prompt has at least one token")
        planner = self._of_group
        check_placement(request.placement, len(request.token_ids), planner)
        attention = attention_of(request)
        check_room(request, attention, planner, group.name)
        keys = tuple(request.block_hashes) if planner.can_cache else ()
        prompt = Prompt(attention, keys, len(request.token_ids))
        return Attempt(request, prompt, self._reuse.plan(prompt), next(self._numbers))

    def _check_group(self) -> None:
        group = self._group
        if group.state is not GroupState.FORMED:
            why = f"prefill group {group.name} is not ready ({group.missing})"
            raise Unavailable("GROUP_NOT_READY", why, retry_after=1.0)
        group.check_lease()

    def _start_waiting(self) -> None:
        while (start := self._scheduler.start_next()) is not None:
            self._start(start)

    def _start(self, start: Start) -> None:
        job = start.job
        attempt = self._attempts[job.key]
        taken = self._reuse.begin(attempt.key, attempt.prompt, attempt.wish, start.alone_on)
        if taken is None:  # what was cached of it is gone: it has more to do, and keeps its place in line
            self._scheduler.over(job.key)
            attempt.wish = self._reuse.plan(attempt.prompt)
            self._submit(attempt)
            return
        self._fetcher.on_evicted(taken.evicted)
        attempt.wish = taken.wish
        attempt.dispatched, attempt.speaker = True, (start.alone_on or 0) * self._tp
        self._num_started += 1
        request, planned = attempt.request, taken.wish.planned
        log.info(
            "prefill starts",
            request_id=request.attempt.request_id,
            attempt=request.attempt.number,
            num_tokens=job.num_tokens,
            num_cached=planned.num_cached,
            exchange=planned.exchange,
            num_ranks=planned.plan.num_ranks,
            alone_on=start.alone_on,
            short=job.is_short,
            tp=self._tp,
        )
        for rank in range(self._group.size):
            run = engine_pb2.RunPrefill(
                attempt=request.attempt,
                num_prompt_tokens=job.num_tokens,
                placement=request.placement,
                choice=request.choice,
                attention=request.attention,
                slice_flops=self._slice_flops,
                number=self._num_started,
            )
            planned.assign(rank, run, request.token_ids, start.alone_on)
            attempt.num_tokens_on.append(len(run.token_ids))
            fill_cached(run, taken.admitted, taken.evicted)
            self._group.send(rank, engine_pb2.EngineCommand(run_prefill=run))

    def _evict(self, runs: Sequence[int]) -> None:
        """Tells the ranks what goes without another prompt's wanting its room."""
        if runs:
            evict = engine_pb2.EvictPrefixes(runs=runs)
            self._group.broadcast(engine_pb2.EngineCommand(evict_prefixes=evict))

    def _on_report(self, rank: int, attempt: Attempt, report: engine_pb2.PrefillReport) -> None:
        kind = report.WhichOneof("report")
        if kind == "started" and rank == attempt.speaker:
            attempt.events.put_nowait(prefill_service_pb2.PrefillResponse(started=report.started))
        elif kind == "progress" and rank == attempt.speaker:
            attempt.events.put_nowait(prefill_service_pb2.PrefillResponse(progress=report.progress))
        elif kind == "first_token":
            report.first_token.cached_tokens = attempt.wish.match.num_tokens
            attempt.events.put_nowait(prefill_service_pb2.PrefillResponse(first_token=report.first_token))
            self._computed(attempt)
        elif kind == "delivered":
            attempt.delivered[rank] = report
            if len(attempt.delivered) == self._group.size:
                self._trace(attempt)
                attempt.events.put_nowait(prefill_service_pb2.PrefillResponse(delivered=_sum_up(attempt)))
                self._evict(self._reuse.delivered(attempt.key))
                self._forget(attempt)
        elif kind == "cancelled":
            attempt.cancelled.add(rank)
            if len(attempt.cancelled) == self._group.size:
                self._forget(attempt)

    def _trace(self, attempt: Attempt) -> None:
        if self._tracing is not None and attempt.place is not None:
            take_rank_spans(
                self._tracing,
                attempt.place,
                self._group.name,
                attempt.request.attempt,
                attempt.num_tokens_on,
                attempt.delivered,
            )

    def _on_failed(self, failed: engine_pb2.AttemptFailed) -> None:
        attempt = self._attempts.get((failed.attempt.request_id, failed.attempt.number))
        if attempt is None:
            self._lender.on_failed(self._group, failed)
        else:
            attempt.events.put_nowait(attempt_failure(failed, self._group.name))
            self._cancel(attempt)

    def _end(self, attempt: Attempt) -> None:
        """The call is over: what is still going on for it is cancelled."""
        if self._attempts.get(attempt.key) is not attempt:
            return
        if self._scheduler.withdraw(attempt.key) or not attempt.dispatched:
            self._forget(attempt)
        else:
            self._cancel(attempt)

    def _cancel(self, attempt: Attempt) -> None:
        if not attempt.cancelling and attempt.dispatched:
            attempt.cancelling = True
            cancel = engine_pb2.CancelPrefill(attempt=attempt.request.attempt)
            self._group.broadcast(engine_pb2.EngineCommand(cancel_prefill=cancel))
            self._evict(self._reuse.abandon(attempt.key))

    def _computed(self, attempt: Attempt) -> None:
        self._scheduler.computed(attempt.key)
        self._start_waiting()

    def _forget(self, attempt: Attempt) -> None:
        self._attempts.pop(attempt.key, None)
        self._reuse.forget(attempt.key)
        if not self._attempts:
            self._idle.set()
        self._scheduler.over(attempt.key)
        self._start_waiting()


def _sum_up(attempt: Attempt) -> prefill_service_pb2.PrefillDelivered:
    parts = [report.delivered for report in attempt.delivered.values()]
    return prefill_service_pb2.PrefillDelivered(
        collective_bytes=sum(part.collective_bytes for part in parts),
        kv_transfer_bytes=sum(part.kv_transfer_bytes for part in parts),
        exposed_s=max(part.exposed_s for part in parts),
        fetched_bytes=attempt.fetched_bytes,
    )
