"""In which order waiters of several tenants go: by weighted shares between tenants, by turns within one. Pure.

This is start-time fair queueing (Goyal, Vin, Cheng: "Start-time Fair Queuing", SIGCOMM 1996), with tags of tenants in
place of tags of requests, so that a request of higher priority may go before others of its tenant that came earlier:

    virtual time v   the start tag of whoever was served last
    tag[tenant]      the start tag of its next one: at least v when the tenant comes to wait
    serve            the tenant with the lowest tag; v = tag, then tag += cost / weight

While two tenants wait all the time, what they got, divided by their weights, differs by no more than one request of
each. Nobody starves: v passes every tag, and turns within a tenant are fixed.
Whoever was served before and waits again has paid: it goes before all who have not, and is not charged.
"""

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

Turn: TypeAlias = tuple[int, int]
"""The lower goes first; the second number tells equal ones apart."""
_Key: TypeAlias = tuple[bool, float, Turn]
"""Of all that could be next the lowest is."""


@dataclass(frozen=True, eq=False)
class Waiter:
    """One that waits."""

    tenant: str
    """Whose share it is served from."""
    turn: Turn
    """Its place among those of the same tenant."""
    cost: int
    """What it takes of the share, above 0."""
    num_tokens: int = 0
    """Tokens that prefill computes for it."""
    paid: bool = False
    """Whether it was served before."""
    is_short: bool = False
    """Which of two kinds of places it waits for; those who wait for the other kind hold it up in nothing."""


class FairQueue:
    """Those who wait."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        """`weight`: a tenant's, above 0; twice the weight is twice the share."""
        self._weight = weight
        self._waiters: dict[str, list[Waiter]] = {}
        """By tenant, in the order of their turns; none of the lists is empty."""
        self._tags: dict[str, float] = {}
        self._virtual_time = 0.0

    def first_of(self, *, is_short: bool) -> Waiter | None:
        """Who is to be served next of those who wait for a kind of place."""
        alike = ((one for one in waiters if one.is_short is is_short) for waiters in self._waiters.values())
        heads = (head for head in (next(waiters, None) for waiters in alike) if head is not None)
        return min(heads, key=self._head_key, default=None)

    def add(self, waiter: Waiter) -> None:
        """One more waits."""
        self._tags[waiter.tenant] = self._tag(waiter.tenant)
        insort(self._waiters.setdefault(waiter.tenant, []), waiter, key=lambda one: one.turn)

    def remove(self, waiter: Waiter) -> None:
        """One waits no more, without being served."""
        self._waiters[waiter.tenant].remove(waiter)
        if not self._waiters[waiter.tenant]:
            del self._waiters[waiter.tenant]

    def serve(self, waiter: Waiter) -> None:
        """One is served, and waits no more."""
        if not waiter.paid:
            self._virtual_time = max(self._virtual_time, self._tags[waiter.tenant])
            self._tags[waiter.tenant] += waiter.cost / self._weight(waiter.tenant)
        self.remove(waiter)

    def forget(self) -> None:
        """There was nothing to share for a moment: what was used until now is nobody's debt."""
        self._virtual_time = max(self._tags.values(), default=self._virtual_time)
        self._tags = {tenant: tag for tenant, tag in self._tags.items() if tenant in self._waiters}

    def before(self, waiter: Waiter) -> Iterator[Waiter]:
        """Who would be served before one if nobody came or left; it need not wait itself."""
        own = [one for one in self._waiters.get(waiter.tenant, ()) if one.turn < waiter.turn]
        yield from own
        *_, (limit, _) = self._keys(waiter.tenant, [*own, waiter])
        for tenant, waiters in self._waiters.items():
            if tenant != waiter.tenant:
                earlier = takewhile(lambda one: one[0] < limit, self._keys(tenant, waiters))
                yield from (one for _, one in earlier)

    def _keys(self, tenant: str, waiters: list[Waiter]) -> Iterator[tuple[_Key, Waiter]]:
        """Those of one tenant, each with the key that it will have as the first of them."""
        tag, weight, key = self._tag(tenant), self._weight(tenant), None
        for one in waiters:
            if not one.paid:
                key = (True, tag, one.turn)
                tag += one.cost / weight
            yield key or (False, 0.0, one.turn), one  # one that has paid goes right after those before it

    def _head_key(self, head: Waiter) -> _Key:
        return (False, 0.0, head.turn) if head.paid else (True, self._tags[head.tenant], head.turn)

    def _tag(self, tenant: str) -> float:
        tag = self._tags.get(tenant, 0.0)
        return tag if tenant in self._waiters else max(tag, self._virtual_time)
