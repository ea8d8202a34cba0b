"""Decode ranks without models or processes: real pools, arenas, rows and moves, with marks in place of KV.

The KV of a token is its place in the text and who made it: a new token's row, or what stands for the prompt up to
there. So what lies where can be read back, and whether it is the KV of these tokens.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from queue import SimpleQueue

import torch
from torch import Tensor

from sps2.internal.v1.decode_service_pb2 import ReserveKv
from sps2.internal.v1.engine_pb2 import EngineLoaded, ReserveRow
from sps2.internal.v1.prefill_service_pb2 import TokenChoice
from sps2.v1.generation_pb2 import SamplingSpec
from sps2_decode_worker import messages
from sps2_decode_worker.messages import FormedGroup
from sps2_decode_worker.move_messages import move_message
from sps2_decode_worker.moving import MovesUnderWay
from sps2_decode_worker.receive import Receiver
from sps2_decode_worker.rows import RowState, shard_of
from sps2_decode_worker.scheduler import Plan
from sps2_decode_worker.tenants import Row
from sps2_engine.collectives import PendingExchange
from sps2_engine.kv_pool import BlockPool, KvArena
from sps2_engine.mesh import Mesh

WAIT_S = 20.0
Mark = tuple[int, int]
"""A row's number, or `prompt_marks`, and a token's place in its text."""
MAX_RANKS = 8


def prompt_marks(token_ids: Sequence[int]) -> list[int]:
    """What stands for the KV of each token: negative or 0, and different where any token up to it is."""
    chain = accumulate(token_ids, lambda so_far, token: zlib.crc32(bytes([token]), so_far), initial=0)
    return [-(mark & 0xFFFFFF) for mark in chain][1:]


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

    def agree(self, value: int) -> int:
        """Not asked here."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to leave."""


def reserve_message(rows: Sequence[Row], choice: TokenChoice | None = None) -> ReserveRow:
    """How the ranks are told of an attempt whose rows have their places; sampling is greedy unless named."""
    places = rows[0].tenant.places
    greedy = TokenChoice(
        sampling=SamplingSpec(top_p=1), max_tokens=places.max_new_tokens, num_choices=len(rows)
    )
    request = ReserveKv(num_prompt_tokens=places.num_tokens, choice=choice or greedy)
    group = FormedGroup("decode-0", 1, Mesh(sp=MAX_RANKS), [EngineLoaded(num_kv_heads=1)] * MAX_RANKS)
    return messages.reserve_message(group, request, list(rows))


@dataclass(frozen=True)
class Attempt:
    """What the ranks are told of an attempt, and its prompt."""

    reserve: ReserveRow
    prompt: Sequence[int]


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

    def execute(self, plan: Plan, attempts: Mapping[int, Attempt]) -> None:
        """What every rank does with a plan, in the loop's order; `attempts` by their first rows."""
        coming = [row_id for row_id in plan.reserve if row_id in attempts and row_id not in plan.release]
        for rank, (taker, rows) in enumerate(zip(self.receivers, self.rows, strict=True)):
            held = [taker.hold(attempts[row_id].reserve, rank, rows) for row_id in coming]
            for row_id in set(plan.release) - set(plan.reserve):
                taker.release(rows.pop(row_id))
            for row_id, blocks in zip(coming, held, strict=True):
                made = taker.reserve(attempts[row_id].reserve, rank, blocks, lambda: None)
                rows.update({row.row_id: row for row in made})
            for row_id in sorted(plan.admit):
                if row_id in rows:
                    if row_id in attempts:
                        self._deliver(rank, rows[row_id], attempts[row_id].prompt)
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

    def _deliver(self, rank: int, row: RowState, prompt: Sequence[int]) -> None:
        """The KV that is sent for an attempt, as late as it may be."""
        shard = shard_of(row.reserve.placement, rank)
        if shard is not None:
            sent = slice(shard.token_begin, shard.token_end)
            slots = [slot for run in (*row.prompt.runs(), *row.own.runs()) for slot in range(*run)]
            marks = [(mark, place) for place, mark in enumerate(prompt_marks(prompt))][sent]
            self._write(rank, slots[-len(marks) :], torch.tensor(marks, dtype=torch.float32))

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
