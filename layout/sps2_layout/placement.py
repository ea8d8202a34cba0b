"""What a placement says of a prompt: which tokens a decode group holds already, which are to come. Pure."""

from typing import TypeAlias

from sps2.internal.v1.placement_pb2 import HeldTokens, Placement, ShardPlacement

Part: TypeAlias = HeldTokens | ShardPlacement
"""Tokens of a prompt on one rank."""


def parts(placement: Placement) -> list[Part]:
    """What is held, then what is to come."""
    return [*placement.held, *placement.shards]


def num_held(placement: Placement) -> int:
    """Tokens from the prompt's first on that the group holds already."""
    return placement.held[-1].token_end if placement.held else 0


def covers(placement: Placement, num_tokens: int) -> bool:
    """Whether what is held and the shards behind it take [0, num_tokens), in order and without gaps.

    Where the shards name heads, those of each range of heads take what is not held.
    """
    position = 0
    for part in parts(placement):
        if position == num_tokens and part.token_begin == num_held(placement):
            position = part.token_begin  # the next range of heads begins
        if part.token_begin != position or part.token_end < position:
            return False
        position = part.token_end
    return position == num_tokens
