"""The decode engine: applies the leader's plans in order and computes one step over the active rows.

Knows nothing of scheduling. Every rank applies the same plans, so the collectives of a step meet without a word.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sps2.internal.v1 import engine_pb2
from sps2.v1 import generation_pb2
from sps2_decode_worker import moving
from sps2_decode_worker.mesh_placement import own_lane
from sps2_decode_worker.receive import Receiver
from sps2_decode_worker.rows import RowState
from sps2_engine.attention.decode_plan import DecodePlan
from sps2_engine.attention.q_exchange import KIND, LayerCache, QExchange
from sps2_engine.choice import Drawn, draw_tokens
from sps2_engine.layers.tensor_ranks import KIND as SUM_KIND
from sps2_engine.layers.tensor_ranks import TensorRanks, WithoutPeers
from sps2_engine.models import Attend
from sps2_engine.rank_groups import RankGroups
from sps2_engine.runtime.link import SupervisorLink
from sps2_engine.runtime.loading import load_model
from sps2_engine.runtime.options import EngineOptions
from sps2_engine.runtime.populate import populate_in_background
from sps2_engine.sampler import NonFiniteLogitsError
from sps2_kernels.paged_decode import PagedRows, paged_decode_partial


class DecodeRole:
    """Implements `sps2_engine.runtime.host.Role`."""

    exchanges_in_steps = True

    def __init__(
        self, options: EngineOptions, device: torch.device, dtype: torch.dtype, link: SupervisorLink
    ) -> None:
        self._options = options
        self._device = device
        self._dtype = dtype
        self._link = link
        self._groups = RankGroups.solo()
        self._epoch = 0
        self._lease_holds_until = -math.inf
        self._rows: dict[int, RowState] = {}
        self._exchange: QExchange | None = None
        """None when the set of active rows has changed since the last step."""
        self._receiver: Receiver | None = None
        self.steps_done = 0
        self.exposed_s = 0.0
        self.bytes_posted: Counter[str] = Counter({KIND: 0, SUM_KIND: 0, moving.KIND: 0})

    kv_blocks_cached = 0
    """See `Role.kv_blocks_cached`: what later requests may share is held by those that decode."""

    @property
    def kv_blocks_used(self) -> int:
        """See `Role.kv_blocks_used`."""
        return self._receiver.blocks_used if self._receiver else 0

    def load(self, progress: Callable[[float], None]) -> engine_pb2.EngineLoaded:
        """See `Role.load`."""
        self._model = load_model(self._options, self._device, self._dtype, progress, self._device)
        self._model.decoder.pack()
        self._caches = [
            LayerCache(k, v) for k, v in zip(self._model.arena.k, self._model.arena.v, strict=True)
        ]
        self._receiver = Receiver(self._model, self._options.host)
        self._warm_up()
        if self._device.type == "cpu":
            populate_in_background([self._model.arena.k, self._model.arena.v])
        return self._model.event(self._receiver.address)

    def join(self, groups: RankGroups, epoch: int) -> None:
        """See `Role.join`."""
        self._groups, self._epoch = groups, epoch
        self._mover = self._loaded_receiver.mover(groups.sequence)

    def reset(self) -> None:
        """See `Role.reset`."""
        for row in list(self._rows.values()):
            self._release(row)
        self._groups, self._exchange = RankGroups.solo(), None

    def notice(self, command: engine_pb2.EngineCommand) -> None:
        """See `Role.notice`: nothing in a plan takes effect before its turn."""
        if command.HasField("hold_lease"):
            self._lease_holds_until = command.hold_lease.holds_until_s

    def execute(self, command: engine_pb2.EngineCommand) -> None:
        """See `Role.execute`."""
        plan = command.step_plan
        receiver, rank = self._loaded_receiver, self._groups.sequence.rank
        held = [receiver.hold(reserve, rank, self._rows) for reserve in plan.reserve]
        for row_id in plan.release_rows:
            self._release(self._rows[row_id])
        for reserve, blocks in zip(plan.reserve, held, strict=True):
            self._reserve(reserve, blocks)
        if plan.reserve:
            self._answer_reservations(plan.reserve)
        for admit in plan.admit:
            self._admit(self._rows[admit.row], admit.first_token_id)
        if plan.run:
            self._step(plan)
        if plan.blocks_used:
            receiver.check(self._rows.values(), plan.blocks_used[rank])
            self._check_drawn()

    def _check_drawn(self) -> None:
        """Verifies that the tensor ranks have drawn the same tokens; all of them ask.

        Raises:
            AssertionError: from here on they would not compute the same text.
        """
        ranks = self._groups.tensor
        last = [row.token_ids[-1] for _, row in sorted(self._rows.items()) if row.token_ids]
        if ranks.size > 1 and last:
            drawn = torch.tensor(
                last, dtype=torch.float64, device=self._device
            )  # exact for what an id may be
            together = drawn.clone()
            ranks.sum(together)
            if not torch.equal(together, drawn * ranks.size):
                raise AssertionError(f"tensor ranks have not drawn the same tokens for {len(last)} rows")

    def _reserve(self, reserve: engine_pb2.ReserveRow, held: Sequence[int]) -> None:
        epoch = self._epoch

        def on_complete() -> None:  # on the receiver's thread
            received = engine_pb2.RowReceived(row=reserve.row)
            self._link.send(engine_pb2.EngineEvent(epoch=epoch, row_received=received))

        own = own_lane(reserve, self._options.share)
        rows = self._loaded_receiver.reserve(own, self._groups.sequence.rank, held, on_complete)
        self._rows.update({row.row_id: row for row in rows})

    def _answer_reservations(self, reserved: Sequence[engine_pb2.ReserveRow]) -> None:
        """A fenced rank holds the rows, as every rank does, but says no; the leader then releases them."""
        if time.monotonic() < self._lease_holds_until:
            rows = engine_pb2.RowsReserved(rows=[reserve.row for reserve in reserved])
            self._send(rows_reserved=rows)
            return
        for reserve in reserved:
            self._fail_row(reserve, "FENCED", "its lease does not hold: it takes no new rows")

    def _admit(self, row: RowState, first_token_id: int) -> None:
        self._loaded_receiver.copy_prompt(row)
        row.admit(first_token_id, self._device)
        self._exchange = None

    def _release(self, row: RowState) -> None:
        self._loaded_receiver.release(row)
        del self._rows[row.row_id]
        self._exchange = None

    @property
    def _loaded_receiver(self) -> Receiver:
        assert self._receiver is not None, "commands come after load"
        return self._receiver

    def _step(self, plan: engine_pb2.StepPlan) -> None:
        started = time.perf_counter()
        moves = self._mover.post(plan.moves, self._rows) if plan.moves else None
        exchange = self._begin_step()
        exposed_before = exchange.exposed_s
        home = [self._rows[row.row_id] for row in exchange.home_rows]
        hidden = self._forward(
            [row.token_ids[-1] for row in home],
            [row.position for row in home],
            lambda layer, q, k, v: exchange.attend(self._caches[layer], *self._as_kept(q, k, v)),
            self._groups.tensor,
        )
        tokens = []
        if home:
            tokens = self._choose_tokens(home, self._model.decoder.logits(hidden, self._groups.tensor))
        if moves is not None:
            moves.finish()
            self._exchange = None
        self.exposed_s += exchange.exposed_s - exposed_before
        self.steps_done += 1
        step_s = time.perf_counter() - started
        told = tokens if self._reports else []
        result = engine_pb2.StepResult(sequence=plan.sequence, tokens=told, step_s=step_s)
        self._send(step_result=result)

    def _as_kept(self, *tensors: Tensor) -> Iterator[Tensor]:
        """In the dtype of the arena, which is that of decode attention."""
        return (tensor.to(self._model.arena.k.dtype) for tensor in tensors)

    def _begin_step(self) -> QExchange:
        if self._exchange is None:
            active = sorted((row for row in self._rows.values() if row.admitted), key=lambda r: r.row_id)
            config, share = self._model.decoder.config, self._options.share
            plan = DecodePlan(
                tuple(row.plan_row for row in active),
                self._groups.sequence.size,
                len(share.q_heads(config.num_q_heads)),
                config.head_dim,
                self._model.arena.k.element_size(),
            )
            per_row = config.num_layers * share.tp  # each tensor rank sends its heads
            self._row_bytes = {row.row_id: plan.row_bytes_per_layer(row.plan_row) * per_row for row in active}
            # A home may have no KV of a row for a moment: the next token opens a block there.
            held = {row.row_id: row.runs() for row in active if row.num_local or row.is_home}
            self._exchange = QExchange(plan, self._groups.sequence, self._model.scale, self._caches[0], held)
        self._exchange.begin_step([self._append(self._rows[row.row_id]) for row in self._exchange.home_rows])
        return self._exchange

    def _append(self, row: RowState) -> int:
        """The slot of the row's next token."""
        self._loaded_receiver.extend(row)
        return row.append_slot()

    def _forward(
        self, token_ids: list[int], positions: list[int], attend: Attend, tensor: TensorRanks
    ) -> Tensor:
        ids, places = torch.tensor([token_ids, positions], dtype=torch.int64, device=self._device)
        return self._model.decoder.forward(ids, places, attend, ranks=tensor)

    def _choose_tokens(self, home: list[RowState], logits: Tensor) -> list[engine_pb2.RowToken]:
        """A token for each row at home that has not ended: logits [home rows, vocab].

        Tensor ranks have the same logits, to the bit, and the same numbers at random: they draw the same tokens.
        """
        drawn = draw_tokens(logits, [row.at_home for row in home])
        tokens = []
        for row, token in zip(home, drawn, strict=True):
            row.q_exchange_bytes += self._row_bytes[row.row_id]
            if row.finished:
                continue
            if isinstance(token, NonFiniteLogitsError):
                row.finished = True
                message = f"output token {row.at_home.num_outputs}: {token}"
                if self._reports:
                    self._fail_row(row.reserve, "NON_FINITE_LOGITS", message, row.row_id)
            else:
                tokens.append(self._take(row, token))
        return tokens

    @property
    def _reports(self) -> bool:
        """Whether what is chosen here is told: one of the tensor ranks does."""
        return self._options.share.index == 0

    def _take(self, row: RowState, drawn: Drawn) -> engine_pb2.RowToken:
        index = row.at_home.num_outputs
        reason = row.take(drawn.token_id)
        row.finished = reason != generation_pb2.FINISH_REASON_UNSPECIFIED
        return engine_pb2.RowToken(
            row=row.row_id,
            index=index,
            token_id=drawn.token_id,
            finish_reason=reason,
            q_exchange_bytes=row.q_exchange_bytes,
            logprob=drawn.wire_logprob,
        )

    def _fail_row(
        self, reserve: engine_pb2.ReserveRow, reason: str, message: str, row_id: int | None = None
    ) -> None:
        """Fails an attempt for one of its rows; without `row_id` for the first."""
        self._send(
            attempt_failed=engine_pb2.AttemptFailed(
                attempt=reserve.attempt,
                reason=reason,
                message=f"{self._options.name}: {message}",
                row=reserve.row if row_id is None else row_id,
            )
        )

    def _warm_up(self) -> None:
        """One forward of one token, so that the first step does not pay for what compiles or starts lazily."""
        row = PagedRows([[(0, 1)]], self._device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (q, *_), cache = self._as_kept(q, k, v), self._caches[layer]
            return paged_decode_partial(q, cache.k, cache.v, row, self._model.scale)[0]

        peers = WithoutPeers(self._options.tp)  # their group forms later
        self._model.decoder.logits(self._forward([0], [0], attend, peers), peers)

    def _send(self, **event: object) -> None:
        self._link.send(engine_pb2.EngineEvent(epoch=self._epoch, **event))  # type: ignore[arg-type]
