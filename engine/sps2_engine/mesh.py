"""The mesh of a group: sequence x tensor ranks, and what of the model a tensor rank holds. Pure.

Tensor ranks sum what they compute twice in every layer, sequence ranks exchange parts of attention once, so the
tensor ranks of one sequence index stand next to each other, where they share a node:

    rank           0  1  2  3  4  5  6  7       sp = 4, tp = 2
    sequence index 0  0  1  1  2  2  3  3       which tokens: a slice of the prompt, or of the KV of requests
    tensor index   0  1  0  1  0  1  0  1       which part of every layer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from sps2_layout.layout import Span


@dataclass(frozen=True)
class Mesh:
    """Ranks of a group, by sequence index and tensor index.

    Raises:
        ValueError: not at least one of each.
    """

    sp: int = 1
    """Sequence degree: slices of the prompt, or decode ranks over which the KV of a request may lie."""
    tp: int = 1
    """Tensor degree: parts of every layer."""

    def __post_init__(self) -> None:
        if min(self.sp, self.tp) < 1:
            raise ValueError(f"a mesh has at least one rank each way, not {self.sp} x {self.tp}")

    @classmethod
    def of(cls, num_ranks: int, tp: int) -> Self:
        """The mesh of a group that splits every layer `tp` ways.

        Raises:
            ValueError: the group is no multiple of `tp`.
        """
        if tp < 1 or num_ranks % tp:
            raise ValueError(
                f"a group of {num_ranks} ranks cannot be cut into tensor groups of {tp}: "
                f"make its size a multiple of {tp}, or change --tp"
            )
        return cls(num_ranks // tp, tp)

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self.sp * self.tp

    def sequence_index(self, rank: int) -> int:
        """Which slice of the prompt a rank computes, or which tokens' KV it holds."""
        return rank // self.tp

    def tensor_index(self, rank: int) -> int:
        """Which part of every layer a rank holds."""
        return rank % self.tp

    def sequence_ranks(self, rank: int) -> Sequence[int]:
        """The ranks that hold the same part of the model, in order of their sequence index."""
        return range(self.tensor_index(rank), self.size, self.tp)

    def tensor_ranks(self, rank: int) -> Sequence[int]:
        """The ranks that compute the same tokens, in order of the model's parts."""
        return self.ranks_at(self.sequence_index(rank))

    def ranks_at(self, sequence_index: int) -> Sequence[int]:
        """The tensor ranks of one sequence index, in order of the model's parts."""
        first = sequence_index * self.tp
        return range(first, first + self.tp)


@dataclass(frozen=True)
class Part:
    """A range of one dimension of a tensor, and how long all of that dimension is."""

    span: Span
    whole: int

    def __post_init__(self) -> None:
        if self.span.end > self.whole:
            raise ValueError(f"{self.span} is no part of {self.whole}")

    @classmethod
    def all(cls, whole: int) -> Self:
        """All of a dimension."""
        return cls(Span(0, whole), whole)

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return len(self.span) == self.whole

    def __len__(self) -> int:
        return len(self.span)

    def times(self, size: int) -> "Part":
        """The same part where each unit (a head) takes `size` places (its elements)."""
        return Part(Span(self.span.begin * size, self.span.end * size), self.whole * size)


@dataclass(frozen=True)
class TensorShare:
    """What one of `tp` tensor ranks holds of a model."""

    index: int = 0
    """Tensor index, 0 to tp - 1."""
    tp: int = 1
    """Tensor degree."""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.tp:
            raise ValueError(f"tensor index {self.index} is outside {self.tp} tensor ranks")

    def q_heads(self, num_q_heads: int) -> Part:
        """Query heads: as many on every rank.

        Raises:
            ValueError: `tp` does not divide them.
        """
        return self._even(num_q_heads, "query heads")

    def kv_heads(self, num_kv_heads: int) -> Part:
        """KV heads that its query heads read: its own, or where there are fewer than ranks one held by several.

        Raises:
            ValueError: neither of heads and ranks divides the other.
        """
        if self.tp % num_kv_heads and num_kv_heads % self.tp:
            raise ValueError(
                f"{num_kv_heads} KV heads cannot be spread over {self.tp} tensor ranks evenly: take a --tp that "
                f"divides {num_kv_heads}, or a multiple of it"
            )
        first = self.index * num_kv_heads // self.tp
        return Part(Span(first, first + max(1, num_kv_heads // self.tp)), num_kv_heads)

    def columns(self, intermediate_size: int) -> Part:
        """Columns inside a feed-forward block: as many on every rank.

        Raises:
            ValueError: `tp` does not divide them.
        """
        return self._even(intermediate_size, "columns of the feed-forward blocks (intermediate_size)")

    def vocabulary(self, vocab_size: int) -> Part:
        """Token ids whose rows of embedding and output matrix it holds; as even as they come, none is padded.

        Raises:
            ValueError: there are fewer token ids than ranks.
        """
        if vocab_size < self.tp:
            raise ValueError(f"{vocab_size} token ids are too few for {self.tp} tensor ranks: lower --tp")
        return Part(
            Span(self.index * vocab_size // self.tp, (self.index + 1) * vocab_size // self.tp), vocab_size
        )

    def _even(self, whole: int, what: str) -> Part:
        if whole % self.tp:
            raise ValueError(
                f"{whole} {what} cannot be split {self.tp} ways: take a --tp that divides {whole}"
            )
        each = whole // self.tp
        return Part(Span(self.index * each, (self.index + 1) * each), whole)


WHOLE_MODEL = TensorShare()
"""The share of a rank that is alone with every layer."""
