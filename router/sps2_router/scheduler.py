"""Gives each attempt its place: in the order of the line, on the pair of groups that the policy picks.

A prefill group takes only a few attempts of this router at once (one computes, one waits behind it), so that
requests queue here, where they hold no KV, and are bound to a group as late as possible. Prompts that a prefill group
calls short have places of their own there: it computes them beside long ones, and they do not wait behind those. One
that comes back for another attempt has the turn that it had, so it does not queue behind those that came after it.
Knows groups and counts; nothing about calls. Used on one event loop only.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from sps2.v1 import cluster_pb2
from sps2_router.line import Line, Place
from sps2_router.policies.base import NO_LOAD, Ask, GroupLoad, Policy, match
from sps2_router.types import Group, GroupPair, group_workers
from sps2_service.errors import Unavailable

RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0

POOLS = {cluster_pb2.WORKER_ROLE_PREFILL: "prefill", cluster_pb2.WORKER_ROLE_DECODE: "decode"}


class WorkersView(Protocol):
    """What the router needs of the directory client's Membership."""

    connected: bool
    """Whether the view is being kept up; otherwise it is what was last heard."""
    revision: int
    """Of the workers' state, as the directory counts."""

    @property
    def workers(self) -> Mapping[str, cluster_pb2.WorkerInfo]:
        """Live workers by id, as last heard of."""


@dataclass(frozen=True)
class SchedulerLimits:
    """How the scheduler fills groups."""

    prefills_per_group: int = 2
    """Attempts that one prefill group holds at once, but for short ones; the rest waits in the router."""
    regroup_wait_s: float = 30.0
    """Seconds that a request which lost its group waits for a ready one; a new request does not wait."""
    directory_away_s: float = 3.0
    """Seconds that the last view is trusted while no directory answers; then workers fence themselves."""
    short_prefills_per_group: int = 8
    """Attempts with short prompts that a prefill group holds besides the others."""


class Seat:
    """One attempt's place in a pair of groups."""

    def __init__(self, pair: GroupPair, ask: Ask) -> None:
        self.pair = pair
        self.ask = ask
        self.in_prefill = True


class Scheduler:
    """Seats attempts. `wake` it whenever the view changed."""

    def __init__(
        self, view: WorkersView, policy: Policy, model_hash: str, limits: SchedulerLimits, line: Line
    ) -> None:
        self._view = view
        self._policy = policy
        self._model_hash = model_hash
        self._limits = limits
        self._line = line
        self._changed = asyncio.Event()
        self._seats: set[Seat] = set()
        self._num_seats = 0
        self._last_seats: dict[str, int] = {}
        """By group: the number of the last seat in it."""
        self._now = asyncio.get_running_loop().time
        self._followed_at = float("-inf")

    def wake(self) -> None:
        """Something changed: whoever is next looks again."""
        if self._view.connected:
            self._followed_at = self._now()
        self._changed.set()

    @property
    def num_requests_by_group(self) -> dict[str, int]:
        """Attempts that this router has on each group."""
        return {name: load.num_requests for name, load in self._loads().items() if load.num_requests}

    def check_ready(self) -> None:
        """Raises Unavailable, saying what is missing, unless some prefill and decode group match."""
        if not self._view.connected and self._now() - self._followed_at > self._limits.directory_away_s:
            raise _not_ready("the directory does not answer", "DIRECTORY_AWAY")
        groups = group_workers(self._view.workers.values())
        prefill, decode = self._candidates(groups)
        for role, found in (
            (cluster_pb2.WORKER_ROLE_PREFILL, prefill),
            (cluster_pb2.WORKER_ROLE_DECODE, decode),
        ):
            if not found:
                raise _not_ready(self._why_none(role, groups.values()))
        if not any(match(p, d) for p in prefill for d in decode):
            raise _not_ready("no ready prefill group matches a ready decode group in dtype")

    def sized(self, ask: Ask) -> Ask:
        """The same, with whether some prefill group computes it while it computes long ones."""
        prefill, _ = self._candidates(group_workers(self._view.workers.values()))
        most = max((group.short_prompt_tokens for group in prefill), default=0)
        return replace(ask, is_short=ask.num_tokens <= most)

    @asynccontextmanager
    async def seat(
        self,
        ask: Ask,
        avoid: frozenset[str] = frozenset(),
        *,
        turn: int = 0,
        had_seat: bool = False,
        wait_s: float | None = None,
        patient: bool = False,
        on_queued: Callable[[Place], None] = lambda _: None,
    ) -> AsyncIterator[Seat]:
        """Waits for its turn and for a group with room, and holds the place while the block runs.

        Args:
            ask: What is to be placed, as `sized` gives it.
            avoid: Groups that are used only when there is no other.
            turn: Of one tenant's the lower goes first; of equal ones the one that came first.
            had_seat: It had one before, so that it owes nothing of its tenant's share.
            wait_s: Longest wait in seconds; None is without end.
            patient: Wait for a pair of ready groups instead of failing when there is none.
            on_queued: Gets its place in the line.

        Raises:
            Unavailable: no ready groups, or the wait was too long.
        """
        if not patient:
            self.check_ready()
        try:
            async with asyncio.timeout(wait_s):
                with self._line.place(ask, turn, paid=had_seat) as place:
                    on_queued(place)
                    seat = Seat(await self._next_pair(ask, place, avoid, patient=patient), ask)
                    self._take(seat)
                    place.served = True
        except TimeoutError:
            raise Unavailable(
                "QUEUE_WAIT",
                f"no prefill group had room for {wait_s:g} s; try again",
                retry_after=min(max(wait_s or 0.0, RETRY_AFTER_S), MAX_RETRY_AFTER_S),
            ) from None
        try:
            yield seat
        finally:
            self._seats.remove(seat)
            self._room_made()

    def leave_prefill(self, seat: Seat) -> None:
        """The prefill group has computed it; another attempt may have its place there."""
        seat.in_prefill = False
        self._room_made()

    def _room_made(self) -> None:
        if self._line.is_empty and not any(seat.in_prefill for seat in self._seats):
            self._line.forget_shares()
        self.wake()

    async def _next_pair(self, ask: Ask, place: Place, avoid: frozenset[str], *, patient: bool) -> GroupPair:
        await place.first()
        give_up_at = self._now() + (self._limits.regroup_wait_s if patient else 0.0)
        while True:
            await place.first()  # one that goes before it may have come
            self._changed.clear()
            if (pair := self._pick(ask, avoid)) is not None:
                return pair
            try:
                self.check_ready()
            except Unavailable:
                if self._now() >= give_up_at:
                    raise
            try:
                # Woken by every change; the timeout is for `give_up_at`.
                await asyncio.wait_for(self._changed.wait(), 0.25)
            except TimeoutError:
                continue

    def _has_room(self, group: Group, *, is_short: bool) -> bool:
        seats = (seat for seat in self._seats if seat.in_prefill and seat.pair.prefill.name == group.name)
        num_alike = sum(seat.ask.is_short is is_short for seat in seats)
        limits = self._limits
        return num_alike < (limits.short_prefills_per_group if is_short else limits.prefills_per_group)

    def _take(self, seat: Seat) -> None:
        self._seats.add(seat)
        self._num_seats += 1
        for group in (seat.pair.prefill, seat.pair.decode):
            self._last_seats[group.name] = self._num_seats

    def _pick(self, ask: Ask, avoid: frozenset[str]) -> GroupPair | None:
        groups = group_workers(self._view.workers.values())
        self._last_seats = {name: number for name, number in self._last_seats.items() if name in groups}
        loads = self._loads()
        prefill, decode = self._candidates(groups)
        free = [group for group in prefill if self._has_room(group, is_short=ask.is_short)]
        liked = self._policy.pick(ask, _without(free, avoid), _without(decode, avoid), loads)
        if liked is not None:
            return liked
        # With a group left that is not to be avoided but full, waiting for it beats going back to a bad one.
        if _without(prefill, avoid) and not _without(free, avoid):
            return None
        return self._policy.pick(ask, _without(free, avoid) or free, _without(decode, avoid) or decode, loads)

    def _candidates(self, groups: Mapping[str, Group]) -> tuple[list[Group], list[Group]]:
        """Ready prefill groups and ready decode groups that serve our model."""
        ready = [g for g in groups.values() if g.ready and self._serves_our_model(g)]
        return (
            [g for g in ready if g.role == cluster_pb2.WORKER_ROLE_PREFILL],
            [g for g in ready if g.role == cluster_pb2.WORKER_ROLE_DECODE],
        )

    def _serves_our_model(self, group: Group) -> bool:
        return group.leader is not None and group.leader.capabilities.model_hash == self._model_hash

    def _loads(self) -> dict[str, GroupLoad]:
        loads = {name: GroupLoad(last_seat=number) for name, number in self._last_seats.items()}
        for seat in self._seats:
            groups = [seat.pair.decode, *([seat.pair.prefill] if seat.in_prefill else [])]
            for group in groups:
                load = loads.get(group.name, NO_LOAD)
                loads[group.name] = replace(
                    load,
                    num_requests=load.num_requests + 1,
                    num_prompt_tokens=load.num_prompt_tokens + seat.ask.num_tokens,
                )
        return loads

    def _why_none(self, role: cluster_pb2.WorkerRole.ValueType, groups: Iterable[Group]) -> str:
        pool = POOLS[role]
        mine = [group for group in groups if group.role == role]
        if not mine:
            return f"no ready {pool} group: none has registered"
        if foreign := [(group.name, group.leader) for group in mine if group.ready and group.leader]:
            name, leader = foreign[0]
            theirs = leader.capabilities.model_hash
            return f"no ready {pool} group: {name} serves a model with another hash, {theirs}"
        if all(group.draining for group in mine):
            return f"no ready {pool} group: {mine[0].name} is draining"
        num_ranks = sum(group.size for group in mine)
        num_loading = num_ranks - sum(group.num_ready for group in mine)
        return f"no ready {pool} group: {num_loading} of {num_ranks} ranks loading"


def _without(groups: list[Group], avoid: frozenset[str]) -> list[Group]:
    return [group for group in groups if group.name not in avoid]


def _not_ready(message: str, reason: str = "NO_READY_GROUP") -> Unavailable:
    return Unavailable(reason, f"{message}; try again", retry_after=RETRY_AFTER_S)
