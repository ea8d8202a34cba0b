"""The plan of exact sequence-parallel prefill: which rank has which tokens and heads, and what is exchanged.

Pure: no torch, no ranks at work, no clock. Every rank makes the same plan from the same numbers, so nothing about
shapes ever travels. Exact mode is the one level of `attention.md` in which every stride is 1: each rank attends its
own slice itself, and what lies across slices ("rectangles") is computed by heads, each rank for its share of them.
"""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Span:
    """A half-open range [begin, end) of tokens or heads."""

    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end:
            raise ValueError(f"not a range: [{self.begin}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class HeadRun:
    """Query heads that share a whole number of KV heads evenly: one attention call serves them."""

    q_heads: Span
    kv_heads: Span


def split_tokens(num_tokens: int, num_ranks: int) -> tuple[Span, ...]:
    """Contiguous slices of ceil(S / P) tokens; the last ones may be short or empty (`exact` of attention.md)."""
    width = -(-num_tokens // num_ranks)
    return tuple(
        Span(min(num_tokens, rank * width), min(num_tokens, (rank + 1) * width)) for rank in range(num_ranks)
    )


def split_heads(num_q_heads: int, num_ranks: int) -> tuple[Span, ...]:
    """Contiguous shares of the query heads, as even as they come (14 heads over 4 ranks: 3, 4, 3, 4)."""
    return tuple(
        Span(rank * num_q_heads // num_ranks, (rank + 1) * num_q_heads // num_ranks) for rank in range(num_ranks)
    )


def kv_heads_of(q_heads: Span, group: int) -> Span:
    """KV heads that a run of query heads reads, `group` query heads to a KV head."""
    if not len(q_heads):
        return Span(q_heads.begin // group, q_heads.begin // group)
    return Span(q_heads.begin // group, (q_heads.end - 1) // group + 1)


def head_runs(q_heads: Span, group: int) -> tuple[HeadRun, ...]:
    """Cuts a run of query heads where it covers a KV head only partly, so that each piece is regular."""
    pieces: list[HeadRun] = []
    for kv_head in range(kv_heads_of(q_heads, group).begin, kv_heads_of(q_heads, group).end):
        begin, end = max(q_heads.begin, kv_head * group), min(q_heads.end, (kv_head + 1) * group)
        last = pieces[-1] if pieces else None
        if last and end - begin == group and len(last.q_heads) == group * len(last.kv_heads):
            pieces[-1] = HeadRun(Span(last.q_heads.begin, end), Span(last.kv_heads.begin, kv_head + 1))
        else:
            pieces.append(HeadRun(Span(begin, end), Span(kv_head, kv_head + 1)))
    return tuple(pieces)


@dataclass(frozen=True)
class PrefillPlan:
    """Slices, head shares and exchange sizes of one prompt on P ranks.

    A rank that has tokens before others sends them K and V; one that has tokens after others sends Q. So the last
    rank with tokens sends no K and V, and the first no Q: the causal ring needs none.
    """

    num_tokens: int
    """S, tokens of the prompt."""
    num_ranks: int
    """P."""
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    """Bytes of an element of q, k, v and o."""

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or self.num_ranks < 1:
            raise ValueError(f"nothing to plan: {self.num_tokens} tokens on {self.num_ranks} ranks")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} KV heads do not divide {self.num_q_heads} query heads")

    @cached_property
    def slices(self) -> tuple[Span, ...]:
        """Tokens of each rank."""
        return split_tokens(self.num_tokens, self.num_ranks)

    @cached_property
    def last_rank(self) -> int:
        """Rank that has the last prompt token, and samples."""
        return max(rank for rank, span in enumerate(self.slices) if len(span))

    @cached_property
    def q_heads(self) -> tuple[Span, ...]:
        """Query heads that each rank computes rectangles for."""
        return split_heads(self.num_q_heads, self.num_ranks)

    @property
    def group(self) -> int:
        """Query heads to a KV head."""
        return self.num_q_heads // self.num_kv_heads

    def kv_heads(self, rank: int) -> Span:
        """KV heads that a rank needs for its share; shares may overlap (replication) where P > Hkv."""
        return kv_heads_of(self.q_heads[rank], self.group)

    @property
    def exchanges(self) -> bool:
        """Whether any token lies beyond rank 0, so that there is anything to exchange."""
        return self.last_rank > 0

    def sends_kv(self, rank: int) -> bool:
        """Whether later ranks read this rank's keys."""
        return rank < self.last_rank and len(self.slices[rank]) > 0

    def sends_q(self, rank: int) -> bool:
        """Whether this rank's queries read earlier keys."""
        return rank > 0 and len(self.slices[rank]) > 0

    def kv_plane_bytes(self, source: int, peer: int) -> int:
        """Bytes of K (or of V) that `peer` needs of `source`."""
        if not self.sends_kv(source) or not len(self.q_heads[peer]):
            return 0
        return len(self.slices[source]) * len(self.kv_heads(peer)) * self.head_dim * self.element_bytes

    def q_plane_bytes(self, source: int, peer: int) -> int:
        """Bytes of Q that `peer` needs of `source`; O comes back in as many."""
        if not self.sends_q(source):
            return 0
        return len(self.slices[source]) * len(self.q_heads[peer]) * self.head_dim * self.element_bytes

    def lse_plane_bytes(self, source: int, peer: int) -> int:
        """Bytes of fp32 log-sum-exp that `peer` returns to `source` beside O."""
        return len(self.slices[source]) * len(self.q_heads[peer]) * 4 if self.sends_q(source) else 0

    def in_bytes(self, source: int, peer: int) -> int:
        """Bytes posted from `source` to `peer` on the way in: [K | V | Q]."""
        if source == peer:
            return 0
        return 2 * self.kv_plane_bytes(source, peer) + self.q_plane_bytes(source, peer)

    def out_bytes(self, source: int, peer: int) -> int:
        """Bytes posted from `source` (which computed) to `peer` (whose queries they are): [O | LSE]."""
        if source == peer:
            return 0
        return self.q_plane_bytes(peer, source) + self.lse_plane_bytes(peer, source)

    def bytes_per_layer(self) -> int:
        """Bytes that all ranks together post for one layer, in and out."""
        ranks = range(self.num_ranks)
        return sum(self.in_bytes(a, b) + self.out_bytes(a, b) for a in ranks for b in ranks)
