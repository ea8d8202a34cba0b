"""The leader that has another group's cached KV sent to its own ranks, while the prompt keeps its place in line.

    book: room, as for an attempt that computes the beginning
    own ranks: take blocks and let slabs in             FetchPrefix -> PrefixExpected
    holder's leader: its ranks send                     SendPrefix, with a placement
    own ranks: complete, kept                           PrefixFetched
    book: found from now on

Whatever goes wrong, and whenever, the run is evicted here and the prompt computed: a fetch never fails a request.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from sps2.internal.v1 import engine_pb2, placement_pb2, prefill_service_pb2
from sps2_engine.kv_pool import BLOCK_TOKENS
from sps2_engine.kv_transfer.mesh_shards import mesh_shards
from sps2_layout.layout import Span
from sps2_prefill_worker.fetch_costs import FetchCosts
from sps2_prefill_worker.fetch_counts import FetchCounts, FetchResult
from sps2_prefill_worker.holders import Holders
from sps2_prefill_worker.planning import PromptPlanner
from sps2_prefill_worker.prefix_cache import Prompt
from sps2_prefill_worker.reuse import Fetch, PrefixReuse
from sps2_service.errors import ServiceError, Unavailable
from sps2_service.ranks.group import GroupLeader

MAX_HOLDERS = 2
"""That are asked for one prompt: one may have evicted what it was said to hold, or be gone."""

log = structlog.get_logger(__name__)


class FetchEndedError(Exception):
    """This group cannot take what comes, whoever sends it."""

    def __init__(self, result: FetchResult, why: str) -> None:
        super().__init__(why)
        self.result = result


@dataclass
class _Incoming:
    """A run on its way."""

    room: "asyncio.Future[None]"
    """Every rank lets slabs in."""
    complete: "asyncio.Future[None]"
    """Every rank has its part."""
    expected: dict[int, engine_pb2.PrefixExpected] = field(default_factory=dict)
    fetched: set[int] = field(default_factory=set)

    def fail(self, result: FetchResult, why: str) -> None:
        """Ends whatever is waited for."""
        for one in (self.room, self.complete):
            if not one.done():
                one.set_exception(FetchEndedError(result, why))
                one.exception()  # perhaps nobody waits for this one


class PrefixFetcher:
    """All fetches of a leader, on its event loop.

    Args:
        reuse: the group's cache.
        costs: whether a fetch is worth it.
        holders: the way to other groups.
    """

    def __init__(self, reuse: PrefixReuse, costs: FetchCosts, holders: Holders) -> None:
        self._reuse = reuse
        self._costs = costs
        self._holders = holders
        self._incoming: dict[int, _Incoming] = {}
        self.counts = FetchCounts()

    async def fetch(
        self,
        group: GroupLeader,
        planner: PromptPlanner,
        request: prefill_service_pb2.PrefillRequest,
        prompt: Prompt,
    ) -> int:
        """Has the beginning of a prompt sent here where that pays; leaving early gives it up.

        Args:
            group: formed.
            planner: of its epoch.
            request: of the prompt.
            prompt: the same, as the book sees it.

        Returns:
            Bytes fetched; 0: the prompt is computed as if it had no holder elsewhere.
        """
        for source in request.prefix_sources[:MAX_HOLDERS]:
            num_tokens = _usable(source, prompt)
            tokens = Span(min(self._reuse.num_cached(prompt), num_tokens), num_tokens)
            if not tokens or not self._costs.worth(planner, prompt.attention, tokens):
                return 0  # those after it hold less
            result = FetchResult.GIVEN_UP
            try:
                num_bytes = await self._fetch(group, planner, request, prompt, source)
                result = FetchResult.COMPLETE
            except ServiceError as error:  # the holder's: maybe the next one does better
                result = FetchResult.REFUSED
                log.info("prefix does not come", group=source.group, reason=error.reason, why=error.message)
            except FetchEndedError as error:
                result = error.result
                log.warning("prefix is not fetched", group=source.group, why=str(error))
                return 0
            else:
                return num_bytes
            finally:
                self.counts.results[result] += 1
        return 0

    def on_report(self, group: GroupLeader, rank: int, report: engine_pb2.PrefillReport) -> None:
        """A rank tells of a run; of one that was given up meanwhile, to nobody."""
        kind = report.WhichOneof("report")
        if kind == "prefix_expected":
            incoming = self._incoming.get(report.prefix_expected.run)
            if incoming is not None:
                incoming.expected[rank] = report.prefix_expected
                _set_when(incoming.room, len(incoming.expected) == group.size)
        elif kind == "prefix_fetched":
            incoming = self._incoming.get(report.prefix_fetched.run)
            if incoming is not None:
                incoming.fetched.add(rank)
                _set_when(incoming.complete, len(incoming.fetched) == group.size)
        elif kind == "prefix_refused":
            incoming = self._incoming.get(report.prefix_refused.run)
            if incoming is not None:
                why = f"rank {rank} has no room: {report.prefix_refused.reason}"
                incoming.fail(FetchResult.NO_ROOM, why)

    def on_evicted(self, runs: Sequence[int]) -> None:
        """The book gave up runs for the sake of a prompt that begins: of those under way nothing more comes."""
        for run in runs:
            incoming = self._incoming.get(run)
            if incoming is not None:
                incoming.fail(FetchResult.NO_ROOM, "a prompt that begins needs its room")

    def on_broken(self, error: Unavailable) -> None:
        """The epoch is over: book and ranks have forgotten everything."""
        incoming, self._incoming = self._incoming, {}
        for one in incoming.values():
            one.fail(FetchResult.GIVEN_UP, error.message)

    async def _fetch(
        self,
        group: GroupLeader,
        planner: PromptPlanner,
        request: prefill_service_pb2.PrefillRequest,
        prompt: Prompt,
        source: prefill_service_pb2.PrefixSource,
    ) -> int:
        key = request.attempt.request_id, request.attempt.number
        fetch = self._reuse.begin_fetch(key, prompt, _usable(source, prompt))
        if fetch is None:
            raise FetchEndedError(FetchResult.NO_ROOM, "others would have to make room for it")
        loop, timeout_s = asyncio.get_running_loop(), self._costs.timeout_s(planner, fetch.tokens)
        incoming = self._incoming[fetch.run] = _Incoming(loop.create_future(), loop.create_future())
        is_complete = False
        try:
            async with asyncio.timeout(timeout_s):
                self._tell_ranks(group, planner, request.attempt, fetch)
                await incoming.room
                asked = _ask(group, planner, request, fetch, incoming)
                call = self._holders.send_prefix(source.leader_address, asked, timeout_s)
                num_bytes = await _both(asyncio.ensure_future(call), incoming.complete)
            is_complete = True
        except TimeoutError:
            raise FetchEndedError(FetchResult.LATE, f"not there after {timeout_s:.1f} s") from None
        finally:
            if self._incoming.pop(fetch.run, None) is not None:  # else the epoch is over
                self._settle(group, key, is_complete=is_complete)
        log.info(
            "prefix is fetched",
            request_id=key[0],
            group=source.group,
            num_tokens=len(fetch.tokens),
            num_bytes=num_bytes,
        )
        self.counts.num_tokens += len(fetch.tokens)
        self.counts.num_bytes += num_bytes
        return num_bytes

    def _tell_ranks(
        self, group: GroupLeader, planner: PromptPlanner, attempt: placement_pb2.Attempt, fetch: Fetch
    ) -> None:
        for rank in range(group.size):
            span = fetch.spans[planner.mesh.sequence_index(rank)]
            command = engine_pb2.FetchPrefix(attempt=attempt, run=fetch.run, evict=fetch.evicted)
            command.span.begin, command.span.end = span.begin, span.end
            group.send(rank, engine_pb2.EngineCommand(fetch_prefix=command))

    def _settle(self, group: GroupLeader, key: tuple[str, int], *, is_complete: bool) -> None:
        """What has come is found from now on; what has not is free again."""
        evicted = self._reuse.delivered(key) if is_complete else self._reuse.abandon(key)
        if not is_complete:
            self._reuse.forget(key)
        if evicted:
            evict = engine_pb2.EvictPrefixes(runs=evicted)
            group.broadcast(engine_pb2.EngineCommand(evict_prefixes=evict))


def _usable(source: prefill_service_pb2.PrefixSource, prompt: Prompt) -> int:
    """Tokens that it may give: whole blocks, and never the prompt's last token."""
    most = min(len(prompt.keys), (prompt.num_tokens - 1) // BLOCK_TOKENS)
    return min(source.num_tokens // BLOCK_TOKENS, most) * BLOCK_TOKENS


def _ask(
    group: GroupLeader,
    planner: PromptPlanner,
    request: prefill_service_pb2.PrefillRequest,
    fetch: Fetch,
    incoming: _Incoming,
) -> prefill_service_pb2.SendPrefixRequest:
    """What the holder is asked: to place tokens by sequence index and heads by tensor index on these ranks."""
    tokens = {index: (span.begin, span.end) for index, span in enumerate(fetch.spans) if span}
    placement = placement_pb2.Placement(
        group=group.name,
        shards=_fenced(tokens, planner, group.epoch, request.attempt, incoming),
    )
    if fetch.tokens.begin:
        placement.held.add(rank=0, token_begin=0, token_end=fetch.tokens.begin)
    return prefill_service_pb2.SendPrefixRequest(
        attempt=request.attempt,
        attention=request.attention,
        block_hashes=request.block_hashes[: fetch.tokens.end // BLOCK_TOKENS],
        placement=placement,
    )


def _fenced(
    tokens: dict[int, tuple[int, int]],
    planner: PromptPlanner,
    epoch: int,
    attempt: placement_pb2.Attempt,
    incoming: _Incoming,
) -> Sequence[placement_pb2.ShardPlacement]:
    shards = list(mesh_shards(tokens, planner.mesh, planner.model.num_kv_heads))
    for shard in shards:
        expected = incoming.expected[shard.rank]
        shard.transfer_address = expected.transfer_address
        shard.fence.process_incarnation = expected.process_incarnation
        shard.fence.epoch = epoch
        shard.fence.attempt.CopyFrom(attempt)
    return shards


async def _both(call: "asyncio.Future[int]", complete: "asyncio.Future[None]") -> int:
    """What the call returns, once all is there too; the first to fail ends both."""
    try:
        done, _ = await asyncio.wait((call, complete), return_when=asyncio.FIRST_EXCEPTION)
        for one in done:
            one.result()
        return call.result()
    finally:
        call.cancel()


def _set_when(future: "asyncio.Future[None]", reached: bool) -> None:
    if reached and not future.done():
        future.set_result(None)
