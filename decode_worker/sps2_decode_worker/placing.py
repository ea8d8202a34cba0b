"""Where an attempt's prompt and output go in a decode group, and how many blocks that takes. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sps2.internal.v1 import prefill_service_pb2
from sps2_decode_worker.sharing import NO_PREFIX, HeldBlocks, Prefix
from sps2_engine.attention.decode_plan import choose_holders, place_tokens

TOKENS_AHEAD = 64
"""New tokens of each choice that have room from the beginning; a row takes blocks for more as they come."""


def max_new_tokens(choice: prefill_service_pb2.TokenChoice) -> int:
    """Most tokens that an attempt draws for each of its choices: earlier attempts may have drawn some."""
    return choice.max_tokens - len(choice.generated_token_ids)


def tokens_ahead(max_new_tokens: int) -> int:
    """New tokens of a choice that has at most so many for which its row is given room at first."""
    return min(TOKENS_AHEAD, max_new_tokens)


@dataclass(frozen=True)
class Asked:
    """What an attempt asks room for."""

    num_tokens: int
    """That prefill delivers, >= 1."""
    max_new_tokens: int
    """Most tokens of each choice after these, >= 1."""
    num_choices: int = 1
    """Rows that share the prompt."""
    prefix: Prefix = NO_PREFIX
    """Names of the prompt's full blocks."""


@dataclass(frozen=True)
class BlockCounts:
    """Blocks of the ranks of a group."""

    total: tuple[int, ...]
    """All that a rank has."""
    room: tuple[int, ...]
    """What may be taken now."""
    num_at_home: tuple[int, ...]
    """Rows that live at each rank."""


@dataclass(frozen=True)
class Places:
    """An attempt's room when it comes."""

    home: int
    shards: dict[int, tuple[int, int]]
    """Tokens [begin, end) of the prompt that prefill delivers to each rank: those behind what is held."""
    blocks: dict[int, int]
    """Blocks of one row on each holder, the shared ones included."""
    shared: dict[int, int]
    """Of these the ones that all rows share: whole ones of the prompt, into which no row appends."""
    max_new_tokens: int
    """Most tokens of a row after the prompt, the one that prefill samples included."""
    block_tokens: int
    held: tuple[HeldBlocks, ...] = ()
    """Leading blocks of the prompt that another attempt has brought, in order; among the shared ones."""

    @property
    def holders(self) -> frozenset[int]:
        """Ranks that hold blocks of it."""
        return frozenset(self.blocks)

    def held_at(self, rank: int) -> int:
        """Blocks on a rank that another attempt has brought."""
        return sum(one.num_blocks for one in self.held if one.rank == rank)

    @property
    def brought(self) -> list[HeldBlocks]:
        """Shared blocks that its own KV fills, in the order of the prompt."""
        ranks = sorted(self.shards, key=lambda rank: self.shards[rank])
        return [HeldBlocks(rank, self.shared[rank] - self.held_at(rank)) for rank in ranks]

    @property
    def num_tokens(self) -> int:
        """Those that have KV when the attempt begins to decode."""
        num_held = sum(one.num_blocks for one in self.held) * self.block_tokens
        return num_held + sum(end - begin for begin, end in self.shards.values())


def place(
    asked: Asked,
    counts: BlockCounts,
    block_tokens: int,
    min_holder_tokens: int,
    held: tuple[HeldBlocks, ...] = (),
) -> Places | None:
    """Room for a prompt and the beginning of its choices' outputs, spread as wide as the prompt allows.

    It is such that all of the output fits as well once the group has nothing else to hold.

    Args:
        asked: its size.
        counts: of the group.
        block_tokens: tokens of a block.
        min_holder_tokens: a further holder is taken only while each would hold at least so many.
        held: leading blocks of the prompt that are in the group and are not counted as room.

    Returns:
        None where it does not fit.
    """
    max_new_tokens = asked.max_new_tokens
    num_held = sum(one.num_blocks for one in held) * block_tokens
    ranges = _ranges(num_held, asked.num_tokens, block_tokens, len(counts.total), min_holder_tokens)
    takers = choose_holders(counts.room, len(ranges))
    # The home takes a part of what is to come, so that room decides where rows live; else it has some of what is held.
    homes = takers or {one.rank for one in held}
    with_held = list(counts.room)
    for rank, num_blocks in held:
        with_held[rank] += num_blocks
    for home in sorted(homes, key=lambda rank: (counts.num_at_home[rank], rank)):
        others = [rank for rank in takers if rank != home]
        # New tokens follow the end of the prompt in its last block: every other block is whole, and may move.
        shards = dict(zip([*others, home], ranges, strict=False))
        first, last = (
            _places(home, shards, held, num_new, max_new_tokens, block_tokens)
            for num_new in (tokens_ahead(max_new_tokens), max_new_tokens)
        )
        if _fits(first, asked.num_choices, with_held) and _fits(last, asked.num_choices, counts.total):
            return first
    return None


def _ranges(
    first: int, num_tokens: int, block_tokens: int, max_holders: int, min_tokens: int
) -> list[tuple[int, int]]:
    """What each rank takes of tokens [first, num_tokens); nobody takes what is not there."""
    if first == num_tokens:
        return []
    ranges = place_tokens(num_tokens - first, block_tokens, max_holders, min_tokens)
    return [(first + begin, first + end) for begin, end in ranges]


def _places(
    home: int,
    shards: dict[int, tuple[int, int]],
    held: tuple[HeldBlocks, ...],
    num_new: int,
    max_new_tokens: int,
    block_tokens: int,
) -> Places:
    """With room for `num_new` tokens."""
    shared: Counter[int] = Counter()
    for rank, num_blocks in held:
        shared[rank] += num_blocks
    for rank, (begin, end) in shards.items():
        shared[rank] += (end - begin) // block_tokens
    begin, end = shards.get(home, (0, 0))
    num_own = -(-((end - begin) % block_tokens + num_new) // block_tokens)
    blocks = {**shared, home: shared[home] + num_own}
    return Places(home, shards, blocks, dict(shared), max_new_tokens, block_tokens, held)


def _fits(places: Places, num_choices: int, room: Sequence[int]) -> bool:
    """All rows together; the shared blocks count once."""
    return all(
        places.shared[rank] + num_choices * (count - places.shared[rank]) <= room[rank]
        for rank, count in places.blocks.items()
    )
