"""Rows of a source's blocks: its tokens, span after span, and the part of them that each replica sends.

Pure. A source process may host several spans of a prompt's tokens; several may hold the same heads of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sps2_engine.kv_pool import slot_runs
from sps2_layout.layout import Span


@dataclass(frozen=True)
class TensorSource:
    """What one tensor rank of a source sends, of the tokens that all tensor ranks have.

    Where there are more tensor ranks than KV heads, several hold the same head. They split its tokens, rather than
    one of them sending all: it takes as many links and rings as there are, the slowest source has the least to do,
    and each needs blocks for its part only.
    """

    heads: Span
    """KV heads that it sends, numbered as in the model; its arena needs no others."""
    replica: int
    """Its place among the ranks that send the same heads."""
    num_replicas: int

    def rows(self, num_rows: int, first: int = 0) -> Span:
        """Which of the source's rows [first, num_rows) it sends: each replica about as many, each row once."""
        ends = (first + (num_rows - first) * i // self.num_replicas for i in (self.replica, self.replica + 1))
        return Span(*ends)


def tensor_source(num_kv_heads: int, tensor_rank: int, tensor_size: int) -> TensorSource:
    """What that tensor rank sends; together they send each head of each token once.

    A rank computes the KV heads that its query heads read, [floor(t H / T), ceil((t + 1) H / T)); what it sends
    lies within. Neither of H and T needs to divide the other.

    Raises:
        ValueError: there is no such rank.
    """
    if not 0 <= tensor_rank < tensor_size or num_kv_heads < 1:
        raise ValueError(f"no tensor rank {tensor_rank} of {tensor_size} with {num_kv_heads} KV heads")
    first = tensor_rank * num_kv_heads // tensor_size
    last = (tensor_rank + 1) * num_kv_heads // tensor_size
    if tensor_size <= num_kv_heads:
        return TensorSource(Span(first, last), 0, 1)
    # The ranks t with floor(t H / T) == first.
    begin, end = (-(-head * tensor_size // num_kv_heads) for head in (first, first + 1))
    return TensorSource(Span(first, first + 1), tensor_rank - begin, end - begin)


@dataclass(frozen=True)
class Rows:
    """Tokens of a source, and where they lie in its arena."""

    spans: Sequence[Span]
    """In order and disjoint."""
    blocks: Sequence[int]
    """They hold the tokens of the spans one after another: no span begins a new block, the first token lies in the
    first slot of the first block."""

    def slots(self, tokens: Span) -> list[tuple[int, int]]:
        """The slot runs of a part of one of the spans.

        Raises:
            ValueError: it lies in none of them, or the blocks have no room for it.
        """
        return slot_runs(self.blocks, len(tokens), row_of(self.spans, tokens.begin))


@dataclass(frozen=True)
class UsedRows:
    """What a text uses of rows: all, or what begins as it does. The rest belongs to another text."""

    rows: Rows
    spans: Sequence[Span]
    """Tokens of the text that lie in the rows, in order and disjoint; maybe none."""

    @classmethod
    def of_all(cls, rows: Rows) -> "UsedRows":
        """Rows that are the text's alone."""
        return cls(rows, rows.spans)

    def hold(self, tokens: Span) -> bool:
        """Whether these lie within one of the spans."""
        return any(span.begin <= tokens.begin and tokens.end <= span.end for span in self.spans)

    def slots(self) -> list[tuple[int, int]]:
        """Where they lie, span after span."""
        return [run for span in self.spans for run in self.rows.slots(span)]


def row_of(spans: Sequence[Span], token: int) -> int:
    """The row of a token of the spans: how many of their tokens come before it.

    Raises:
        ValueError: it lies in none of them.
    """
    row = 0
    for span in spans:
        if span.begin <= token < span.end:
            return row + token - span.begin
        row += len(span)
    raise ValueError(f"token {token} lies in none of {list(spans)}")


def num_before(spans: Sequence[Span], token: int) -> int:
    """Rows whose tokens come before that token of the prompt."""
    return sum(len(span.cut(0, token)) for span in spans)


def cut_rows(spans: Sequence[Span], rows: Span) -> list[Span]:
    """The tokens of rows [begin, end), as spans that are not empty."""
    found: list[Span] = []
    position = 0
    for span in spans:
        shift = span.begin - position
        common = Span(position, position + len(span)).cut(rows.begin, rows.end)
        if common:
            found.append(Span(common.begin + shift, common.end + shift))
        position += len(span)
    return found
