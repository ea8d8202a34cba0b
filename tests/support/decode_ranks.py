"""Decode ranks without models or processes: real pools, arenas, rows and moves, with marks in place of KV.

The KV of a token is its row and its place in the text, so that what lies where can be read back.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor

from sps2.internal.v1.engine_pb2 import ReserveRow
from sps2.internal.v1.placement_pb2 import Placement
from sps2.internal.v1.prefill_service_pb2 import TokenChoice
from sps2.v1.generation_pb2 import SamplingSpec
from sps2_decode_worker.move_messages import move_message
from sps2_decode_worker.moving import MovesUnderWay
from sps2_decode_worker.receive import Receiver
from sps2_decode_worker.rows import RowState
from sps2_decode_worker.scheduler import Plan
from sps2_decode_worker.tenants import Row
from sps2_engine.collectives import PendingExchange
from sps2_engine.kv_pool import BlockPool, KvArena

WAIT_S = 20.0
Mark = tuple[int, int]
"""A row's number (0 in blocks that choices share) and a token's place in its text."""


class NoTransfers:
    """In place of a KvReceiver: KV is there at once."""

    def expect(self, *_: object) -> None:
        """Nothing comes."""

    def forget(self, _: object) -> None:
        """Nothing came."""


def receiver(num_blocks: int) -> Receiver:
    """A rank's room, with KV of one layer, one head and two elements."""
    made = Receiver.__new__(Receiver)
    made._pool = BlockPool(num_blocks)
    made._arena = KvArena(1, num_blocks, 1, 2)
    made._receiver = NoTransfers()  # type: ignore[assignment]
    return made


@dataclass
class Received:
    """An exchange by queues, one for each pair of ranks."""

    queues: Sequence["SimpleQueue[Tensor]"]

    def wait(self) -> Tensor:
        """See `PendingExchange.wait`."""
        return torch.cat([queue.get(timeout=WAIT_S) for queue in self.queues])

    def when_complete(self, call: Callable[[float], None]) -> None:
        """Not asked here."""
        raise NotImplementedError


class QueueRanks:
    """A communicator among threads, or among turns of one thread where each rank posts before one waits."""

    def __init__(self, rank: int, queues: "list[list[SimpleQueue[Tensor]]]") -> None:
        self.rank, self.size, self._queues = rank, len(queues), queues
        self.bytes_posted: Counter[str] = Counter()

    def all_to_all(
        self,
        send: Tensor,
        send_bytes: Sequence[int],
        recv_bytes: Sequence[int],
        kind: str,
        lane: int = 0,
        into: Tensor | None = None,
    ) -> PendingExchange:
        """See `Communicator.all_to_all`; what comes must be as long as is expected."""
        assert len(send) == sum(send_bytes)
        self.bytes_posted[kind] += sum(send_bytes)
        for peer, part in enumerate(torch.split(send, list(send_bytes))):
            self._queues[self.rank][peer].put(part)
        return Received([sent[self.rank] for sent in self._queues])

    def agree(self, flag: bool) -> bool:
        """Not asked here."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to leave."""


def reserve_message(rows: Sequence[Row], choice: TokenChoice | None = None) -> ReserveRow:
    """How the ranks are told of an attempt whose rows have their places; sampling is greedy unless named."""
    first, *more = rows
    places = first.tenant.places
    placement = Placement()
    for rank, (begin, end) in places.shards.items():
        placement.shards.add(rank=rank, token_begin=begin, token_end=end)
    greedy = TokenChoice(
        sampling=SamplingSpec(top_p=1), max_tokens=places.max_new_tokens, num_choices=len(rows)
    )
    return ReserveRow(
        row=first.row_id,
        placement=placement,
        home=first.home,
        num_prompt_tokens=places.num_tokens,
        choice=choice or greedy,
        choice_rows=[row.row_id for row in more],
    )


class DecodeRanks:
    """A group that executes plans at once."""

    def __init__(self, totals: Sequence[int]) -> None:
        queues: list[list[SimpleQueue[Tensor]]] = [[SimpleQueue() for _ in totals] for _ in totals]
        self.receivers = [receiver(total) for total in totals]
        self.communicators = [QueueRanks(rank, queues) for rank in range(len(totals))]
        self.movers = [
            one.mover(communicator)
            for one, communicator in zip(self.receivers, self.communicators, strict=True)
        ]
        self.rows: list[dict[int, RowState]] = [{} for _ in totals]
        self._threads = ThreadPoolExecutor(len(totals))

    def close(self) -> None:
        """Ends its threads."""
        self._threads.shutdown()

    def execute(self, plan: Plan, attempts: Mapping[int, ReserveRow]) -> None:
        """What every rank does with a plan, in the loop's order; `attempts` by their first rows."""
        for rank, (taker, rows) in enumerate(zip(self.receivers, self.rows, strict=True)):
            for row_id in set(plan.release) - set(plan.reserve):
                taker.release(rows.pop(row_id))
            for row_id in plan.reserve:
                if row_id in attempts and row_id not in plan.release:
                    made = taker.reserve(attempts[row_id], rank, lambda: None)
                    rows.update({row.row_id: row for row in made})
                    self._deliver(rank, made[0])
            for row_id in sorted(plan.admit):
                if row_id in rows:
                    taker.copy_prompt(rows[row_id])
                    rows[row_id].admit(0, torch.device("cpu"))
        if plan.run:
            self._step(plan)
        for rank, (taker, rows) in enumerate(zip(self.receivers, self.rows, strict=True)):
            taker.check(rows.values(), plan.blocks_used[rank])

    def marks(self, rank: int, row_id: int) -> list[Mark]:
        """What a rank holds of a row."""
        row = self.rows[rank][row_id]
        slots = [slot for run in row.runs() for slot in range(*run)]
        found = self.receivers[rank]._arena.k[0, slots, 0].to(torch.int64)
        return [(int(who), int(place)) for who, place in found]

    def _deliver(self, rank: int, row: RowState) -> None:
        shard = next((one for one in row.reserve.placement.shards if one.rank == rank), None)
        if shard is not None:
            slots = [slot for run in (*row.prompt.runs(), *row.own.runs()) for slot in range(*run)]
            places = torch.arange(shard.token_begin, shard.token_end, dtype=torch.float32)
            self._write(rank, slots, torch.stack([torch.zeros_like(places), places], dim=1))

    def _write(self, rank: int, slots: Sequence[int], marks: Tensor) -> None:
        arena = self.receivers[rank]._arena
        arena.k[0, slots, 0], arena.v[0, slots, 0] = marks, -marks

    def _step(self, plan: Plan) -> None:
        told = [move_message(one) for one in plan.moves]
        moving: list[MovesUnderWay] = [
            mover.post(told, rows) for mover, rows in zip(self.movers, self.rows, strict=True)
        ]
        for rank, rows in enumerate(self.rows):
            for row in rows.values():
                if row.admitted and row.is_home:
                    self.receivers[rank].extend(row)
                    mark = torch.tensor([[row.row_id, row.position]], dtype=torch.float32)
                    self._write(rank, [row.append_slot()], mark)
                    row.take(len(row.token_ids))
        if told:
            list(self._threads.map(MovesUnderWay.finish, moving))
