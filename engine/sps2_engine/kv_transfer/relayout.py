"""Which tokens go into which slab: any number of prefill ranks to any number of decode ranks.

Pure: knows nothing about tensors, memory or transports. A slab is a run of tokens of one layer, all heads, K
and V; every layer of a transfer is cut in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sps2.internal.v1.placement_pb2 import Placement


@dataclass(frozen=True)
class TokenRange:
    """Tokens [begin, end) of a prompt, and the shard of the placement that takes them."""

    shard: int
    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ValueError(f"no such token range: [{self.begin}, {self.end})")

    @property
    def num_tokens(self) -> int:
        """Tokens in the range."""
        return self.end - self.begin


def shares(placement: Placement, token_begin: int, token_end: int) -> list[TokenRange]:
    """The shards that take a source's tokens [token_begin, token_end), each with the tokens it takes.

    Every token appears once, in order, so the bytes over all sources are the minimum: the prompt's KV.
    An empty range gives no shares.

    Raises:
        ValueError: the placement leaves a gap, overlaps itself, or does not hold these tokens.
    """
    parts: list[TokenRange] = []
    position = token_begin
    for index, shard in enumerate(placement.shards):
        if index and shard.token_begin != placement.shards[index - 1].token_end:
            raise ValueError(
                f"shard {index} begins at token {shard.token_begin}, the one before ends elsewhere"
            )
        end = min(token_end, shard.token_end)
        if shard.token_begin <= position < end:
            parts.append(TokenRange(index, position, end))
            position = end
    if position < token_end:
        raise ValueError(f"the placement does not take tokens [{position}, {token_end})")
    return parts


def cut(part: TokenRange, token_bytes: int, max_slab_bytes: int) -> list[TokenRange]:
    """One layer of a share as slabs of at most `max_slab_bytes`, as few as possible and of nearly equal size.

    Equal sizes, because a full slab followed by a crumb costs two round trips for little more than one slab.

    Args:
        part: Tokens that one target takes from this source.
        token_bytes: Bytes of one token in one layer, K and V.
        max_slab_bytes: Bytes of a slot of the target's ring.

    Raises:
        ValueError: not even one token fits into a slab.
    """
    max_tokens = max_slab_bytes // token_bytes
    if max_tokens < 1:
        raise ValueError(f"a token of {token_bytes} bytes does not fit into a slab of {max_slab_bytes}")
    count = -(-part.num_tokens // max_tokens)
    borders = [part.begin + part.num_tokens * i // count for i in range(count + 1)]
    return [TokenRange(part.shard, begin, end) for begin, end in pairwise(borders)]


def transfer_bytes(parts: Sequence[TokenRange], num_layers: int, token_bytes: int) -> int:
    """Bytes of KV that a source sends for these shares, all layers, without resends."""
    return num_layers * token_bytes * sum(part.num_tokens for part in parts)
