"""The resolved attention layout of a prompt: which query sees which key. Pure arithmetic.

CSA is a mask on shards (N equal slices of the prompt), defined in `attention.md`: a query sees its own shard up
to itself, the sinks, and, in earlier shards, the keys that its level samples; the prompt's tail sees everything.
With all strides 1 this is dense causal attention. A request that goes on where it stopped has its prompt's
layout, extended by the tokens that it has generated: dense queries behind the tail.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """A half-open range [begin, end) of tokens, shards, ranks or heads."""

    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end:
            raise ValueError(f"not a range: [{self.begin}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.begin

    def cut(self, begin: int, end: int) -> "Span":
        """The part of it that lies in [begin, end); empty where they do not meet."""
        first = min(max(self.begin, begin), max(end, begin))
        return Span(first, max(first, min(self.end, end)))

    @property
    def slice(self) -> slice:
        """The same as an index."""
        return slice(self.begin, self.end)


@dataclass(frozen=True)
class Level:
    """One level of the hierarchy of shards."""

    group: int
    """g: shards of one group."""
    stride: int
    """d: one of so many tokens is sampled."""


@dataclass(frozen=True)
class Sample:
    """Tokens of a span that a level samples for one KV head: those with token mod stride == offset."""

    span: Span
    stride: int
    offset: int

    @property
    def first(self) -> int:
        """The first sampled token; meaningless where there is none."""
        return self.span.begin + (self.offset - self.span.begin) % self.stride

    def __len__(self) -> int:
        return max(0, -(-(self.span.end - self.first) // self.stride))


@dataclass(frozen=True)
class Layout:
    """What is fixed at admission and travels with every attempt of a request."""

    num_tokens: int
    """S, tokens of the prompt that the mask is laid over."""
    levels: tuple[Level, ...]
    """[(1, 1), (g_1, d_1), ... (g_L, d_L)]; groups and strides each divide the next. Shards beyond the last
    group stay unseen."""
    num_shards: int
    """N."""
    shard_tokens: int
    """A, tokens of a shard; the last shards may be short or empty."""
    dense_queries: bool = False
    """Whether every query reads the sampled keys (True), or only the sampled queries (the paper's)."""
    sinks: int = 0
    """The first tokens, which every query sees."""
    tail: int = 0
    """The last tokens, which see everything."""
    num_extra: int = 0
    """Of them, those that `extended` has put behind the prompt; the last shard takes what no shard has room for."""

    def __post_init__(self) -> None:
        if self.num_tokens - self.num_extra < 1 or self.num_shards < 1 or min(self.sinks, self.tail) < 0:
            raise ValueError(f"not a layout: {self}")
        if not self.levels or self.levels[0] != Level(1, 1):
            raise ValueError("the first level is (1, 1): each shard sees itself, densely")
        for lower, upper in zip(self.levels, self.levels[1:], strict=False):
            if upper.group % lower.group or upper.stride % lower.stride or upper.group == lower.group:
                raise ValueError(f"groups and strides must each divide the next: {self.levels}")
        if self.num_shards % self.levels[-1].group:
            raise ValueError(f"groups of {self.levels[-1].group} must divide all {self.num_shards} shards")
        if (
            self.shard_tokens % self.levels[-1].stride
            or self.shard_tokens * self.num_shards < self.num_tokens - self.num_extra
        ):
            raise ValueError(f"shards of {self.shard_tokens} tokens do not cover the prompt by whole strides")

    def extended(self, num_tokens: int, num_prefilled: int | None = None) -> "Layout":
        """The same mask over the first tokens, and behind them dense queries up to `num_tokens` in all.

        What the first tokens see stays as it is: nobody sees later keys, and the tail begins where it began, or
        behind the first tokens where that is earlier.

        Args:
            num_tokens: of the text.
            num_prefilled: C, the first tokens; None: all that the mask was laid over.

        Raises:
            ValueError: the text has fewer tokens than these, or these are more than the mask is laid over.
        """
        first = self.num_tokens if num_prefilled is None else num_prefilled
        if not first <= min(num_tokens, self.num_tokens):
            raise ValueError(
                f"{first} tokens of a layout of {self.num_tokens} cannot be cut to a text of {num_tokens}"
            )
        dense = num_tokens - self.dense_from(first)
        extra = max(0, num_tokens - self.num_tokens + self.num_extra)
        return replace(self, num_tokens=num_tokens, tail=dense, num_extra=extra)

    def dense_from(self, num_prefilled: int) -> int:
        """The first token from which on every query sees everything, where so many have the mask."""
        return min(num_prefilled, self.tail_span.begin)

    def shard(self, index: int) -> Span:
        """Tokens of a shard."""
        begin = min(self.num_tokens, index * self.shard_tokens)
        is_last = index == self.num_shards - 1
        return Span(begin, self.num_tokens if is_last else min(self.num_tokens, begin + self.shard_tokens))

    def shard_of(self, token: int) -> int:
        """The shard that a token lies in."""
        return min(self.num_shards - 1, token // self.shard_tokens)

    def shards(self, first: int, last: int) -> Span:
        """Tokens of shards [first, last)."""
        return Span(self.shard(first).begin, max(self.shard(first).begin, self.shard(last - 1).end))

    def rank_tokens(self, rank: int, num_ranks: int) -> Span:
        """Tokens of a rank that hosts N / P consecutive shards; none for ranks beyond the P."""
        hosted = self.num_shards // num_ranks
        return self.shards(rank * hosted, (rank + 1) * hosted)

    @property
    def tail_span(self) -> Span:
        """Tokens that see everything."""
        return Span(max(0, self.num_tokens - self.tail), self.num_tokens)

    @property
    def sink_span(self) -> Span:
        """Tokens that everybody sees."""
        return Span(0, min(self.sinks, self.num_tokens))

    def offset(self, level: int, kv_head: int, layer: int) -> int:
        """f(l): which of a stride's tokens a KV head samples; shared by its query heads."""
        return (kv_head + layer) % self.levels[level].stride

    def keys(self, span: Span, level: int, kv_head: int, layer: int) -> Sample:
        """Keys of a span that a level samples; sinks are seen by everybody anyway and are not among them."""
        kept = span.cut(len(self.sink_span), self.num_tokens)
        return Sample(kept, self.levels[level].stride, self.offset(level, kv_head, layer))

    def queries(self, span: Span, level: int, kv_head: int, layer: int) -> Sample:
        """Queries of a span that read at a level; the tail sees everything anyway and is not among them."""
        kept = span.cut(0, self.tail_span.begin)
        if self.dense_queries:
            return Sample(kept, 1, 0)
        return Sample(kept, self.levels[level].stride, self.offset(level, kv_head, layer))

    @property
    def is_exact(self) -> bool:
        """Whether it is dense causal attention."""
        return self.levels[-1].group == self.num_shards and self.levels[-1].stride == 1


def exact_layout(num_tokens: int, num_ranks: int) -> Layout:
    """Dense causal attention, one shard for each rank: slices of ceil(S / P), any P."""
    levels = (Level(1, 1),) if num_ranks == 1 else (Level(1, 1), Level(num_ranks, 1))
    return Layout(num_tokens, levels, num_ranks, -(-num_tokens // num_ranks))
