"""`Attention` as the message that travels between services. Pure."""

from sps2.internal.v1 import placement_pb2
from sps2_layout.attention import Attention
from sps2_layout.layout import Layout, Level
from sps2_layout.profiles import MAX_SHARDS


def pack_attention(attention: Attention) -> placement_pb2.AttentionLayout:
    """The message; `unpack_attention` gives back the same."""
    message = placement_pb2.AttentionLayout(
        num_tokens=attention.num_tokens, num_prefilled=attention.num_prefilled
    )
    layout = attention.layout
    if layout is None:
        message.exact.SetInParent()
        return message
    message.csa.CopyFrom(
        placement_pb2.CsaMask(
            num_shards=layout.num_shards,
            shard_tokens=layout.shard_tokens,
            levels=[placement_pb2.CsaLevel(group=one.group, stride=one.stride) for one in layout.levels],
            query_mode=placement_pb2.QUERY_MODE_DENSE
            if layout.dense_queries
            else placement_pb2.QUERY_MODE_SAMPLED,
            tail=layout.tail,
            sinks=layout.sinks,
        )
    )
    return message


def unpack_attention(message: placement_pb2.AttentionLayout) -> Attention:
    """What a message says.

    Raises:
        ValueError: it is no mask, or one that this version cannot compute.
    """
    mask = message.WhichOneof("mask")
    if mask is None:
        raise ValueError("names no mask")
    layout = _unpack_csa(message.num_tokens, message.csa) if mask == "csa" else None
    return Attention(message.num_tokens, message.num_prefilled, layout)


def _unpack_csa(num_tokens: int, csa: placement_pb2.CsaMask) -> Layout:
    if csa.query_mode not in {placement_pb2.QUERY_MODE_SAMPLED, placement_pb2.QUERY_MODE_DENSE}:
        raise ValueError(f"query mode {csa.query_mode} is unknown here")
    if csa.num_shards > MAX_SHARDS:  # plans take time and memory by their number
        raise ValueError(f"{csa.num_shards} shards; at most {MAX_SHARDS} are planned")
    if any(min(level.group, level.stride) < 1 for level in csa.levels):
        raise ValueError("groups and strides must be at least 1")
    return Layout(
        num_tokens,
        tuple(Level(level.group, level.stride) for level in csa.levels),
        csa.num_shards,
        csa.shard_tokens,
        dense_queries=csa.query_mode == placement_pb2.QUERY_MODE_DENSE,
        sinks=csa.sinks,
        tail=csa.tail,
    )
