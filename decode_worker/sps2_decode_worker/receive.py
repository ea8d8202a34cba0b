"""Room for rows on this decode rank, and the KV that arrives for it."""

from collections.abc import Callable

from sps2.internal.v1 import engine_pb2
from sps2_decode_worker.rows import RowState, shard_of
from sps2_engine.kv_pool import BLOCK_TOKENS
from sps2_engine.kv_transfer.receiver import KvReceiver
from sps2_engine.runtime.loading import LoadedModel


class Receiver:
    """Owns the rank's blocks. Called by the engine's main thread only."""

    def __init__(self, model: LoadedModel, host: str) -> None:
        self._pool = model.pool
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

    def reserve(self, reserve: engine_pb2.ReserveRow, rank: int, on_complete: Callable[[], None]) -> RowState:
        """Takes blocks for a row (the leader has counted that they are free) and expects its KV.

        Args:
            on_complete: called once, on the receiver's thread, when the rank's part of the prompt is verified
                and in its blocks; never where it has no part.
        """
        shard = shard_of(reserve.placement, rank)
        num_prompt = shard.token_end - shard.token_begin if shard else 0
        num_new = reserve.choice.max_tokens if reserve.home == rank else 0
        blocks = self._pool.allocate(-(-(num_prompt + num_new) // BLOCK_TOKENS))
        if shard is not None:
            self._receiver.expect(shard.fence, shard.token_begin, shard.token_end, blocks, on_complete)
        return RowState(reserve, rank, blocks, num_prompt)

    def release(self, row: RowState) -> None:
        """Frees a row's blocks, once no byte can be written into them any more."""
        shard = shard_of(row.reserve.placement, row.rank)
        if shard is not None:
            self._receiver.forget(shard.fence)
        self._pool.free(row.blocks)
