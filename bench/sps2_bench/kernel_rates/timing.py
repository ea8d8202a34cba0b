"""Times an operation on a device."""

import time
from collections.abc import Callable
from statistics import median

import torch

Operation = Callable[[], object]


def seconds(operation: Operation, device: torch.device, repeats: int, budget_s: float) -> float:
    """Median duration of an operation, after one call that pays for what initialises itself lazily.

    Args:
        operation: what is timed.
        device: on a GPU the queue is drained before and after.
        repeats: calls at most.
        budget_s: no new call begins after so many seconds.
    """
    _drain(device, operation)
    samples: list[float] = []
    begin = time.perf_counter()
    while not samples or (len(samples) < repeats and time.perf_counter() - begin < budget_s):
        started = time.perf_counter()
        _drain(device, operation)
        samples.append(time.perf_counter() - started)
    return median(samples)


def _drain(device: torch.device, operation: Operation) -> None:
    operation()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
