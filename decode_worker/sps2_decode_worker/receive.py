"""Room for rows on this decode rank, and the KV that arrives for it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from sps2.internal.v1 import engine_pb2
from sps2_decode_worker.moving import KvMover
from sps2_decode_worker.placing import max_new_tokens, tokens_ahead
from sps2_decode_worker.rows import RowState, Segment, num_held_blocks, shard_of
from sps2_engine.collectives import Communicator
from sps2_engine.kv_pool import BLOCK_TOKENS
from sps2_engine.kv_transfer.receiver import KvReceiver
from sps2_engine.runtime.loading import LoadedModel


class Receiver:
    """Owns the rank's blocks. Called by the engine's main thread only."""

    def __init__(self, model: LoadedModel, host: str) -> None:
        self._pool = model.pool
        self._arena = model.arena
        self._receiver = KvReceiver(
            model.arena, model.kv_format(), model.incarnation, host, transport=model.options.kv_transport
        )

    @property
    def address(self) -> str:
        """host:port at which KV is taken."""
        return self._receiver.address

    @property
    def blocks_used(self) -> int:
        """Blocks that rows hold."""
        return self._pool.num_used

    def mover(self, communicator: Communicator) -> KvMover:
        """What moves KV between these blocks and those of other ranks."""
        return KvMover(self._pool, self._arena, communicator)

    def hold(self, reserve: engine_pb2.ReserveRow, rank: int, rows: Mapping[int, RowState]) -> Sequence[int]:
        """Makes an attempt an owner of the blocks that it takes over on this rank; before any row of its plan leaves.

        Their KV is complete (the leader has seen it), and nobody writes to them any more.

        Args:
            reserve: the attempt.
            rank: this rank.
            rows: all rows here, by number.

        Raises:
            KeyError: the row that brought them has left.
            ValueError: it has fewer whole blocks of its prompt here.
        """
        num_blocks = num_held_blocks(reserve.placement, rank)
        if not num_blocks:
            return ()
        donor = rows[reserve.held_from]
        blocks = donor.prompt.blocks[:num_blocks]
        if len(blocks) < num_blocks:
            raise ValueError(f"row {donor.row_id} has no {num_blocks} blocks of its prompt on rank {rank}")
        self._pool.share(blocks)
        return blocks

    def reserve(
        self, reserve: engine_pb2.ReserveRow, rank: int, held: Sequence[int], on_complete: Callable[[], None]
    ) -> list[RowState]:
        """Takes blocks for an attempt's rows (the leader has counted that they are free) and expects its KV.

        Args:
            reserve: the attempt; KV goes into the blocks of its first row.
            rank: this rank.
            held: what `hold` gave for it. No KV goes there.
            on_complete: called once, on the receiver's thread, when the KV that is sent to this rank is verified
                and in its blocks; never where none is.
        """
        shard = shard_of(reserve.placement, rank)
        num_sent = shard.token_end - shard.token_begin if shard else 0
        at_home = reserve.home == rank
        num_ahead = tokens_ahead(max_new_tokens(reserve.choice)) if at_home else 0
        blocks = self._pool.allocate(-(-(num_sent + num_ahead) // BLOCK_TOKENS))
        if shard is not None:
            self._receiver.expect(shard.fence, shard.token_begin, shard.token_end, blocks, on_complete)
        num_shared = num_sent // BLOCK_TOKENS if at_home else len(blocks)
        num_in_own = num_sent - min(num_sent, num_shared * BLOCK_TOKENS)
        prompt = Segment([*held, *blocks[:num_shared]], len(held) * BLOCK_TOKENS + num_sent - num_in_own)
        first = RowState(reserve.row, reserve, rank, 0, prompt, Segment(blocks[num_shared:], num_in_own))
        return [first, *self._more_choices(first)]

    def _more_choices(self, first: RowState) -> Iterator[RowState]:
        for index, row_id in enumerate(first.reserve.choice_rows, start=1):
            self._pool.share(first.prompt.blocks)
            own = Segment(self._pool.allocate(len(first.own.blocks)), first.own.num_tokens)
            yield RowState(row_id, first.reserve, first.rank, index, first.prompt, own, first)

    def extend(self, row: RowState) -> None:
        """Takes a block for a row's next token where its blocks are full; the leader has counted that one is free.

        Of a row that has finished as well: until it leaves, the leader counts its blocks as it goes on.
        """
        if row.own.num_tokens == len(row.own.blocks) * BLOCK_TOKENS:
            row.own.blocks.extend(self._pool.allocate(1))

    def copy_prompt(self, row: RowState) -> None:
        """Fills a row's own block with the end of the prompt that it shares; before any row of it appends."""
        sources, targets = row.copied_slots()
        if targets:
            for plane in (self._arena.k, self._arena.v):
                plane[:, targets] = plane[:, sources]

    def check(self, rows: Iterable[RowState], num_expected: int) -> None:
        """Verifies the pool, in time proportional to it: what is used is what rows hold, and what the leader counts.

        Raises:
            AssertionError: with what is wrong.
        """
        self._pool.check()
        owners = Counter(block for row in rows for block in row.blocks)
        if owners != self._pool.owners:
            wrong = sorted((owners - self._pool.owners) + (self._pool.owners - owners))
            raise AssertionError(f"blocks {wrong[:8]} have other owners than the rows that hold them")
        if self.blocks_used != num_expected:
            raise AssertionError(f"{self.blocks_used} blocks are used, the leader counts {num_expected}")

    def release(self, row: RowState) -> None:
        """Frees a row's blocks, once no byte can be written into them any more."""
        shard = shard_of(row.reserve.placement, row.rank)
        if shard is not None:
            self._receiver.forget(shard.fence)  # for all choices: they leave together, or after the commit
        self._pool.free(row.blocks)
