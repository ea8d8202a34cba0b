"""Who comes first where requests wait: one order for the router's queue and for room on decode groups."""

import time

MAX_PRIORITY = 10
"""Priorities are -10 to 10."""
PRIORITY_US = 10_000_000
"""What a step of priority counts, in microseconds of waiting."""


def turn_us(asked_at_us: int, priority: int) -> int:
    """The lower goes first. Fixed for the life of a request, so that whoever waits is the first at last.

    Args:
        asked_at_us: when it asked first, in microseconds since 1970.
        priority: -10 to 10; each step is as good as 10 s of waiting.
    """
    return asked_at_us - priority * PRIORITY_US


def now_us() -> int:
    """When one asks that asks now, in microseconds since 1970."""
    return time.time_ns() // 1000
