"""Names of blocks: known vectors, and what makes names differ."""

import hashlib
import struct

from sps2.internal.v1.placement_pb2 import HeldTokens, Placement, ShardPlacement
from sps2_layout.block_hash import block_hashes
from sps2_layout.placement import covers, num_held

IDS = list(range(200))


def test_known_vectors() -> None:
    """Written out from the definition; a change of the scheme is a change of every name in a directory."""
    head = b"\x04\x00\x00\x00hash\x03\x00\x00\x00one"
    first = hashlib.sha256(head + bytes(32) + struct.pack("<64i", *range(64))).digest()
    second = hashlib.sha256(head + first + struct.pack("<64i", *range(64, 128))).digest()
    assert block_hashes(IDS[:128], "hash", b"one") == [first, second]
    assert first.hex() == "e9e90571cabb529ecd2c27804e066ae7839225ffca0685c308c2225d4159a561"
    assert second.hex() == "265b8c55fa517ebe90839e7be6cffc5b51ef0d135291cce64d32e9c45c137ec3"


def test_only_full_blocks_have_names() -> None:
    assert [len(block_hashes(IDS[:n], "hash", b"")) for n in (0, 1, 63, 64, 127, 128, 200)] == [
        0,
        0,
        0,
        1,
        1,
        2,
        3,
    ]


def test_a_name_tells_the_model_the_tenant_and_all_tokens_before() -> None:
    names = block_hashes(IDS, "hash", b"one")
    changed = [7, *IDS[1:]]
    others = [
        block_hashes(IDS, "hash2", b"one"),
        block_hashes(IDS, "hash", b"two"),
        block_hashes(IDS, "hasho", b"ne"),
        block_hashes(changed, "hash", b"one"),
    ]
    for other in others:
        assert not set(names) & set(other)
    later = [*IDS[:130], 7, *IDS[131:]]
    assert [a == b for a, b in zip(names, block_hashes(later, "hash", b"one"), strict=True)] == [
        True,
        True,
        False,
    ]


def placement(held: list[tuple[int, int]], shards: list[tuple[int, int]]) -> Placement:
    return Placement(
        held=[HeldTokens(token_begin=begin, token_end=end) for begin, end in held],
        shards=[ShardPlacement(token_begin=begin, token_end=end) for begin, end in shards],
    )


def test_a_placement_covers_the_prompt_with_what_is_held_in_front() -> None:
    assert num_held(placement([], [(0, 100)])) == 0
    whole = placement([(0, 64), (64, 192)], [(192, 256), (256, 300)])
    assert num_held(whole) == 192
    assert covers(whole, 300)
    assert covers(placement([(0, 64)], []), 64)
    assert not covers(placement([], []), 1)
    for held, shards in [
        ([(0, 64)], [(0, 300)]),
        ([(64, 128)], [(128, 300)]),
        ([(0, 64)], [(128, 300)]),
        ([(0, 64)], [(64, 299)]),
        ([(0, 128), (64, 128)], [(128, 300)]),
    ]:
        assert not covers(placement(held, shards), 300)
