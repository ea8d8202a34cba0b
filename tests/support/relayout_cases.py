"""Relayout from any prefill mesh to any decode mesh: cases to draw, and what must hold for each.

Imports no torch; the property test and the acceptance suite draw from the same cases.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sps2.internal.v1.placement_pb2 import HeldTokens, Placement, ShardPlacement
from sps2_engine.kv_transfer.relayout import Part, cut, num_cells, shares
from sps2_engine.kv_transfer.rows import cut_rows, num_before, row_of, tensor_source
from sps2_layout.layout import Span

MAX_RANKS = 8
NUM_CASES = 10_000
"""At full size."""
MAX_RATIO = 1.05
"""Bytes sent over the least that must be."""


@dataclass(frozen=True)
class Case:
    """A prompt on R = sequence x tensor ranks of prefill, wanted on D of decode."""

    num_kv_heads: int
    fold: int
    """Query heads of each KV head."""
    source_borders: tuple[int, ...]
    """Of the blocks of tokens; a sequence rank hosts one, or with `folded` two: the i-th and the i-th last."""
    folded: bool
    source_tp: int
    target_borders: tuple[int, ...]
    """The first is where tokens begin that the targets do not hold already."""
    target_tp: int
    head_bytes: int
    max_slab_bytes: int

    def hosted(self) -> list[list[Span]]:
        """Tokens of each sequence rank."""
        blocks = [Span(begin, end) for begin, end in pairwise(self.source_borders)]
        if not self.folded:
            return [[block] for block in blocks]
        half = len(blocks) // 2
        return [[blocks[i], blocks[-1 - i]] for i in range(half)]

    def placement(self) -> Placement:
        """Every tensor index of the targets holds its heads of all tokens; some may hold the same."""
        shards = [shard for index in range(self.target_tp) for shard in self._lane(index)]
        num_held = self.target_borders[0]
        return Placement(shards=shards, held=[HeldTokens(token_end=num_held)] if num_held else [])

    def _lane(self, tensor_index: int) -> Iterator[ShardPlacement]:
        heads = tensor_source(self.num_kv_heads, tensor_index, self.target_tp).heads
        all_heads = len(heads) == self.num_kv_heads
        for begin, end in pairwise(self.target_borders):
            shard = ShardPlacement(token_begin=begin, token_end=end)
            if not all_heads:
                shard.head_begin, shard.head_end = heads.begin, heads.end
            yield shard


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """1 to 8 ranks on both sides, any tensor degree that divides them, ragged blocks of tokens."""
    num_tokens = draw(st.integers(1, 600))
    source_sp, source_tp = draw(meshes())
    target_sp, target_tp = draw(meshes())
    folded = draw(st.booleans())
    num_kv_heads = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]))
    head_bytes = draw(st.integers(1, 300))
    return Case(
        num_kv_heads,
        draw(st.integers(1, 8)),
        draw(borders(num_tokens, source_sp * (2 if folded else 1))),
        folded,
        source_tp,
        draw(
            borders(
                num_tokens, target_sp, first=draw(st.sampled_from([0, 0, num_tokens // 2, num_tokens - 1]))
            )
        ),
        target_tp,
        head_bytes,
        draw(st.integers(num_kv_heads * head_bytes, 40 * num_kv_heads * head_bytes)),
    )


@st.composite
def meshes(draw: st.DrawFn) -> tuple[int, int]:
    """(sequence, tensor) degrees of 1 to 8 ranks."""
    num_ranks = draw(st.integers(1, MAX_RANKS))
    tensor = draw(st.sampled_from([degree for degree in range(1, num_ranks + 1) if num_ranks % degree == 0]))
    return num_ranks // tensor, tensor


@st.composite
def borders(draw: st.DrawFn, num_tokens: int, parts: int, first: int = 0) -> tuple[int, ...]:
    """Of that many parts, some of them empty."""
    inner = draw(st.lists(st.integers(first, num_tokens), min_size=parts - 1, max_size=parts - 1))
    return first, *sorted(inner), num_tokens


def check(case: Case) -> float:
    """Every (token, head) of every target comes once, from a rank that has it; bytes sent over the minimum."""
    placement = case.placement()
    shards = [
        np.zeros((shard.token_end - shard.token_begin, case.num_kv_heads), np.int64)
        for shard in placement.shards
    ]
    num_bytes = 0
    for hosted in case.hosted():
        for tensor_rank in range(case.source_tp):
            source = tensor_source(case.num_kv_heads, tensor_rank, case.source_tp)
            check_rank_has(case, source.heads, tensor_rank)
            first = num_before(hosted, case.target_borders[0])
            spans = cut_rows(hosted, source.rows(sum(map(len, hosted)), first))
            parts = shares(placement, spans, source.heads, case.num_kv_heads)
            num_bytes += num_cells(parts) * case.head_bytes
            for slab in (slab for part in parts for slab in cut(part, case.head_bytes, case.max_slab_bytes)):
                check_slab(case, placement.shards[slab.shard], slab, spans)
                first = slab.tokens.begin - placement.shards[slab.shard].token_begin
                shards[slab.shard][first : first + len(slab.tokens), slab.heads.slice] += 1
    least = 0
    for shard, counts in zip(placement.shards, shards, strict=True):
        held = Span(shard.head_begin, shard.head_end or case.num_kv_heads)
        assert (counts[:, held.slice] == 1).all(), f"{case}: {shard}"
        least += counts[:, held.slice].size * case.head_bytes
        assert counts.sum() == counts[:, held.slice].size
    assert num_bytes >= least > 0
    return num_bytes / least


def check_many(num_cases: int) -> list[float]:
    """Bytes sent over the minimum, of so many cases; each is checked."""
    ratios: list[float] = []

    @settings(max_examples=num_cases, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(case=cases())
    def every_case(case: Case) -> None:
        ratios.append(check(case))

    every_case()
    assert len(ratios) >= num_cases
    return ratios


def check_rank_has(case: Case, heads: Span, tensor_rank: int) -> None:
    """What a tensor rank sends is among the KV heads that its query heads read."""
    num_q_heads = case.num_kv_heads * case.fold
    if num_q_heads % case.source_tp == 0:
        first = tensor_rank * num_q_heads // case.source_tp
        end = first + num_q_heads // case.source_tp
        assert first // case.fold <= heads.begin < heads.end <= -(-end // case.fold)


def check_slab(case: Case, shard: ShardPlacement, slab: Part, spans: Sequence[Span]) -> None:
    """A slab lies in its shard, in a slot, and in rows of the source that follow each other."""
    assert shard.token_begin <= slab.tokens.begin < slab.tokens.end <= shard.token_end
    assert slab.num_cells * case.head_bytes <= case.max_slab_bytes
    last = row_of(spans, slab.tokens.end - 1)
    assert last - row_of(spans, slab.tokens.begin) == len(slab.tokens) - 1
