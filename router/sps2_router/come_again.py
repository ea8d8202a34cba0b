"""When whoever is sent away is told to come again. Pure."""

MIN_RETRY_S = 0.5
MAX_RETRY_S = 60.0
UNKNOWN_RETRY_S = 1.0
"""Before anything was measured."""


def spread(seconds: float, draw: float) -> float:
    """Bounded, and not the same for all: those who are sent away together shall not come back together.

    `draw` in [0, 1): up to half longer.
    """
    return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S) * (1 + draw / 2)
