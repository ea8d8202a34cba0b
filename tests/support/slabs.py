"""Small arenas, slabs and an intake, in one process."""

import zlib
from collections.abc import Callable
from typing import Final

import torch

from sps2.internal.v1.kv_transfer_service_pb2 import KvFormat, SlabHeader
from sps2.internal.v1.placement_pb2 import Attempt, Fence
from sps2_engine.kv_pool import KvArena
from sps2_engine.kv_transfer.intake import SlabIntake
from sps2_engine.kv_transfer.slab import ArenaBytes
from sps2_layout.layout import Span

BOTH: Final = Span(0, 2)
FENCE: Final = Fence(process_incarnation="target", epoch=3, attempt=Attempt(request_id="r", number=1))
HEAD_BYTES: Final = 2 * 4 * 2
"""Of one head of one token, K and V."""
TOKEN_BYTES: Final = 2 * HEAD_BYTES


def kv_format(num_kv_heads: int = 2) -> KvFormat:
    """Of a model of two layers, heads of four bf16 elements."""
    return KvFormat(
        model_hash="m", dtype="bf16", layout_version=1, num_layers=2, num_kv_heads=num_kv_heads, head_dim=4
    )


def random_arena(heads: Span = BOTH, num_kv_heads: int = 2) -> ArenaBytes:
    """Four blocks of these heads of the model's, each element another number."""
    arena = KvArena(2, 4, len(heads), 4, torch.bfloat16, first_head=heads.begin)
    for tensor in (arena.k, arena.v):
        tensor.copy_(torch.randn(tensor.shape))
    return ArenaBytes(arena, kv_format(num_kv_heads))


def header_of(payload: bytes, **changed: object) -> SlabHeader:
    """Of layer 1, tokens [10, 80), both heads, or as `changed` says."""
    fields = {
        "fence": FENCE,
        "source_incarnation": "source",
        "layer": 1,
        "token_begin": 10,
        "token_end": 80,
        "head_end": 2,
        "num_bytes": len(payload),
        "crc32": zlib.crc32(payload),
        **changed,
    }
    return SlabHeader(**fields)  # type: ignore[arg-type]


class Target:
    """An intake that expects tokens [10, 140) in blocks 3, 0, 1."""

    def __init__(
        self, on_complete: Callable[[], None] = lambda: None, arena: ArenaBytes | None = None
    ) -> None:
        self.bytes = arena or random_arena()
        self.intake = SlabIntake(self.bytes, "target")
        self.intake.expect(FENCE, 10, 140, [3, 0, 1], on_complete)

    def send(self, payload: bytes, **changed: object) -> tuple[int, str]:
        """The verdict on a slab, and why."""
        header = header_of(payload, **changed)
        ack = self.intake.take(header, "source", lambda: memoryview(payload))
        assert ack.sequence == header.sequence
        return ack.verdict, ack.detail
