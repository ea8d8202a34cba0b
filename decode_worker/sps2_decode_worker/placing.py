"""Where an attempt's prompt and output go in a decode group, and how many blocks that takes. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from sps2.internal.v1 import prefill_service_pb2
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
    """Tokens [begin, end) of the prompt on each holder."""
    blocks: dict[int, int]
    """Blocks of one row on each of them, the shared ones included."""
    shared: dict[int, int]
    """Of these the ones that all rows share: those of the prompt into which no row appends."""
    max_new_tokens: int
    """Most tokens of a row after the prompt, the one that prefill samples included."""
    block_tokens: int

    @property
    def num_tokens(self) -> int:
        """Those that prefill delivers."""
        return max(end for _, end in self.shards.values())


def place(asked: Asked, counts: BlockCounts, block_tokens: int, min_holder_tokens: int) -> Places | None:
    """Room for a prompt and the beginning of its choices' outputs, spread as wide as the prompt allows.

    It is such that all of the output fits as well once the group has nothing else to hold.

    Args:
        asked: its size.
        counts: of the group.
        block_tokens: tokens of a block.
        min_holder_tokens: a further holder is taken only while each would hold at least so many.

    Returns:
        None where it does not fit.
    """
    max_new_tokens = asked.max_new_tokens
    ranges = place_tokens(asked.num_tokens, block_tokens, len(counts.total), min_holder_tokens)
    holders = choose_holders(counts.room, len(ranges))
    for home in sorted(holders, key=lambda rank: (counts.num_at_home[rank], rank)):
        others = [rank for rank in holders if rank != home]
        # New tokens follow the end of the prompt in its last block: every other block is whole, and may move.
        shards = dict(zip([*others, home], ranges, strict=True))
        first, last = (
            _places(home, shards, num_new, max_new_tokens, block_tokens)
            for num_new in (tokens_ahead(max_new_tokens), max_new_tokens)
        )
        if _fits(first, asked.num_choices, counts.room) and _fits(last, asked.num_choices, counts.total):
            return first
    return None


def _places(
    home: int, shards: dict[int, tuple[int, int]], num_new: int, max_new_tokens: int, block_tokens: int
) -> Places:
    """With room for `num_new` tokens."""
    blocks = {rank: -(-(end - begin) // block_tokens) for rank, (begin, end) in shards.items()}
    begin, end = shards[home]
    shared = blocks | {home: (end - begin) // block_tokens}
    blocks[home] = -(-(end - begin + num_new) // block_tokens)
    return Places(home, shards, blocks, shared, max_new_tokens, block_tokens)


def _fits(places: Places, num_choices: int, room: Sequence[int]) -> bool:
    """All rows together; the shared blocks count once."""
    return all(
        places.shared[rank] + num_choices * (count - places.shared[rank]) <= room[rank]
        for rank, count in places.blocks.items()
    )
