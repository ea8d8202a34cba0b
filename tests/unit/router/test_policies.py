"""Routing policies and the groups that they choose from."""

from collections.abc import Callable
from typing import Any

import pytest

from sps2.v1 import cluster_pb2
from sps2_cli.up import Policy as UpPolicy
from sps2_router.config import RouterConfig
from sps2_router.policies import POLICIES
from sps2_router.policies.base import Ask, GroupLoad, Policy
from sps2_router.policies.least_loaded import LeastLoaded
from sps2_router.policies.prefix_aware import PrefixAware
from sps2_router.policies.round_robin import RoundRobin
from sps2_router.types import Group, group_workers
from sps2_service.config_fields import fields_of
from support.router_groups import group, worker

PREFILL = [group("prefill-0"), group("prefill-1")]
DECODE = [group("decode-0"), group("decode-1")]


def names(
    prefill: list[Group],
    decode: list[Group],
    loads: dict[str, GroupLoad],
    policy: Callable[[], Policy] = LeastLoaded,
) -> tuple[str, str] | None:
    picked = policy().pick(Ask(10), prefill, decode, loads)
    return None if picked is None else (picked.prefill.name, picked.decode.name)


def busy(name: str, **load: Any) -> Group:
    return group(name, load=cluster_pb2.WorkerLoad(**load))


every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def test_flags_name_every_policy() -> None:
    (flag,) = (field for field in fields_of(RouterConfig) if field.name == "policy")
    assert set(flag.choices) == set(POLICIES) == {one.value for one in UpPolicy}


@every_policy
def test_without_load_the_first_names(policy: Callable[[], Policy]) -> None:
    assert names(PREFILL[::-1], DECODE[::-1], {}, policy) == ("prefill-0", "decode-0")


@every_policy
def test_of_idle_groups_the_one_used_least_recently(policy: Callable[[], Policy]) -> None:
    loads = {"prefill-0": GroupLoad(last_seat=3), "prefill-1": GroupLoad(last_seat=2)}
    loads |= {"decode-0": GroupLoad(last_seat=3)}
    assert names(PREFILL, DECODE, loads, policy) == ("prefill-1", "decode-1")


def test_a_round_does_not_look_at_what_there_is_to_do() -> None:
    loads = {"prefill-0": GroupLoad(1, 10, last_seat=1), "prefill-1": GroupLoad(last_seat=2)}
    assert names(PREFILL, DECODE, loads, RoundRobin) == ("prefill-0", "decode-0")


def test_own_counts_decide_at_once() -> None:
    loads = {"prefill-0": GroupLoad(1, 10), "decode-1": GroupLoad(2, 0), "decode-0": GroupLoad(3, 0)}
    assert names(PREFILL, DECODE, loads) == ("prefill-1", "decode-1")


def test_reports_of_leaders_count_when_they_are_larger() -> None:
    decode = [busy("decode-0", num_requests_running=2, num_requests_waiting=1), DECODE[1]]
    assert names(PREFILL, decode, {"decode-1": GroupLoad(2, 0)}) == ("prefill-0", "decode-1")


def test_ties_go_to_fewer_tokens() -> None:
    loads = {"prefill-0": GroupLoad(1, 5000), "prefill-1": GroupLoad(1, 10)}
    decode = [busy("decode-0", kv_blocks_used=9), busy("decode-1", kv_blocks_used=3)]
    assert names(PREFILL, decode, loads) == ("prefill-1", "decode-1")


@every_policy
def test_only_matching_groups_are_paired(policy: Callable[[], Policy]) -> None:
    bf16, other = group("decode-0", dtype="bf16"), group("decode-1", model_hash="other")
    assert names(PREFILL, [bf16, other], {}, policy) is None
    assert names(PREFILL, [bf16, other, group("decode-2")], {}, policy) == ("prefill-0", "decode-2")
    assert names([], DECODE, {}, policy) is None


def test_a_group_is_ready_with_its_leader() -> None:
    starting = cluster_pb2.WORKER_STATE_STARTING
    leader, follower = worker("decode-0/0", 2), worker("decode-0/1", 2, state=starting)
    both = group_workers([follower, leader])["decode-0"]
    assert both.ready
    assert both.leader is leader
    assert (both.size, both.num_ready) == (2, 1)
    headless = group_workers([worker("decode-0/1", 2)])["decode-0"]
    assert not headless.ready
    assert headless.leader is None


def holder(cached: dict[str, int], num_tokens: int = 1000) -> Ask:
    return Ask(num_tokens, cached=cached)


def test_the_holder_of_a_beginning_is_preferred_unless_its_queue_costs_more() -> None:
    """Costs are tokens: what waits or runs there, and what of the prompt is not cached there."""
    asked = holder({"prefill-1": 900})
    for queued, expected in ((0, "prefill-1"), (899, "prefill-1"), (901, "prefill-0")):
        groups = [group("prefill-0"), busy("prefill-1", queued_tokens=queued, num_requests_waiting=3)]
        picked = PrefixAware().pick(asked, groups, DECODE, {})
        assert picked is not None
        assert picked.prefill.name == expected
    loads = {"prefill-1": GroupLoad(num_requests=1, num_prompt_tokens=901)}
    picked = PrefixAware().pick(asked, PREFILL, DECODE, loads)
    assert picked is not None
    assert picked.prefill.name == "prefill-0", "this router's own count holds before the leader has reported"


def test_what_can_be_fetched_counts_as_what_it_costs() -> None:
    """At a tenth of computing 900 tokens, a queue of more than 90 is worth going elsewhere."""
    for queued, expected in ((89, "prefill-1"), (91, "prefill-0")):
        groups = [
            busy("prefill-0", fetched_token_cost=0.1),
            busy("prefill-1", fetched_token_cost=0.1, queued_tokens=queued),
        ]
        picked = PrefixAware().pick(holder({"prefill-1": 900}), groups, DECODE, {})
        assert picked is not None
        assert picked.prefill.name == expected


def test_of_two_holders_the_one_with_more_and_without_any_the_least_loaded() -> None:
    picked = PrefixAware().pick(holder({"prefill-0": 64, "prefill-1": 128}), PREFILL, DECODE, {})
    assert picked is not None
    assert picked.prefill.name == "prefill-1"
    loads = {"prefill-0": GroupLoad(num_requests=1, num_prompt_tokens=1)}
    gone = PrefixAware().pick(holder({"prefill-9": 999}), PREFILL, DECODE, loads)
    assert gone is not None
    assert gone.prefill.name == "prefill-1"


def test_a_holder_that_matches_no_decode_group_is_passed_over() -> None:
    groups = [group("prefill-0"), group("prefill-1", dtype="bf16")]
    picked = PrefixAware().pick(holder({"prefill-1": 900}), groups, DECODE, {})
    assert picked is not None
    assert picked.prefill.name == "prefill-0"
