"""A leader's side of its followers' heartbeats: they go to the directory with its own, one call for the group.

Once a second the directory hears of every rank of a deployment; a call for each would be most of its work. A follower
that is not asked, or whose leader's call fails, renews by itself a moment later (`Registration`).
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from sps2.internal.v1 import group_service_pb2
from sps2.internal.v1.kv_directory_service_pb2 import LeaseRenewal, LeaseStatus
from sps2_service.directory_registration import Carried

WAIT_S = 0.05
"""Longest wait for followers to answer: it delays the leader's heartbeat, too."""

Outgoing = asyncio.Queue[group_service_pb2.JoinGroupResponse | None]
"""What a follower is told; None ends the stream."""


@dataclass(eq=False)
class Passenger:
    """A follower's place in its leader's heartbeats, for as long as its JoinGroup call lasts."""

    outgoing: Outgoing
    answered: asyncio.Event
    """Set by every answer; shared by the passengers of a group."""
    number: int = 0
    renewal: LeaseRenewal | None = None
    """Its answer in this round; None: none yet."""

    def ask(self) -> None:
        """Begins a round."""
        self.number, self.renewal = self.number + 1, None
        wanted = group_service_pb2.RenewalWanted(number=self.number)
        self.outgoing.put_nowait(group_service_pb2.JoinGroupResponse(renewal_wanted=wanted))

    def answer(self, carried: group_service_pb2.CarriedRenewal) -> None:
        """Takes its heartbeat. One of an earlier round is too late: its time would be taken for that of a newer."""
        if carried.number == self.number:
            self.renewal = carried.renewal
            self.answered.set()

    def tell(self, status: "LeaseStatus.ValueType") -> None:
        """Says what the directory answered."""
        result = group_service_pb2.RenewalResult(number=self.number, status=status)
        self.outgoing.put_nowait(group_service_pb2.JoinGroupResponse(renewal_result=result))


@dataclass
class CarriedRenewals:
    """The followers of a group that are joined now."""

    _passengers: set[Passenger] = field(default_factory=set)
    _answered: asyncio.Event = field(default_factory=asyncio.Event)

    def board(self, outgoing: Outgoing) -> Passenger:
        """A follower has joined."""
        passenger = Passenger(outgoing, self._answered)
        self._passengers.add(passenger)
        return passenger

    def alight(self, passenger: Passenger) -> None:
        """It is gone."""
        self._passengers.discard(passenger)

    async def collect(self) -> Sequence[Carried]:
        """Asks everybody for a heartbeat; those that have come in time."""
        asked = list(self._passengers)
        for passenger in asked:
            passenger.ask()
        try:
            async with asyncio.timeout(WAIT_S):
                while any(passenger.renewal is None for passenger in asked):
                    self._answered.clear()
                    await self._answered.wait()
        except TimeoutError:
            pass  # who is late renews by itself
        return [(one.renewal, one.tell) for one in asked if one.renewal is not None]
