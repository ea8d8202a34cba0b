"""How the ranks are told what moves, and how much of it goes with one step. Pure."""

from sps2.internal.v1 import engine_pb2
from sps2_decode_worker.resizing import RowMoves

BYTES_PER_STEP = {"cpu": 1 << 20, "cuda": 64 << 20}
"""What moves with one step: far less than a step reads, so that streams hardly notice."""
ELEMENT_BYTES = {"cpu": {"fp32": 4, "bf16": 4}, "cuda": {"fp32": 4, "bf16": 2}}
"""Of KV, which is fp32 on CPUs whatever the weights are."""


def blocks_per_step(rank: engine_pb2.EngineLoaded, block_tokens: int) -> int:
    """Blocks that may move with one step in a group of such ranks, at least one."""
    elements = 2 * rank.num_layers * block_tokens * rank.num_kv_heads * rank.head_dim
    return max(1, BYTES_PER_STEP[rank.device] // (elements * ELEMENT_BYTES[rank.device][rank.dtype]))


def move_message(moves: RowMoves) -> engine_pb2.MoveRows:
    """What the ranks are told of the moves of one attempt."""
    return engine_pb2.MoveRows(
        rows=moves.rows,
        moves=[
            engine_pb2.BlockMove(
                source=move.source,
                target=move.target,
                num_prompt_blocks=move.prompt_blocks,
                num_own_blocks=move.own_blocks,
            )
            for move in moves.moves
        ],
        home=moves.home,
        holders=moves.holders,
        num_outputs=moves.num_outputs,
    )
