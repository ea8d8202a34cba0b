"""How one request's prompt is attended: what is fixed at admission and travels with every attempt."""

from dataclasses import dataclass, replace
from typing import Self

from sps2_layout.layout import Layout, exact_layout
from sps2_layout.profiles import Ladder


@dataclass(frozen=True)
class Attention:
    """Exact attention, or CSA under one layout."""

    num_tokens: int
    """S0, tokens that the mask is laid over: those of the prompt, or of the one whose cached beginning it adopts."""
    num_prefilled: int
    """C <= S0, tokens prefilled under the mask; what follows is dense."""
    layout: Layout | None = None
    """CSA's; None: exact, whose slices follow from the number of ranks."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_prefilled <= self.num_tokens:
            raise ValueError(f"{self.num_prefilled} of {self.num_tokens} tokens cannot be prefilled")
        if self.layout is None:
            return
        if self.layout.num_tokens != self.num_tokens:
            raise ValueError(f"a layout of {self.layout.num_tokens} tokens for a mask of {self.num_tokens}")
        sizes = (self.layout.num_shards, *(level.group for level in self.layout.levels))
        if any(size & (size - 1) for size in sizes):
            raise ValueError("shards and groups must be powers of two")

    @classmethod
    def admit(cls, ladder: Ladder, num_tokens: int) -> Self:
        """That of a new prompt: by its length alone."""
        return cls(num_tokens, num_tokens, ladder.resolve(num_tokens))

    def num_ranks(self, group_size: int) -> int:
        """P: how many ranks of a group work on it, rank 0 first; for CSA the most that divide its shards.

        Shards and groups are powers of two, so the shards of a rank never cut through a group either.
        """
        if self.layout is None:
            return group_size
        return min(self.layout.num_shards, 1 << (group_size.bit_length() - 1))

    def sliced(self, group_size: int, num_tokens: int | None = None) -> Layout:
        """The layout that a group computes by, over `num_ranks` of its ranks.

        Args:
            group_size: ranks of the group.
            num_tokens: of the text, those behind the first C are dense queries; None: as many as the mask has.
        """
        num_tokens = self.num_tokens if num_tokens is None else num_tokens
        if self.layout is None:
            return exact_layout(num_tokens, self.num_ranks(group_size))
        return self.layout.extended(num_tokens, self.num_prefilled)

    @property
    def dense_from(self) -> int:
        """The first token from which on every query sees everything."""
        return 0 if self.layout is None else self.layout.dense_from(self.num_prefilled)

    @property
    def of_any_length(self) -> "Attention":
        """What tells how KV was made: exact KV is the same whatever the length of the prompt."""
        return self if self.layout is not None else Attention(1, 1)

    def num_usable(self, cached: "Attention", num_tokens: int) -> int:
        """How many leading tokens of a text have the same KV under this attention as they were given.

        The rest can be computed as dense queries behind them, which is what this attention asks for only from
        `dense_from` on: fewer are of no use.

        Args:
            cached: under which the KV was made.
            num_tokens: leading tokens of which there is KV.
        """
        if self.layout != cached.layout:
            return 0
        if self.layout is not None and self.num_prefilled != cached.num_prefilled:
            num_tokens = min(num_tokens, self.num_prefilled, cached.num_prefilled)
        return num_tokens if num_tokens >= self.dense_from else 0

    def adopting(self, num_tokens: int) -> "Attention":
        """That of a text which takes over so many leading tokens whose KV was made under this one."""
        return replace(self, num_prefilled=min(num_tokens, self.num_prefilled))

    def describe(self) -> str:
        """The mask in one line: "exact", or "N=8 A=4096 levels (1,1),(8,8) sampled tail 64 sinks 0"."""
        layout = self.layout
        if layout is None:
            return "exact"
        levels = ",".join(f"({level.group},{level.stride})" for level in layout.levels)
        return (
            f"N={layout.num_shards} A={layout.shard_tokens} levels {levels} "
            f"{'dense' if layout.dense_queries else 'sampled'} tail {layout.tail} sinks {layout.sinks}"
        )
