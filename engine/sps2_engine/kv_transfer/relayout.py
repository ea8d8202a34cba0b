"""Which keys and values go into which slab: any prefill mesh to any decode mesh.

Pure: knows nothing about tensors, memory or transports. A slab is a rectangle of one layer, a run of tokens by a
range of KV heads, K and V; every layer of a transfer is cut in the same way. Heads are numbered as in the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sps2.internal.v1.placement_pb2 import Placement, ShardPlacement
from sps2_layout.layout import Span
from sps2_layout.placement import covers, num_held


@dataclass(frozen=True)
class Part:
    """Tokens by heads, and the shard of the placement that takes them."""

    shard: int
    tokens: Span
    heads: Span

    def __post_init__(self) -> None:
        if not self.num_cells:
            raise ValueError(f"nothing in tokens {self.tokens} by heads {self.heads}")

    @property
    def num_cells(self) -> int:
        """(token, head) pairs."""
        return len(self.tokens) * len(self.heads)


@dataclass(frozen=True)
class Lane:
    """Shards of a placement that hold the same heads: tokens in order, without gaps.

    Two lanes may hold the same heads (tensor ranks that replicate them); each gets its own copy.
    """

    heads: Span
    first_shard: int
    tokens: list[Span]
    """Of each of its shards, which stand one after another in the placement."""

    def parts(self, span: Span, heads: Span) -> Iterator[Part]:
        """The shards that take these tokens, each with what it takes.

        Raises:
            ValueError: some of the tokens are taken by nobody.
        """
        position = span.begin
        for index, taken in enumerate(self.tokens):
            end = min(span.end, taken.end)
            if taken.begin <= position < end:
                yield Part(self.first_shard + index, Span(position, end), heads)
                position = end
        if position < span.end:
            raise ValueError(f"the placement does not take tokens [{position}, {span.end})")


def shares(placement: Placement, spans: Sequence[Span], heads: Span, num_kv_heads: int) -> list[Part]:
    """The shards that take what a source has, each with what it takes.

    Every (token, head) appears once for each lane that holds it, so the bytes over all sources are the minimum:
    what the targets hold. Nothing comes of empty spans.

    Args:
        placement: Of the whole prompt.
        spans: Tokens of the source, in order and disjoint, none of which the targets hold already.
        heads: Of the source.
        num_kv_heads: Of the model; what a shard holds that names no heads.

    Raises:
        ValueError: the placement leaves a gap, or does not hold all of this; or the spans overlap.
    """
    if any(left.end > right.begin for left, right in pairwise(spans)):
        raise ValueError(f"the spans of tokens are not in order: {spans}")
    parts: list[Part] = []
    missing = set(range(heads.begin, heads.end))
    for lane in lanes(placement, num_kv_heads):
        common = lane.heads.cut(heads.begin, heads.end)
        if common:
            missing.difference_update(range(common.begin, common.end))
            parts.extend(part for span in spans for part in lane.parts(span, common))
    if missing and any(spans):
        raise ValueError(f"the placement does not take heads {sorted(missing)}")
    return parts


def lanes(placement: Placement, num_kv_heads: int) -> list[Lane]:
    """A placement by ranges of heads.

    A lane ends where the next shard holds other heads, or begins where all lanes begin: behind what is held already.

    Raises:
        ValueError: a lane leaves a gap or overlaps itself, or holds heads that the model does not have.
    """
    found: list[Lane] = []
    first = num_held(placement)
    for index, shard in enumerate(placement.shards):
        heads, tokens = shard_heads(shard, num_kv_heads), Span(shard.token_begin, shard.token_end)
        last = found[-1] if found else None
        if last is None or last.heads != heads or tokens.begin == first < last.tokens[-1].end:
            found.append(Lane(heads, index, [tokens]))
        elif tokens.begin != last.tokens[-1].end:
            raise ValueError(f"shard {index} begins at token {tokens.begin}, the one before ends elsewhere")
        else:
            last.tokens.append(tokens)
    return found


def check_covers(placement: Placement, num_tokens: int, num_kv_heads: int) -> None:
    """Verifies that every head of every token of a prompt is held already, or goes to a shard.

    Raises:
        ValueError: they do not, or are not in the order of a placement.
    """
    first = num_held(placement)
    missing = set(range(num_kv_heads)) if first < num_tokens else set()
    if not covers(placement, num_tokens):
        raise ValueError("what is held and the shards must cover the prompt in order, without gaps")
    for lane in lanes(placement, num_kv_heads):
        if (lane.tokens[0].begin, lane.tokens[-1].end) != (first, num_tokens):
            raise ValueError(f"heads {lane.heads} of some tokens go nowhere")
        missing.difference_update(range(lane.heads.begin, lane.heads.end))
    if missing:
        raise ValueError(f"no shard holds heads {sorted(missing)}")


def shard_heads(shard: ShardPlacement, num_kv_heads: int) -> Span:
    """The KV heads that a shard holds: those it names, else all.

    Raises:
        ValueError: the model does not have them.
    """
    heads = Span(shard.head_begin, shard.head_end or num_kv_heads)
    if not heads or heads.end > num_kv_heads:
        raise ValueError(
            f"a shard holds heads [{shard.head_begin}, {shard.head_end}), the model has {num_kv_heads}"
        )
    return heads


def cut(part: Part, head_bytes: int, max_slab_bytes: int) -> list[Part]:
    """One layer of a share as slabs of at most `max_slab_bytes`, as few as possible and of nearly equal size.

    Equal sizes, because a full slab followed by a crumb costs two round trips for little more than one slab.

    Args:
        part: What one target takes from this source.
        head_bytes: Bytes of one head of one token in one layer, K and V.
        max_slab_bytes: Bytes of a slot of the target's ring.

    Raises:
        ValueError: not even one token fits into a slab.
    """
    token_bytes = len(part.heads) * head_bytes
    max_tokens = max_slab_bytes // token_bytes
    if max_tokens < 1:
        raise ValueError(f"a token of {token_bytes} bytes does not fit into a slab of {max_slab_bytes}")
    num_tokens = len(part.tokens)
    count = -(-num_tokens // max_tokens)
    borders = [part.tokens.begin + num_tokens * i // count for i in range(count + 1)]
    return [Part(part.shard, Span(begin, end), part.heads) for begin, end in pairwise(borders)]


def num_cells(parts: Sequence[Part]) -> int:
    """(token, head) pairs of one layer that a source sends for these shares, without resends."""
    return sum(part.num_cells for part in parts)
