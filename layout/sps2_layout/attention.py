"""How one request's prompt is attended: what is fixed at admission and travels with every attempt."""

from dataclasses import dataclass
from typing import Self

from sps2_layout.layout import Layout, exact_layout
from sps2_layout.profiles import Ladder


@dataclass(frozen=True)
class Attention:
    """Exact attention, or CSA under one layout."""

    num_tokens: int
    """S0, tokens that the mask is laid over."""
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

    def sliced(self, group_size: int, num_generated: int = 0) -> Layout:
        """The layout that a group computes by, over `num_ranks` of its ranks.

        Args:
            group_size: ranks of the group.
            num_generated: tokens behind the prompt that the request has generated in earlier attempts: dense queries.
        """
        num_tokens = self.num_tokens + num_generated
        if self.layout is None:
            return exact_layout(num_tokens, self.num_ranks(group_size))
        return self.layout.extended(num_tokens)

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
