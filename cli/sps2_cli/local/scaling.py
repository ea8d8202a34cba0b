"""How many groups a pool is to have, and which come and go for it. Pure: it starts nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from sps2_cli.local.plan import MAX_RANKS, Role, UpOptions

ROLES: tuple[Role, ...] = get_args(Role)


class RefusedError(ValueError):
    """What was asked for cannot be done; nothing was changed."""


@dataclass(frozen=True)
class PoolChange:
    """What becomes of one pool."""

    role: Role
    add: tuple[int, ...]
    """Numbers of new groups."""
    drain: tuple[int, ...]
    """Numbers of groups that go, the youngest first."""


def parse_targets(words: Sequence[str]) -> dict[Role, int]:
    """Groups for each pool, from "prefill=3 decode=1".

    Raises:
        ValueError: not of that form, no such pool, or out of bounds.
    """
    targets: dict[Role, int] = {}
    for word in words:
        name, equals, count = word.partition("=")
        role = next((one for one in ROLES if one == name), None)
        if role is None or not equals:
            raise ValueError(f"{word!r} is not POOL=GROUPS with POOL one of {', '.join(ROLES)}")
        if role in targets:
            raise ValueError(f"{role} is given twice")
        if not count.isdecimal() or not 1 <= int(count) <= MAX_RANKS:
            raise ValueError(f"{word!r}: a pool has 1 to {MAX_RANKS} groups")
        targets[role] = int(count)
    if not targets:
        raise ValueError("say which pool: prefill=N, decode=M or both")
    return targets


def plan_changes(
    targets: Mapping[Role, int],
    groups: Mapping[Role, Sequence[int]],
    taken: Mapping[Role, Sequence[int]],
    options: UpOptions,
) -> list[PoolChange]:
    """What is to be done to each pool, all of it or nothing.

    Args:
        targets: groups that are wanted.
        groups: numbers of those that serve, the oldest first.
        taken: numbers of others, which are still leaving.
        options: shape of a group, cores.

    Raises:
        RefusedError: there would be too many ranks, or too few cores.
    """
    changes = []
    for role, wanted in targets.items():
        have = list(groups[role])
        if wanted > len(have):
            _check_room(role, wanted, options)
        free = (number for number in range(MAX_RANKS * 2) if number not in {*have, *taken[role]})
        add = tuple(next(free) for _ in range(wanted - len(have)))
        drain = tuple(reversed(have[wanted:]))
        changes.append(PoolChange(role, add, drain))
    return changes


def _check_room(role: Role, wanted: int, options: UpOptions) -> None:
    ranks, cpus, threads = options.pool_of(role).ranks, options.cpus_of(role), options.threads_of(role)
    if wanted * ranks > MAX_RANKS:
        raise RefusedError(
            f"{wanted} {role} groups of {ranks} ranks are {wanted * ranks}, at most {MAX_RANKS} are possible"
        )
    if cpus and wanted * ranks * threads > len(cpus):
        raise RefusedError(
            f"{wanted} {role} groups of {ranks} ranks with {threads} threads each need {wanted * ranks * threads} "
            f"cores, and the pool is pinned to {len(cpus)} ({cpus}): start `sps2 up` with more --{role}-cpus or "
            f"fewer --threads"
        )
