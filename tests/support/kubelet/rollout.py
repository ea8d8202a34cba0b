"""The arithmetic of a Deployment's RollingUpdate: which pods to make and to end, from how many there are."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Count:
    """Pods of a template that are not leaving."""

    total: int
    ready: int


@dataclass(frozen=True)
class Step:
    """What is to be done now."""

    create: int = 0
    """Pods of the new template."""
    delete_new: int = 0
    """Of the new template, when there are too many."""
    delete_unready: int = 0
    """Of old templates, of those that serve nobody."""
    delete_ready: int = 0
    """Of old templates, of those that serve."""


def amount(value: int | str, replicas: int, *, up: bool) -> int:
    """A number of pods, or a percentage of them, rounded up (maxSurge) or down (maxUnavailable)."""
    if isinstance(value, int):
        return value
    share = int(value.removesuffix("%")) * replicas / 100
    return math.ceil(share) if up else math.floor(share)


def next_step(replicas: int, max_surge: int, max_unavailable: int, new: Count, old: Count) -> Step:
    """As the Deployment controller does it.

    Never more than `replicas + max_surge` pods, and never fewer ready ones than `replicas - max_unavailable` by
    its doing.
    """
    if new.total > replicas:
        return Step(delete_new=new.total - replicas)
    room = replicas + max_surge - new.total - old.total
    create = max(0, min(replicas - new.total, room))
    least_ready = replicas - max_unavailable
    # New pods that are not ready yet count against the budget: their place is taken already.
    budget = new.total + old.total - least_ready - (new.total - new.ready)
    unready = max(0, min(old.total - old.ready, budget))
    spare = new.ready + old.ready - least_ready
    return Step(create=create, delete_unready=unready, delete_ready=max(0, min(old.ready, spare)))
