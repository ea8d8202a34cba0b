"""Attention of one mixed step: decode rows over their pages, chunks of prompts over what lies before them.

Dense and on one rank, by the kernels of the served engine. Knows nothing of requests' texts or of sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps2_engine.kv_pool import KvArena
from sps2_kernels.merge_states import merge_states
from sps2_kernels.paged_decode import PagedRows, SlotRuns, paged_decode_partial
from sps2_kernels.segment_attention import segment_attention


@dataclass(frozen=True)
class PieceKv:
    """Where a piece's keys lie: all tokens of its text up to its end, in token order."""

    begin: int
    """Place of its first token in the text."""
    runs: SlotRuns
    """Cache slots of the text's tokens [0, end), those of the piece included."""
    new_slots: tuple[int, ...]
    """Slots of the piece's own tokens."""


class MixedBatch:
    """Implements `sps2_engine.models.Attend` for the rows of one step: `decodes`, one row each, then `chunks`."""

    def __init__(
        self, decodes: Sequence[PieceKv], chunks: Sequence[PieceKv], arena: KvArena, scale: float
    ) -> None:
        self._arena = arena
        self._scale = scale
        self._chunks = chunks
        device = arena.k.device
        self._rows = PagedRows([one.runs for one in decodes], device)
        slots = [slot for one in (*decodes, *chunks) for slot in one.new_slots]
        self._new_slots = torch.tensor(slots, dtype=torch.int64, device=device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends k and v [rows, kv_heads, head_dim], then attends: q [rows, q_heads, head_dim] -> o."""
        k_cache, v_cache = self._arena.k[layer], self._arena.v[layer]
        q = q.to(k_cache.dtype)
        k_cache.index_copy_(0, self._new_slots, k.to(k_cache.dtype))
        v_cache.index_copy_(0, self._new_slots, v.to(v_cache.dtype))
        begin, parts = len(self._rows), []
        if begin:
            parts.append(paged_decode_partial(q[:begin], k_cache, v_cache, self._rows, self._scale)[0])
        for chunk in self._chunks:
            end = begin + len(chunk.new_slots)
            parts.append(self._attend_chunk(q[begin:end], k_cache, v_cache, chunk))
            begin = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_chunk(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: PieceKv) -> Tensor:
        """Causal attention of a chunk over each run of its text's keys; one run, as a rule, which is a view."""
        states, seen = [], 0
        for begin, end in chunk.runs:
            states.append(
                segment_attention(q, k_cache[begin:end], v_cache[begin:end], chunk.begin - seen, self._scale)
            )
            seen += end - begin
        if len(states) == 1:
            return states[0][0]
        return merge_states(torch.stack([o for o, _ in states]), torch.stack([lse for _, lse in states]))[0]
