"""Waiting for something outside this process, with a timeout; instead of sleeping and hoping."""

import time
from collections.abc import Callable


def wait_until(predicate: Callable[[], bool], timeout: float = 10.0, interval: float = 0.02) -> None:
    """Polls `predicate` until it is true.

    Raises:
        TimeoutError: still false after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() >= deadline:
            raise TimeoutError(f"condition still false after {timeout:g} s")
        time.sleep(interval)
