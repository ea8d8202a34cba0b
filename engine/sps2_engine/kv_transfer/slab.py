"""The bytes of a slab: where they lie in an arena, their checksum, and what a header must say.

Layout version 1: [K run | V run], each [tokens, heads, head_dim], row-major, in the arena's own element type.
Knows nothing about transports or threads.
"""

import zlib
from collections.abc import Iterable, Sequence
from typing import Final

import torch

from sps2.internal.v1.kv_transfer_service_pb2 import KvFormat, SlabHeader
from sps2_engine.kv_pool import KvArena

LAYOUT_VERSION: Final = 1
_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ArenaBytes:
    """An arena as bytes. Slabs leave an arena in host memory, as views; they can be scattered into any arena.

    Raises:
        ValueError: the arena does not have the format that will be announced for it.
    """

    def __init__(self, arena: KvArena, kv_format: KvFormat) -> None:
        if difference := format_mismatch(kv_format, _format_of(arena, kv_format)):
            raise ValueError(f"the KV format does not describe the arena: {difference}")
        self.arena = arena
        self.num_layers = arena.num_layers
        self.num_kv_heads = arena.num_kv_heads
        self.token_bytes = 2 * arena.side_token_bytes
        """Bytes of one token in one layer, K and V."""
        self.in_host_memory = arena.k.device.type == "cpu"
        self._sides: tuple[memoryview, ...] = ()
        if self.in_host_memory:
            self._sides = tuple(side.view(torch.uint8).numpy().data.cast("B") for side in (arena.k, arena.v))

    def spans(self, layer: int, runs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """(side, byte begin, byte end) of the pieces of a slab, in slab order; side 0 is K, 1 is V."""
        size, base = self.arena.side_token_bytes, layer * self.arena.num_slots
        return [(side, (base + a) * size, (base + b) * size) for side in (0, 1) for a, b in runs]

    def pieces(self, layer: int, runs: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The slab that these slot runs make, as views into the arena."""
        return [self._sides[side][begin:end] for side, begin, end in self.spans(layer, runs)]

    def addresses(self, layer: int, runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(address, bytes) of the same pieces."""
        bases = (self.arena.k.data_ptr(), self.arena.v.data_ptr())
        return [(bases[side] + begin, end - begin) for side, begin, end in self.spans(layer, runs)]

    def scatter(self, payload: memoryview, layer: int, runs: Sequence[tuple[int, int]]) -> None:
        """Copies a verified slab into the arena; `payload` holds exactly the tokens of `runs`."""
        if not self.in_host_memory:
            copy_to_device(payload, self.arena, layer, runs)
            return
        position = 0
        for piece in self.pieces(layer, runs):
            piece[:] = payload[position : position + len(piece)]
            position += len(piece)


def copy_to_device(payload: memoryview, arena: KvArena, layer: int, runs: Sequence[tuple[int, int]]) -> None:
    """Copies a slab's bytes into an arena that has no addresses of ours: one copy for each run of K and of V."""
    slab = torch.frombuffer(bytearray(payload), dtype=arena.k.dtype)
    heads, position = (arena.num_kv_heads, arena.head_dim), 0
    for side in (arena.k, arena.v):
        for begin, end in runs:
            count = (end - begin) * heads[0] * heads[1]
            side[layer, begin:end].copy_(slab[position : position + count].view(end - begin, *heads))
            position += count


def checksum(pieces: Iterable[memoryview]) -> int:
    """CRC-32 (zlib, 5 GB/s here, twice the speed of the fastest transport) over the pieces in order."""
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value


def format_mismatch(ours: KvFormat, theirs: KvFormat) -> str:
    """In words, the first field in which two formats differ; empty when they are equal."""
    for field in KvFormat.DESCRIPTOR.fields:
        left, right = getattr(ours, field.name), getattr(theirs, field.name)
        if left != right:
            return f"{field.name} is {left} here and {right} there"
    return ""


def header_fault(header: SlabHeader, token_begin: int, token_end: int, arena: ArenaBytes) -> str:
    """In words, why a header does not describe a slab of an expected token range; empty when it does."""
    if not 0 <= header.layer < arena.num_layers:
        return f"layer {header.layer} of {arena.num_layers}"
    if not token_begin <= header.token_begin < header.token_end <= token_end:
        return f"tokens [{header.token_begin}, {header.token_end}) are not in [{token_begin}, {token_end})"
    if (header.head_begin, header.head_end) != (0, arena.num_kv_heads):
        return f"heads [{header.head_begin}, {header.head_end}), not all {arena.num_kv_heads}"
    expected = (header.token_end - header.token_begin) * arena.token_bytes
    if header.num_bytes != expected:
        return f"{header.num_bytes} bytes where the token range has {expected}"
    return ""


def _format_of(arena: KvArena, announced: KvFormat) -> KvFormat:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    return KvFormat(
        model_hash=announced.model_hash,
        dtype=names.get(arena.k.dtype, str(arena.k.dtype)),
        layout_version=LAYOUT_VERSION,
        num_layers=arena.num_layers,
        num_kv_heads=arena.num_kv_heads,
        head_dim=arena.head_dim,
    )
