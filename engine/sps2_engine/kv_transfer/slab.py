"""The bytes of a slab: where they lie in an arena, their checksum, and what a header must say.

Layout version 1: [K run | V run], each [tokens, heads, head_dim], row-major, in the arena's own element type; the
heads are those of the slab's header. Knows nothing about transports or threads.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from sps2.internal.v1.kv_transfer_service_pb2 import KvFormat, PushSlabsRequest, SlabHeader
from sps2_engine.kv_pool import KvArena
from sps2_layout.layout import Span

LAYOUT_VERSION: Final = 1
_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SHAPE_FIELDS: Final = ("num_layers", "num_kv_heads", "head_dim")

Runs = Sequence[tuple[int, int]]
"""Slots [begin, end) of the tokens of a slab, in token order."""


class ArenaBytes:
    """An arena as bytes. Slabs leave an arena in host memory, as views; they can be scattered into any arena.

    Heads are numbered as in the model, and those of a slab must be among the arena's.

    Args:
        arena: Of all KV heads of the model, or of a range of them.
        kv_format: What is announced for it, the same on all ranks.

    Raises:
        ValueError: the arena does not have that format.
    """

    def __init__(self, arena: KvArena, kv_format: KvFormat) -> None:
        if difference := format_mismatch(kv_format, _format_of(arena, kv_format)):
            raise ValueError(f"the KV format does not describe the arena: {difference}")
        self.arena = arena
        self.kv_format = kv_format
        self.num_layers = arena.num_layers
        self.heads = arena.heads
        self.num_model_heads = kv_format.num_kv_heads
        self.token_bytes = 2 * arena.side_token_bytes
        """Bytes of one token in one layer, K and V, all heads of the arena."""
        self.head_bytes = 2 * arena.head_dim * arena.k.element_size()
        """Bytes of one head of one token in one layer, K and V."""
        self.in_host_memory = arena.k.device.type == "cpu"
        # K and V: [layers, slots, heads, bytes].
        self._sides: tuple[NDArray[np.uint8], ...] = ()
        if self.in_host_memory:
            self._sides = tuple(side.view(torch.uint8).numpy() for side in (arena.k, arena.v))
        self._flat = tuple(side.data.cast("B") for side in self._sides)

    def extents(self, layer: int, runs: Runs, heads: Span) -> list[tuple[int, int, int]]:
        """(side, byte begin, byte end) of the pieces of a slab, in slab order; side 0 is K, 1 is V.

        As many as there are runs for the arena's own heads; for fewer heads, which do not lie together, as many as
        there are tokens.
        """
        size, base = self.arena.side_token_bytes, layer * self.arena.num_slots
        columns = self._columns(heads)
        first, last = (column * self.head_bytes // 2 for column in (columns.start, columns.stop))
        rows = runs if heads == self.heads else [(slot, slot + 1) for run in runs for slot in range(*run)]
        return [
            (side, (base + a) * size + first, (base + b - 1) * size + last)
            for side in (0, 1)
            for a, b in rows
        ]

    def pieces(self, layer: int, runs: Runs, heads: Span) -> list[memoryview]:
        """The slab that these slot runs and heads make, as views into the arena."""
        return [self._flat[side][begin:end] for side, begin, end in self.extents(layer, runs, heads)]

    def addresses(self, layer: int, runs: Runs, heads: Span) -> list[tuple[int, int]]:
        """(address, bytes) of the same pieces."""
        bases = (self.arena.k.data_ptr(), self.arena.v.data_ptr())
        return [(bases[side] + begin, end - begin) for side, begin, end in self.extents(layer, runs, heads)]

    def scatter(self, payload: memoryview, layer: int, runs: Runs, heads: Span) -> None:
        """Copies a verified slab into the arena; `payload` holds exactly the tokens of `runs` and these heads."""
        if not self.in_host_memory:
            copy_to_device(payload, self.arena, layer, runs, self._columns(heads))
            return
        slab, position = np.frombuffer(payload, dtype=np.uint8), 0
        for side in self._sides:
            for begin, end in runs:
                # [tokens, heads, bytes]; with all heads of the arena it is contiguous, and copied as one.
                rows = side[layer, begin:end, self._columns(heads)]
                rows[...] = slab[position : position + rows.size].reshape(rows.shape)
                position += rows.size

    def _columns(self, heads: Span) -> slice:
        return slice(heads.begin - self.heads.begin, heads.end - self.heads.begin)


def copy_to_device(payload: memoryview, arena: KvArena, layer: int, runs: Runs, columns: slice) -> None:
    """Copies a slab's bytes into an arena that has no addresses of ours: one copy for each run of K and of V.

    `columns` are the places of the slab's heads in the arena.
    """
    slab, position = torch.frombuffer(bytearray(payload), dtype=arena.k.dtype), 0
    for side in (arena.k, arena.v):
        for begin, end in runs:
            rows = side[layer, begin:end, columns]  # [tokens, heads, head_dim]
            rows.copy_(slab[position : position + rows.numel()].view(rows.shape))
            position += rows.numel()


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


@dataclass(frozen=True)
class Fault:
    """One wrong field of a message."""

    field: str
    """Path from the message's root."""
    description: str
    """What is wrong with it."""


def format_fault(ours: KvFormat, theirs: KvFormat) -> Fault | None:
    """What is wrong with a source's format wherever it goes: no such element type, or not the shape of its model.

    Formats that are right and only not ours are for `format_mismatch` to tell.
    """
    if theirs.dtype not in _DTYPES:
        return Fault("dtype", f"{theirs.dtype!r} is none of {', '.join(_DTYPES)}")
    for name in _SHAPE_FIELDS:
        mine, value = getattr(ours, name), getattr(theirs, name)
        if value < 1 or (theirs.model_hash == ours.model_hash and value != mine):
            return Fault(name, f"is {value}; the model has {mine}")
    return None


def slab_fault(request: PushSlabsRequest, kv_format: KvFormat) -> Fault | None:
    """What is wrong with a slab that came in a stream, whatever was placed here."""
    header = request.header
    if fault := _impossible(header, kv_format):
        return Fault(f"header.{fault.field}", fault.description)
    if len(request.payload) != header.num_bytes:
        return Fault("payload", f"has {len(request.payload)} bytes, its header says {header.num_bytes}")
    return None


def header_fault(header: SlabHeader, tokens: Span, arena: ArenaBytes) -> str:
    """In words, why a header does not describe a slab of an expected token range; empty when it does."""
    if fault := _impossible(header, arena.kv_format):
        return fault.description
    if not tokens.begin <= header.token_begin < header.token_end <= tokens.end:
        return f"tokens [{header.token_begin}, {header.token_end}) are not in [{tokens.begin}, {tokens.end})"
    held = arena.heads
    if not held.begin <= header.head_begin < header.head_end <= held.end:
        return f"heads [{header.head_begin}, {header.head_end}) are not in [{held.begin}, {held.end})"
    return ""


def _impossible(header: SlabHeader, kv_format: KvFormat) -> Fault | None:
    """What no placement of any prompt could make right. Python's integers do not overflow."""
    if not 0 <= header.layer < kv_format.num_layers:
        return Fault("layer", f"layer {header.layer} of {kv_format.num_layers}")
    if not 0 <= header.token_begin < header.token_end:
        return Fault("token_begin", f"[{header.token_begin}, {header.token_end}) is no range of tokens")
    if not 0 <= header.head_begin < header.head_end <= kv_format.num_kv_heads:
        heads = f"[{header.head_begin}, {header.head_end})"
        return Fault("head_begin", f"heads {heads} are not in [0, {kv_format.num_kv_heads})")
    num_cells = (header.token_end - header.token_begin) * (header.head_end - header.head_begin)
    num_bytes = num_cells * 2 * kv_format.head_dim * _DTYPES[kv_format.dtype].itemsize
    if header.num_bytes != num_bytes:
        return Fault("num_bytes", f"{header.num_bytes} bytes where the tokens and heads have {num_bytes}")
    return None


def _format_of(arena: KvArena, announced: KvFormat) -> KvFormat:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    return KvFormat(
        model_hash=announced.model_hash,
        dtype=names.get(arena.k.dtype, str(arena.k.dtype)),
        layout_version=LAYOUT_VERSION,
        num_layers=arena.num_layers,
        # An arena may hold fewer heads than the model has, and never more.
        num_kv_heads=max(announced.num_kv_heads, arena.heads.end),
        head_dim=arena.head_dim,
    )
