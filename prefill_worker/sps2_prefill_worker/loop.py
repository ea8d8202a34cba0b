"""The prefill engine: computes its slice of a prompt, and hands each layer's KV to the publisher as it comes.

Knows nothing of scheduling: the leader's supervisor sends one prompt after another. At the ends of a long prompt's
slices all ranks agree to give it up, or to compute short ones first that have come meanwhile.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sps2.internal.v1 import engine_pb2, placement_pb2, prefill_service_pb2
from sps2_engine.attention.continued import CachedKeys, ContinuedSchedule
from sps2_engine.attention.cost_model import AttentionShape, make_plan
from sps2_engine.attention.csa_schedule import KIND, CsaSchedule
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.choice import ChoiceState, Drawn, draw_tokens, num_choices
from sps2_engine.collectives import Communicator, LeadingRanks, SoloCommunicator
from sps2_engine.kv_pool import slot_runs
from sps2_engine.kv_transfer.receiver import KvReceiver
from sps2_engine.kv_transfer.rows import TensorSource, cut_rows, num_before, tensor_source
from sps2_engine.kv_transfer.sender import KvSender
from sps2_engine.layers.rows import BYTE_FLOPS, RowWalk, row_chunks
from sps2_engine.layers.tensor_ranks import KIND as SUM_KIND
from sps2_engine.layers.tensor_ranks import TensorRanks, WithoutPeers
from sps2_engine.models import Attend
from sps2_engine.rank_groups import RankGroups
from sps2_engine.runtime.link import SupervisorLink
from sps2_engine.runtime.loading import load_model
from sps2_engine.runtime.options import EngineOptions
from sps2_engine.sampler import NonFiniteLogitsError
from sps2_engine.slices import Slicer
from sps2_kernels.segment_attention import warm_up_attention
from sps2_layout.layout import Span, exact_layout
from sps2_layout.placement import num_held
from sps2_prefill_worker.arrivals import Arrivals
from sps2_prefill_worker.interludes import FairShare, ToldRuns, short_work
from sps2_prefill_worker.planning import follow, num_cached_of, spans_of
from sps2_prefill_worker.publish import AttemptKey, Delivery, Publisher, attempt_key, request_fields

_log = logging.getLogger(__name__)

WARM_UP_TOKENS = 8
CPU_SLICE_FLOPS = 4_000_000_000
"""For each thread: 40 to 70 ms at the 60 to 110 GFLOP/s that a core does; what is not counted (merges, copies) and
ranks that share a core may take as much again."""
CPU_BF16_SLICE_FLOPS = 8_000_000_000
"""The same where attention does about twice as much, and products four times."""
CUDA_SLICE_FLOPS = 20_000_000_000_000
"""100 ms at a quarter of an H200's rate."""

GO_ON, GIVE_UP = 0, -1
"""What ranks agree upon at the end of a slice; a positive number is that of the last short prompt to compute first."""


class AttemptCancelledError(Exception):
    """All ranks have agreed to give the running attempt up."""


def slice_flops(device_type: str, dtype: torch.dtype, num_threads: int) -> int:
    """FLOPs of one slice of a prefill: at most 250 ms, also where two ranks share a core."""
    if device_type == "cuda":
        return CUDA_SLICE_FLOPS
    return (CPU_BF16_SLICE_FLOPS if dtype == torch.bfloat16 else CPU_SLICE_FLOPS) * num_threads


class PrefillRole:
    """Implements `sps2_engine.runtime.host.Role`."""

    exchanges_in_steps = False

    def __init__(
        self, options: EngineOptions, device: torch.device, dtype: torch.dtype, link: SupervisorLink
    ) -> None:
        self._options = options
        self._device = device
        self._dtype = dtype
        self._link = link
        self._groups = RankGroups.solo()
        self._epoch = 0
        self._cancelled: set[AttemptKey] = set()
        self._told = ToldRuns(options.collective_timeout_s)
        self._bytes_of_interludes = 0
        self._lease_holds_until = -math.inf
        self._publisher: Publisher | None = None
        self._arrivals: Arrivals | None = None
        """Made when the first KV of another group is to come: most engines take none."""
        self.steps_done = 0
        self.exposed_s = 0.0
        self.bytes_posted: Counter[str] = Counter({KIND: 0, SUM_KIND: 0, "control": 0, "kv_transfer": 0})

    @property
    def kv_blocks_used(self) -> int:
        """See `Role.kv_blocks_used`."""
        return self._publisher.blocks_used if self._publisher else 0

    @property
    def kv_blocks_cached(self) -> int:
        """See `Role.kv_blocks_cached`."""
        return self._publisher.blocks_cached if self._publisher else 0

    def load(self, progress: Callable[[float], None]) -> engine_pb2.EngineLoaded:
        """See `Role.load`."""
        self._model = load_model(self._options, self._device, self._dtype, progress, torch.device("cpu"))
        sender = KvSender(
            self._model.arena,
            self._model.kv_format(),
            self._options.name,
            self._model.incarnation,
            self._options.kv_transport,
            may_send=lambda: time.monotonic() < self._lease_holds_until,
        )
        self._publisher = Publisher(
            self._model.pool, sender, self.bytes_posted, self._options.name, self._send
        )
        self._warm_up()
        loaded = self._model.event()
        loaded.slice_flops = slice_flops(self._device.type, self._dtype, torch.get_num_threads())
        return loaded

    def join(self, groups: RankGroups, epoch: int) -> None:
        """See `Role.join`."""
        self._told.clear()  # what was told after the last epoch's end
        if epoch != self._epoch:
            self._forget_all()  # and what came in since
        self._groups, self._epoch = groups, epoch

    def reset(self) -> None:
        """See `Role.reset`."""
        self._groups = RankGroups.solo()
        self._forget_all()
        self._cancelled.clear()

    def notice(self, command: engine_pb2.EngineCommand) -> None:
        """See `Role.notice`: what takes effect at once, or at the end of the running prompt's slice."""
        if command.HasField("run_prefill"):
            self._drop_arrivals(command.run_prefill.evict)
            self._told.add(command.run_prefill)
        elif command.HasField("abort_group") or command.HasField("shutdown"):
            self._told.end()
        elif command.HasField("cancel_prefill"):
            key = attempt_key(command.cancel_prefill.attempt)
            self._cancelled.add(key)
            # Not in its turn: what has its turn before it may be waiting for these very blocks.
            self._loaded_publisher.give_up_computed(key)
        elif command.HasField("hold_lease"):
            self._lease_holds_until = command.hold_lease.holds_until_s
        elif command.HasField("evict_prefixes"):
            self._drop_arrivals(command.evict_prefixes.runs)
        elif command.HasField("send_cached"):
            num_layers = self._model.decoder.config.num_layers
            self._loaded_publisher.send_cached(command.send_cached, num_layers)
        elif command.HasField("fetch_prefix"):
            self._open_arrivals().expect(command.fetch_prefix, command.epoch)

    def execute(self, command: engine_pb2.EngineCommand) -> None:
        """See `Role.execute`."""
        if command.HasField("run_prefill"):
            if self._told.begin(command.run_prefill):
                self._prefill(command.run_prefill)
        elif command.HasField("cancel_prefill"):
            self._forget(attempt_key(command.cancel_prefill.attempt))
        elif command.HasField("evict_prefixes"):
            self._loaded_publisher.evict(command.evict_prefixes.runs)

    @property
    def _loaded_publisher(self) -> Publisher:
        assert self._publisher is not None, "commands come after load"
        return self._publisher

    def _open_arrivals(self) -> Arrivals:
        if self._arrivals is None:
            model, options = self._model, self._options
            receiver = KvReceiver(
                model.arena,
                model.kv_format(),
                model.incarnation,
                options.host,
                transport=options.kv_transport,
            )
            self._arrivals = Arrivals(self._loaded_publisher, receiver, model.incarnation, self._send)
        return self._arrivals

    def _drop_arrivals(self, runs: Sequence[int]) -> None:
        """Before the turn of what evicts them: they may have begun since its turn was due."""
        if self._arrivals is not None:
            self._arrivals.drop(runs)

    def _forget_all(self) -> None:
        """What the last epoch held; also what came in after its end."""
        if self._arrivals is not None:
            self._arrivals.drop_all()
        self._loaded_publisher.give_up_all()

    def _forget(self, key: AttemptKey) -> None:
        """Frees what a cancelled attempt holds, unless that was done between two slices."""
        if key not in self._cancelled:
            return
        self._loaded_publisher.give_up(key)
        self._cancelled.discard(key)
        attempt = placement_pb2.Attempt(request_id=key[0], number=key[1])
        self._report(attempt, cancelled=engine_pb2.PrefillCancelled())

    def _prefill(self, run: engine_pb2.RunPrefill) -> None:
        spans = spans_of(run)
        stored = self._stored_rows(run, spans)
        delivery = self._loaded_publisher.begin(run, cut_rows(spans, stored))
        self._report(run.attempt, started=prefill_service_pb2.PrefillStarted())
        if run.HasField("alone_on") and run.alone_on != self._groups.sequence.rank:
            self._loaded_publisher.computed(delivery, 0, 0.0)
            return
        try:
            self._compute(run, delivery, stored)
        except AttemptCancelledError:
            _log.info("prefill given up", extra=request_fields(run.attempt))
        key = attempt_key(run.attempt)
        if key in self._cancelled:
            # CancelPrefill follows in order; the next prompt may want its blocks before that.
            self._loaded_publisher.give_up(key)

    def _stored_rows(self, run: engine_pb2.RunPrefill, spans: Sequence[Span]) -> Span:
        """Rows whose KV goes to the arena: all, as later prompts may want it, but for those that another rank sends."""
        num_rows, source = len(run.token_ids), self._source
        if source.num_replicas == 1:
            return Span(0, num_rows)
        return source.rows(num_rows, num_before(spans, num_held(run.placement)))

    def _compute(self, run: engine_pb2.RunPrefill, delivery: Delivery, stored: Span) -> None:
        """Computes this rank's tokens; KV of the rows `stored` among them is its to keep until it is delivered."""
        started, ranks = time.perf_counter(), self._ranks_of(run)
        plan = follow(run, ranks.rank, ranks.size, self._shape)
        slicer = self._slicer(run)
        schedule = self._schedule(run, plan, ranks, delivery, slicer)
        posted_before = self._collective_bytes

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept_k, kept_v = k[stored.slice], v[stored.slice]
            for rows in walk(len(stored), BYTE_FLOPS * 2 * k.shape[1] * k.shape[2] * k.element_size()):
                self._store(layer, delivery.rows.blocks, rows, kept_k, kept_v)
            self._loaded_publisher.layer_ready(delivery, layer)
            exposed_before = schedule.exposed_s
            o = schedule.attend(layer, q, k, v)
            self.exposed_s += schedule.exposed_s - exposed_before
            self.steps_done += 1
            fraction = (layer + 1) / self._model.decoder.config.num_layers
            self._report(run.attempt, progress=prefill_service_pb2.PrefillProgress(fraction=fraction))
            return o

        def walk(num_rows: int, flops_per_row: int) -> Iterator[slice]:
            return slicer.rows(plan.most_tokens, num_rows, flops_per_row)

        hidden = self._forward(run.token_ids, spans_of(run), attend, self._groups.tensor, walk)
        if ranks.rank == plan.last_rank:
            logits = self._model.decoder.logits(hidden[-1:], self._groups.tensor)
            if self._model.decoder.share.index == 0:
                self._sample_first(run, logits, started)
        self._loaded_publisher.computed(delivery, self._collective_bytes - posted_before, schedule.exposed_s)

    def _schedule(
        self,
        run: engine_pb2.RunPrefill,
        plan: AttentionPlan,
        ranks: Communicator,
        delivery: Delivery,
        slicer: Slicer,
    ) -> CsaSchedule | ContinuedSchedule:
        """Attention of the tokens of the plan, behind what is cached before them."""
        scale = self._model.scale
        schedule = CsaSchedule(plan, LeadingRanks(ranks, plan.num_ranks), scale, slicer)
        if not num_cached_of(run):
            return schedule
        num_queries = [sum(map(len, plan.spans(rank))) for rank in range(plan.num_ranks)]
        cached = CachedKeys(run.cached.tokens_by_rank, num_queries)
        slots = [one for part in delivery.cached for one in part.slots()]

        def read_keys(layer: int) -> list[tuple[Tensor, Tensor]]:
            k, v = self._model.arena.k[layer], self._model.arena.v[layer]
            to = self._device, self._dtype
            return [(k[begin:end].to(*to), v[begin:end].to(*to)) for begin, end in slots]

        return ContinuedSchedule(schedule, cached, read_keys, ranks, scale, slicer)

    @property
    def _collective_bytes(self) -> int:
        """Posted for all prompts but those that are over and went between the slices of another."""
        return self.bytes_posted[KIND] + self.bytes_posted[SUM_KIND] - self._bytes_of_interludes

    def _ranks_of(self, run: engine_pb2.RunPrefill) -> Communicator:
        """Those that may share a prompt which this one computes."""
        return SoloCommunicator(self.bytes_posted) if run.HasField("alone_on") else self._groups.sequence

    def _slicer(self, run: engine_pb2.RunPrefill) -> Slicer:
        """How a prompt's work is cut; a short one's is about as much as a slice, and is not."""
        if run.interlude_flops:
            return Slicer.endless()
        key, share = attempt_key(run.attempt), FairShare(run.slice_flops)
        return Slicer(run.slice_flops, lambda: self._end_slice(key, share))

    def _end_slice(self, key: AttemptKey, share: FairShare) -> None:
        """All ranks come here together: they go on together, or none does, or all compute short prompts first."""
        self.steps_done += 1
        share.earn()
        everyone = self._groups.everyone
        verdict = everyone.agree(self._verdict(key, share) if everyone.rank == 0 else GO_ON)
        if verdict == GIVE_UP:
            raise AttemptCancelledError
        if verdict != GO_ON:
            posted_before = self._collective_bytes
            for run in self._told.take(verdict):
                self._prefill(run)
            self._bytes_of_interludes += self._collective_bytes - posted_before
        for cancelled in list(self._cancelled):
            # Whose turn it is, and those that have none yet, are given up by all ranks together.
            if cancelled != key and not self._told.knows(cancelled):
                self._forget(cancelled)

    def _verdict(self, key: AttemptKey, share: FairShare) -> int:
        if key in self._cancelled:
            return GIVE_UP
        waiting = self._told.short_ones()
        num_affordable = share.afford(short_work(waiting))
        return waiting[num_affordable - 1].number if num_affordable else GO_ON

    def _sample_first(self, run: engine_pb2.RunPrefill, logits: Tensor, started: float) -> None:
        """Draws the first token of every choice from logits [1, vocab]."""
        states = [
            ChoiceState(run.choice, index, run.num_prompt_tokens, self._device)
            for index in range(num_choices(run.choice))
        ]
        drawn = draw_tokens(logits.repeat(len(states), 1) if len(states) > 1 else logits, states)
        tokens = []
        for state, token in zip(states, drawn, strict=True):
            if isinstance(token, NonFiniteLogitsError):
                self._fail(run.attempt, token)
                return
            tokens.append(_first_token(state, token))
        first = tokens[0]
        first.prefill_s = time.perf_counter() - started
        first.more_choices.extend(tokens[1:])
        self._report(run.attempt, first_token=first)

    def _fail(self, attempt: placement_pb2.Attempt, error: NonFiniteLogitsError) -> None:
        message = f"{self._options.name}: first token: {error}"
        failed = engine_pb2.AttemptFailed(attempt=attempt, reason="NON_FINITE_LOGITS", message=message)
        self._send(engine_pb2.EngineEvent(attempt_failed=failed))

    def _store(self, layer: int, blocks: Sequence[int], rows: slice, k: Tensor, v: Tensor) -> None:
        """Writes some rows of what is to be sent, [tokens, kv_heads, head_dim], to their slots."""
        taken = rows.start
        for begin, end in slot_runs(blocks, rows.stop - rows.start, rows.start):
            part = slice(taken, taken + end - begin)
            self._model.arena.k[layer, begin:end] = k[part]
            self._model.arena.v[layer, begin:end] = v[part]
            taken = part.stop

    def _forward(
        self,
        token_ids: Sequence[int],
        spans: Sequence[Span],
        attend: Attend,
        tensor: TensorRanks,
        walk: RowWalk = row_chunks,
    ) -> Tensor:
        """Hidden states of tokens that lie at these spans of their prompt, one span after another."""
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        positions = [torch.arange(span.begin, span.end, device=self._device) for span in spans]
        together = torch.cat(positions) if positions else ids
        return self._model.decoder.forward(ids, together, attend, walk, tensor)

    def _warm_up(self) -> None:
        """Compiles attention, then one tiny forward: the first prompt pays for nothing that starts lazily."""
        warm_up_attention(self._dtype, self._device)
        plan = make_plan("heads", exact_layout(WARM_UP_TOKENS, 1), 1, self._shape)
        schedule = CsaSchedule(plan, SoloCommunicator(), self._model.scale)
        peers = WithoutPeers(self._options.tp)  # their group forms later
        hidden = self._forward([0] * WARM_UP_TOKENS, [Span(0, WARM_UP_TOKENS)], schedule.attend, peers)
        self._model.decoder.logits(hidden[-1:], peers)

    @property
    def _shape(self) -> AttentionShape:
        config, element_bytes = self._model.decoder.config, self._dtype.itemsize
        model = AttentionShape(config.num_q_heads, config.num_kv_heads, config.head_dim, element_bytes)
        return model.of_share(self._model.decoder.share)

    @property
    def _source(self) -> TensorSource:
        """What KV this rank sends."""
        share = self._model.decoder.share
        return tensor_source(self._model.decoder.config.num_kv_heads, share.index, share.tp)

    def _report(self, attempt: placement_pb2.Attempt, **report: object) -> None:
        prefill = engine_pb2.PrefillReport(attempt=attempt, **report)  # type: ignore[arg-type]
        self._send(engine_pb2.EngineEvent(prefill=prefill))

    def _send(self, event: engine_pb2.EngineEvent) -> None:
        event.epoch = self._epoch
        self._link.send(event)


def _first_token(state: ChoiceState, drawn: Drawn) -> prefill_service_pb2.FirstToken:
    return prefill_service_pb2.FirstToken(
        token_id=drawn.token_id, finish_reason=state.take(drawn.token_id), logprob=drawn.wire_logprob
    )
