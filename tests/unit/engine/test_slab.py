"""Slabs: their bytes, their places in an arena, their checksums and formats."""

import zlib

import pytest
import torch

from sps2.internal.v1.kv_transfer_service_pb2 import KvFormat, SlabVerdict
from sps2_engine.kv_pool import KvArena
from sps2_engine.kv_transfer.slab import ArenaBytes, checksum, copy_to_device, format_mismatch
from sps2_layout.layout import Span
from support.slabs import BOTH, Target, kv_format, random_arena


def test_pieces_are_k_then_v_in_token_order() -> None:
    source = random_arena()
    runs = [(192, 256), (0, 6)]
    payload = b"".join(source.pieces(1, runs, BOTH))
    slots = [*range(192, 256), *range(6)]
    expected = [side[1, slots].contiguous().view(torch.uint8) for side in (source.arena.k, source.arena.v)]
    assert payload == b"".join(part.numpy().tobytes() for part in expected)
    assert checksum(source.pieces(1, runs, BOTH)) == zlib.crc32(payload)
    assert [size for _, size in source.addresses(1, runs, BOTH)] == [64 * 16, 6 * 16] * 2


@pytest.mark.parametrize(
    ("source", "target", "common"),
    [
        ((0, 4), (0, 4), (0, 4)),
        ((0, 2), (0, 4), (0, 2)),
        ((2, 4), (0, 4), (2, 4)),
        ((0, 4), (1, 3), (1, 3)),
        ((1, 4), (0, 3), (1, 3)),
    ],
)
def test_heads_land_in_their_columns(
    source: tuple[int, int], target: tuple[int, int], common: tuple[int, int]
) -> None:
    """Heads of both arenas, and those that both have."""
    sender, receiver = random_arena(Span(*source), 4), Target(arena=random_arena(Span(*target), 4))
    heads = Span(*common)
    there, before = receiver.bytes.arena, receiver.bytes.arena.k.clone()
    payload = b"".join(sender.pieces(0, [(0, 70)], heads))
    assert sum(size for _, size in sender.addresses(0, [(0, 70)], heads)) == len(payload)
    verdict = receiver.send(payload, head_begin=heads.begin, head_end=heads.end)
    assert verdict == (SlabVerdict.SLAB_VERDICT_ACCEPTED, "")
    here = sender.arena
    ours = slice(heads.begin - here.heads.begin, heads.end - here.heads.begin)
    theirs = slice(heads.begin - there.heads.begin, heads.end - there.heads.begin)
    assert torch.equal(there.k[1, 192:256, theirs], here.k[0, :64, ours])
    assert torch.equal(there.v[1, 0:6, theirs], here.v[0, 64:70, ours])
    before[1, 192:256, theirs], before[1, 0:6, theirs] = here.k[0, :64, ours], here.k[0, 64:70, ours]
    assert torch.equal(there.k, before)


def test_formats_are_compared_field_by_field() -> None:
    assert format_mismatch(kv_format(), kv_format()) == ""
    for changed in ({"model_hash": "x"}, {"dtype": "fp32"}, {"num_layers": 3}, {"head_dim": 8}):
        other = KvFormat()
        other.CopyFrom(kv_format())
        other.MergeFrom(KvFormat(**changed))
        assert next(iter(changed)) in format_mismatch(kv_format(), other)


def test_a_format_that_does_not_describe_the_arena_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim"):
        ArenaBytes(KvArena(2, 4, 2, 8, torch.bfloat16), kv_format())
    with pytest.raises(ValueError, match="dtype"):
        ArenaBytes(KvArena(2, 4, 2, 4, torch.float32), kv_format())
    with pytest.raises(ValueError, match="num_kv_heads is 2 here and 3 there"):
        ArenaBytes(KvArena(2, 4, 2, 4, torch.bfloat16, first_head=1), kv_format())


@pytest.mark.parametrize("heads", [BOTH, Span(1, 2)])
def test_a_device_arena_gets_the_same_elements(heads: Span) -> None:
    """What a GPU's arena is filled by, on one in host memory, beside the copy of bytes."""
    source, by_bytes, by_copy = random_arena(), random_arena(), random_arena()
    runs = [(3, 40), (64, 97)]
    payload = memoryview(b"".join(source.pieces(1, [(0, 37), (100, 133)], heads)))
    by_copy.arena.k.copy_(by_bytes.arena.k)
    by_copy.arena.v.copy_(by_bytes.arena.v)
    by_bytes.scatter(payload, 1, runs, heads)
    copy_to_device(payload, by_copy.arena, 1, runs, heads.slice)
    assert torch.equal(by_bytes.arena.k, by_copy.arena.k)
    assert torch.equal(by_bytes.arena.v, by_copy.arena.v)
    assert torch.equal(by_bytes.arena.k[1, 3:40, heads.slice], source.arena.k[1, 0:37, heads.slice])
