"""Paged KV of one rank: the arena that holds it and the pool that hands its blocks out.

A block is 64 tokens of every layer; block b owns the token slots [64 b, 64 (b + 1)) of each layer. The arena
knows nothing about requests, the pool nothing about tensors.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from sps2_layout.layout import Span

BLOCK_TOKENS = 64


class OutOfBlocksError(Exception):
    """The pool holds fewer free blocks than were asked for; nothing was allocated."""

    def __init__(self, num_wanted: int, num_free: int) -> None:
        super().__init__(f"{num_wanted} KV blocks wanted, {num_free} free")
        self.num_wanted = num_wanted
        self.num_free = num_free


class KvArena:
    """All KV of one rank, allocated once; pages that were never written cost no memory.

    `k` and `v` are [num_layers, num_blocks * 64, num_kv_heads, head_dim], contiguous. A tensor rank's arena holds
    `num_kv_heads` of the model's KV heads, from `first_head` on.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        first_head: int = 0,
    ) -> None:
        shape = (num_layers, num_blocks * BLOCK_TOKENS, num_kv_heads, head_dim)
        # empty, not zeros: the kernel gives pages on first touch, so a large arena is free until it is used.
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.num_kv_heads = num_kv_heads
        self.heads = Span(first_head, first_head + num_kv_heads)
        """The same, numbered as in the model."""
        self.head_dim = head_dim

    @property
    def num_slots(self) -> int:
        """Token slots per layer."""
        return self.num_blocks * BLOCK_TOKENS

    @property
    def side_token_bytes(self) -> int:
        """Bytes of one token in one layer of K alone, or of V alone."""
        return self.num_kv_heads * self.head_dim * self.k.element_size()


class BlockPool:
    """Which blocks of an arena are free.

    A used block has one or more owners: `share` adds one, `free` takes one away, and the last one's `free` makes
    the block free. Invariants: a block is either free or used, never both, never twice; free + used = all. Not
    thread-safe: the engine loop owns it.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks is {num_blocks}")
        self.num_blocks = num_blocks
        # Free blocks as disjoint runs [begin, end), ascending, never adjacent: freeing merges neighbours.
        self._free_runs: list[tuple[int, int]] = [(0, num_blocks)] if num_blocks else []
        self._owners: dict[int, int] = {}  # of each used block

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return self.num_blocks - len(self._owners)

    @property
    def num_used(self) -> int:
        """Blocks that are allocated."""
        return len(self._owners)

    @property
    def owners(self) -> Counter[int]:
        """How many owners each used block has."""
        return Counter(self._owners)

    def allocate(self, num_blocks: int) -> list[int]:
        """Block ids: one contiguous run if there is one (first fit), else the longest runs first.

        Raises:
            OutOfBlocksError: fewer are free; nothing changed.
            ValueError: a negative number.
        """
        if num_blocks < 0:
            raise ValueError(f"num_blocks is {num_blocks}")
        if num_blocks > self.num_free:
            raise OutOfBlocksError(num_blocks, self.num_free)
        blocks: list[int] = []
        for begin, end in self._choose_runs(num_blocks):
            taken_end = min(end, begin + num_blocks - len(blocks))
            blocks.extend(range(begin, taken_end))
            index = self._free_runs.index((begin, end))
            self._free_runs[index : index + 1] = [(taken_end, end)] if taken_end < end else []
        self._owners.update(dict.fromkeys(blocks, 1))
        return blocks

    def _choose_runs(self, num_blocks: int) -> list[tuple[int, int]]:
        for run in self._free_runs:
            if run[1] - run[0] >= num_blocks:
                return [run] if num_blocks else []
        chosen: list[tuple[int, int]] = []
        missing = num_blocks
        for run in sorted(self._free_runs, key=lambda run: run[0] - run[1]):
            if missing <= 0:
                break
            chosen.append(run)
            missing -= run[1] - run[0]
        return chosen

    def share(self, blocks: Iterable[int]) -> None:
        """Adds an owner to each block.

        Raises:
            ValueError: one of them is not allocated, or is named twice; nothing changed.
        """
        for block in self._checked(blocks):
            self._owners[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Takes an owner from each block; a block without one is free.

        Raises:
            ValueError: one of them is not allocated, or is named twice; nothing changed.
        """
        returned = self._checked(blocks)
        for block in returned:
            self._owners[block] -= 1
        ownerless = sorted(block for block in returned if not self._owners[block])
        for block in ownerless:
            del self._owners[block]
        for run in merge_runs((block, block + 1) for block in ownerless):
            self._insert_run(*run)

    def _checked(self, blocks: Iterable[int]) -> list[int]:
        named = list(blocks)
        if len(set(named)) != len(named):
            raise ValueError("a block is named twice in one call")
        if not self._owners.keys() >= set(named):
            raise ValueError(f"blocks {sorted(set(named) - self._owners.keys())} are not allocated")
        return named

    def _insert_run(self, begin: int, end: int) -> None:
        index = bisect_left(self._free_runs, (begin, end))
        first, last = index, index
        if first > 0 and self._free_runs[first - 1][1] == begin:
            first -= 1
            begin = self._free_runs[first][0]
        if last < len(self._free_runs) and self._free_runs[last][0] == end:
            end = self._free_runs[last][1]
            last += 1
        self._free_runs[first:last] = [(begin, end)]

    def check(self) -> None:
        """Verifies the invariants, in time proportional to the pool; for debug runs and tests.

        Raises:
            AssertionError: the pool is broken, with what is wrong.
        """
        free = [block for begin, end in self._free_runs for block in range(begin, end)]
        if len(free) != len(set(free)):
            raise AssertionError("a block is free twice")
        used = self._owners.keys()
        if not used.isdisjoint(free):
            raise AssertionError(f"blocks {sorted(used & set(free))} are free and used")
        if used | set(free) != set(range(self.num_blocks)):
            raise AssertionError("free + used is not all")
        if any(count < 1 for count in self._owners.values()):
            raise AssertionError("a used block has no owner")
        if any(
            left[1] >= right[0] for left, right in zip(self._free_runs, self._free_runs[1:], strict=False)
        ):
            raise AssertionError("free runs are out of order or not merged")


def slot_runs(blocks: Sequence[int], token_count: int, first_token: int = 0) -> list[tuple[int, int]]:
    """Contiguous slot runs [begin, end) that hold `token_count` tokens of a request, in token order.

    `blocks` are the request's blocks on this rank in token order; token 0 lies in the first slot of the first
    block, and the runs begin at token `first_token`. Adjacent blocks become one run, so that attention and
    transfers take views as large as the allocation allows.

    Raises:
        ValueError: the blocks hold fewer tokens than that.
    """
    if first_token < 0 or token_count < 0 or first_token + token_count > len(blocks) * BLOCK_TOKENS:
        raise ValueError(f"tokens {first_token}+{token_count} do not lie in {len(blocks)} blocks")
    if token_count == 0:
        return []
    end_token = first_token + token_count
    touched = range(first_token // BLOCK_TOKENS, (end_token - 1) // BLOCK_TOKENS + 1)
    return merge_runs(
        (
            blocks[i] * BLOCK_TOKENS + max(first_token - i * BLOCK_TOKENS, 0),
            blocks[i] * BLOCK_TOKENS + min(end_token - i * BLOCK_TOKENS, BLOCK_TOKENS),
        )
        for i in touched
    )


def merge_runs(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same runs in the same order, each joined with the next where one ends at the other's begin."""
    merged: list[tuple[int, int]] = []
    for begin, end in runs:
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged
