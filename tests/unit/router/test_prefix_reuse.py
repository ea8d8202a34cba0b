"""What a request takes over of what is cached, and what the directory is asked for."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2.internal.v1 import placement_pb2
from sps2.v1 import cluster_pb2
from sps2_layout.attention import Attention
from sps2_layout.profiles import EXACT, Ladder, Profile
from sps2_layout.wire import pack_attention
from sps2_router.prefix_lookup import MAX_KEYS, find_held
from sps2_router.prefix_reuse import HeldPrefix, with_reuse
from sps2_router.types import Request, Reuse, TokenChoice
from sps2_router.wire import pack_prefill
from support.fake_workers import FakeView
from support.router_groups import worker

SPARSE = Ladder("sparse", (Profile(8, ((1, 1), (8, 8)), tail=16),), 1)
KEYS_PER_TOKEN = 1000
CHOICE = TokenChoice(temperature=0, top_p=1, top_k=-1, seed=0, stop_token_ids=(), max_tokens=100)
FIRST = Attention.admit(SPARSE, 6000)


def request(num_tokens: int, ladder: Ladder, reuse: Reuse = Reuse.ADOPT) -> Request:
    attention = Attention.admit(ladder, num_tokens)
    hashes = [bytes([index % 256]) * 32 for index in range(num_tokens // 64)]
    return Request("r", range(num_tokens), CHOICE, attention, attention.describe(), hashes, reuse=reuse)


def held(num_tokens: int, attention: Attention, group: str = "prefill-0", room: int = 1 << 20) -> HeldPrefix:
    return HeldPrefix(group, num_tokens, attention, room)


def test_an_exact_prompt_stays_exact_and_takes_exact_kv_only() -> None:
    asked = request(6200, EXACT)
    found = [held(5952, FIRST), held(640, Attention(1, 1), "prefill-1")]
    made = with_reuse(asked, found, KEYS_PER_TOKEN)
    assert made.attention == asked.attention
    assert made.cached == {"prefill-1": 640}


def test_a_sparse_prompt_takes_over_the_longest_beginning_with_its_mask() -> None:
    """The mask is that of the prompt that it comes from, C what is cached; a third turn keeps the C of the second."""
    found = [held(5952, FIRST), held(640, Attention.admit(SPARSE, 700), "prefill-1")]
    second = with_reuse(request(6200, SPARSE), found, KEYS_PER_TOKEN)
    assert (second.attention.num_tokens, second.attention.num_prefilled) == (6000, 5952)
    assert second.attention_profile.startswith("adopted: N=8 A=752")
    assert second.attention_profile.endswith("for 5952 tokens, then dense")
    assert second.cached == {"prefill-0": 5952}
    third = with_reuse(request(6400, SPARSE), [held(6144, second.attention)], KEYS_PER_TOKEN)
    assert third.attention == second.attention
    assert third.cached == {"prefill-0": 6144}


def test_at_least_the_last_token_is_computed() -> None:
    made = with_reuse(request(6400, EXACT), [held(6400, Attention(1, 1))], KEYS_PER_TOKEN)
    assert made.cached == {"prefill-0": 6336}


def test_exact_kv_makes_a_sparse_prompt_exact() -> None:
    found = [held(5952, FIRST), held(5952, Attention(1, 1), "prefill-1")]
    for reuse in (Reuse.ADOPT, Reuse.EXACT):
        made = with_reuse(request(6200, SPARSE, reuse), found, KEYS_PER_TOKEN)
        assert (made.attention, made.attention_profile) == (Attention(6200, 6200), "exact")
        assert made.cached == {"prefill-1": 5952}
    assert with_reuse(request(6200, SPARSE, Reuse.EXACT), found[:1], KEYS_PER_TOKEN).cached == {}


@pytest.mark.parametrize(
    "found",
    [
        held(64, FIRST),  # dense queries for all the rest cost more than a sparse prefill
        held(5952, FIRST, room=6299),  # a rank could not hold it all if it had to be computed anew
        held(0, FIRST),
    ],
)
def test_what_does_not_pay_is_not_adopted(found: HeldPrefix) -> None:
    asked = request(6200, SPARSE)
    made = with_reuse(asked, [found], KEYS_PER_TOKEN)
    assert (made.attention, made.cached) == (asked.attention, {})


def test_off_takes_nothing_and_leaves_nothing() -> None:
    asked = request(6200, EXACT, Reuse.OFF)
    assert with_reuse(asked, [held(5952, Attention(1, 1))], KEYS_PER_TOKEN) is asked
    attempt, placement = placement_pb2.Attempt(), placement_pb2.Placement()
    assert not pack_prefill(asked, attempt, placement, "prefill-0").block_hashes
    exact = replace(asked, reuse=Reuse.EXACT)
    assert len(pack_prefill(exact, attempt, placement, "prefill-0").block_hashes) == 96


def test_the_group_is_told_who_holds_more_than_it_does() -> None:
    asked = request(6200, EXACT)
    amounts = {"prefill-0": 640, "prefill-1": 640, "prefill-2": 5952, "prefill-3": 1024}
    found = [
        replace(held(tokens, Attention(1, 1), group), leader_address=f"{group}:1")
        for group, tokens in amounts.items()
    ]
    made = with_reuse(asked, [*found, held(6016, Attention(1, 1), "without-address")], KEYS_PER_TOKEN)
    attempt, placement = placement_pb2.Attempt(), placement_pb2.Placement()

    def sources(group: str) -> list[tuple[str, str, int]]:
        packed = pack_prefill(made, attempt, placement, group).prefix_sources
        return [(one.group, one.leader_address, one.num_tokens) for one in packed]

    longest, next_one = ("prefill-2", "prefill-2:1", 5952), ("prefill-3", "prefill-3:1", 1024)
    assert sources("prefill-0") == [longest, next_one]
    assert sources("prefill-2") == []
    assert sources("prefill-9")[:2] == [longest, next_one]


class Directory:
    """Answers as one that knows of a holder of the first blocks of a chain, and of one of its middle alone."""

    def __init__(self, num_held: int, chain: Sequence[bytes]) -> None:
        self.num_held = num_held
        self.chain = list(chain)
        self.asked: list[int] = []

    async def find_prefix(self, keys: Sequence[bytes]) -> list[pb.PrefixMatch]:
        self.asked.append(len(keys))
        first = self.chain.index(keys[0])
        count = max(0, min(self.num_held - first, len(keys)))
        matches = [self.match("prefill-0/0", 5, count)] if count else []
        stale = [self.match("prefill-0/0", 4, len(keys)), self.match("gone/0", 5, len(keys))]
        middle = [self.match("prefill-1/0", 5, len(keys))] if first else []
        return matches + stale + middle

    def match(self, worker_id: str, epoch: int, num_keys: int) -> pb.PrefixMatch:
        holder = pb.PrefixHolder(worker_id=worker_id, process_incarnation="life", epoch=epoch)
        holder.attention.CopyFrom(pack_attention(FIRST))
        return pb.PrefixMatch(holder=holder, num_keys=num_keys)


@pytest.mark.parametrize("num_held", [0, 1, MAX_KEYS, MAX_KEYS + 1, 2 * MAX_KEYS + 7])
async def test_a_long_chain_is_asked_for_in_windows_that_add_up(num_held: int) -> None:
    chain = [index.to_bytes(32, "little") for index in range(3 * MAX_KEYS - 5)]
    directory, view = Directory(num_held, chain), FakeView()
    capabilities = cluster_pb2.WorkerCapabilities(kv_blocks_total=10)
    for name in ("prefill-0/0", "prefill-1/0"):
        await view.put(worker(name, epoch=5, process_incarnation="life", capabilities=capabilities))
    found = await find_held(directory, view, chain)
    assert directory.asked == [MAX_KEYS, MAX_KEYS, MAX_KEYS - 5]
    assert found == ([held(num_held * 64, FIRST, room=640)] if num_held else [])
