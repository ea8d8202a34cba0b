"""KV that goes from one decode rank to another while rows decode.

The leader says what goes where, and counts the blocks; every rank carries out its part of the same plan, so nothing
is asked and nothing is answered. Whole blocks leave when a step begins and are elsewhere when it ends. The block
that grows and the tokens so far follow the step, when a row gets another home.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps2.internal.v1.engine_pb2 import BlockMove, MoveRows
from sps2_decode_worker.rows import RowState
from sps2_engine.attention.decode_plan import DecodeRow
from sps2_engine.collectives import Communicator, PendingExchange
from sps2_engine.kv_pool import BLOCK_TOKENS, BlockPool, KvArena

KIND = "kv_move"
"""Name of the byte counter."""
LANE = 1
"""Not that of a step's attention, which need not wait for it; but shared memory keeps the order of posts."""
HEADER = 4
"""Numbers before the tokens that a new home is told: how many these are, tokens in the block that grows, bytes of
Q exchange so far, whether the row has ended."""


@dataclass(frozen=True)
class KvMover:
    """One rank's part in moves, within one epoch. Called by the engine's main thread only."""

    pool: BlockPool
    arena: KvArena
    communicator: Communicator

    def post(self, told: Sequence[MoveRows], rows: Mapping[int, RowState]) -> "MovesUnderWay":
        """Sends what leaves this rank, and returns at once; every rank does this with the same plan.

        Args:
            told: what moves.
            rows: all rows of this rank.

        Raises:
            GroupError: the exchange could not be posted.
        """
        attempts = [Moved(one, [rows[row_id] for row_id in one.rows]) for one in told]
        pending = self._post_blocks(attempts) if any(one.told.moves for one in attempts) else None
        return MovesUnderWay(self, attempts, pending)

    def _post_blocks(self, attempts: Sequence["Moved"]) -> PendingExchange:
        me, size = self.communicator.rank, self.arena.block_bytes
        leaving = sorted(
            (one for attempt in attempts for one in attempt.leaving(me)), key=lambda one: one[0].target
        )
        send = self.arena.read_blocks([block for _, blocks in leaving for block in blocks])
        out, into = [0] * self.communicator.size, [0] * self.communicator.size
        for move, blocks in leaving:
            out[move.target] += len(blocks) * size
        for attempt, move in _coming(attempts, me):
            into[move.source] += attempt.num_blocks(move) * size
        return self.communicator.all_to_all(send.view(-1), out, into, KIND, LANE)

    def take_in(self, attempts: Sequence["Moved"], received: Tensor) -> None:
        """Gives what has come its blocks, and frees those of what has gone."""
        me, blocks_read = self.communicator.rank, 0
        by_block = received.view(-1, self.arena.block_bytes)
        for attempt, move in _coming(attempts, me):
            blocks = self.pool.allocate(attempt.num_blocks(move))
            self.arena.write_blocks(blocks, by_block[blocks_read : blocks_read + len(blocks)])
            blocks_read += len(blocks)
            attempt.gain(move, blocks, self.pool)
        for attempt in attempts:
            for move, _ in list(attempt.leaving(me)):
                attempt.lose(move, self.pool)

    def hand_over(self, attempts: Sequence["Moved"]) -> None:
        """Takes the rows of these attempts from their homes to their new ones.

        Raises:
            GroupError: the exchange failed.
        """
        me, ranks = self.communicator.rank, range(self.communicator.size)
        rows = [(row, attempt.told) for attempt in attempts for row in attempt.rows]
        leaving = sorted((one for one in rows if one[0].is_home), key=lambda one: one[1].home)
        coming = sorted((one for one in rows if one[1].home == me), key=lambda one: one[0].plan_row.home)
        out = [sum(self._packed_bytes(told) for _, told in leaving if told.home == to) for to in ranks]
        into = [
            sum(self._packed_bytes(told) for row, told in coming if row.plan_row.home == of) for of in ranks
        ]
        parts = [self._pack(row, told) for row, told in leaving]
        send = torch.cat(parts) if parts else self.arena.read_blocks([]).view(-1)
        received = self.communicator.all_to_all(send, out, into, KIND, LANE).wait()
        packed = torch.split(received, [self._packed_bytes(told) for _, told in coming])
        for (row, _), one in zip(coming, packed, strict=True):
            self._unpack(row, one)

    def _packed_bytes(self, told: MoveRows) -> int:
        return 8 * (HEADER + told.num_outputs) + self.arena.block_bytes

    def _pack(self, row: RowState, told: MoveRows) -> Tensor:
        """The row's numbers and its last block, uint8; they are not here any more."""
        in_last = (row.own.num_tokens - 1) % BLOCK_TOKENS + 1
        freed = row.own.take_last()
        numbers = [len(row.token_ids), in_last, row.q_exchange_bytes, int(row.finished), *row.token_ids]
        numbers += [0] * (HEADER + told.num_outputs - len(numbers))
        state = torch.tensor(numbers, dtype=torch.int64).to(self.arena.k.device)
        packed = torch.cat([state.view(torch.uint8), self.arena.read_blocks(freed[:1]).view(-1)])
        self.pool.free(freed)
        row.choice, row.token_ids = None, []
        return packed

    def _unpack(self, row: RowState, packed: Tensor) -> None:
        """The row lives here from now on."""
        state, block_data = packed[: -self.arena.block_bytes], packed[-self.arena.block_bytes :]
        num_ids, in_last, q_bytes, finished, *ids = state.cpu().view(torch.int64).tolist()
        block = self.pool.allocate(1)
        self.arena.write_blocks(block, block_data)
        row.own.give(block, in_last)
        row.begin_at_home(ids[:num_ids], self.arena.k.device)
        row.q_exchange_bytes, row.finished = q_bytes, bool(finished)


class MovesUnderWay:
    """What was posted, until its step is computed."""

    def __init__(self, mover: KvMover, attempts: Sequence["Moved"], pending: PendingExchange | None) -> None:
        self._mover = mover
        self._attempts = attempts
        self._pending = pending

    def finish(self) -> None:
        """After the step: everything is where the plan says.

        Raises:
            GroupError: an exchange failed.
        """
        if self._pending is not None:
            self._mover.take_in(self._attempts, self._pending.wait())
        if leaving := [one for one in self._attempts if one.leaves_home]:
            self._mover.hand_over(leaving)
        for attempt in self._attempts:
            attempt.settle()


@dataclass(frozen=True)
class Moved:
    """The rows of one attempt on this rank, and what moves of them."""

    told: MoveRows
    rows: list[RowState]

    @property
    def leaves_home(self) -> bool:
        """Whether it gets another home."""
        return self.rows[0].plan_row.home != self.told.home

    def num_blocks(self, move: BlockMove) -> int:
        """Blocks of all rows together."""
        return move.num_prompt_blocks + len(self.rows) * move.num_own_blocks

    def leaving(self, rank: int) -> Iterator[tuple[BlockMove, list[int]]]:
        """The blocks of each move from this rank: the shared ones, then those of one row after the other."""
        prompt, own = 0, 0
        for move in self.told.moves:
            if move.source == rank:
                prompt_end, own_end = prompt + move.num_prompt_blocks, own + move.num_own_blocks
                shared = self.rows[0].prompt.blocks[prompt:prompt_end]
                yield move, [*shared, *(block for row in self.rows for block in row.own.blocks[own:own_end])]
                prompt, own = prompt_end, own_end

    def lose(self, move: BlockMove, pool: BlockPool) -> None:
        """They have gone."""
        shared = self.rows[0].prompt.take_front(move.num_prompt_blocks)
        for row in self.rows:
            pool.free([*shared, *row.own.take_front(move.num_own_blocks)])

    def gain(self, move: BlockMove, blocks: list[int], pool: BlockPool) -> None:
        """They have come: the shared ones, then those of one row after the other."""
        shared, num_own = blocks[: move.num_prompt_blocks], move.num_own_blocks
        self.rows[0].prompt.give(shared, len(shared) * BLOCK_TOKENS)
        for _ in self.rows[1:]:
            pool.share(shared)
        for index, row in enumerate(self.rows):
            begin = len(shared) + index * num_own
            own = blocks[begin : begin + num_own]
            row.own.give(own, num_own * BLOCK_TOKENS, at_front=row.is_home)

    def settle(self) -> None:
        """The next step finds the rows where they are now."""
        for row in self.rows:
            row.plan_row = DecodeRow(row.row_id, self.told.home, tuple(self.told.holders))


def _coming(attempts: Sequence[Moved], rank: int) -> list[tuple[Moved, BlockMove]]:
    """What comes to a rank, in the order in which it lies in what is received."""
    moves = [(attempt, move) for attempt in attempts for move in attempt.told.moves if move.target == rank]
    return sorted(moves, key=lambda one: one[1].source)
