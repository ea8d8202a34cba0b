"""Short prompts that a rank computes between the slices of a long one, and how often it may. Torch-free.

All ranks are told of the same prompts in the same order, but not at the same moment. At the end of a slice rank 0 says
up to which number of them are computed now, and a rank that has not been told of them yet waits until it is.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from sps2.internal.v1 import engine_pb2
from sps2_engine.collectives import GroupError
from sps2_prefill_worker.costs import SHORT_SLICES
from sps2_prefill_worker.scheduler import AttemptKey


@dataclass(frozen=True)
class ShortWork:
    """What a short prompt costs."""

    flops: int
    """Of the busiest rank."""
    alone_on: int | None = None
    """Sequence rank that computes it by itself; None: all do."""


class FairShare:
    """What short prompts may take of a long one's time: as much as it has had since, and one short prompt before that.

    With c FLOPs of credit, at most `SHORT_SLICES` slices: each slice of the long prompt adds a slice, the work of the
    short ones takes what their busiest rank does. So after k slices the long prompt has waited for at most
    k + SHORT_SLICES slices of others, and the first in line has waited for at most SHORT_SLICES slices of it.
    """

    def __init__(self, slice_flops: int) -> None:
        self._slice_flops = slice_flops
        self._credit = SHORT_SLICES * slice_flops

    def earn(self) -> None:
        """The long prompt has had a slice."""
        self._credit = min(self._credit + self._slice_flops, SHORT_SLICES * self._slice_flops)

    def afford(self, queue: Iterable[ShortWork]) -> int:
        """How many of the first in line go now; their work is taken from the credit."""
        by_rank: Counter[int | None] = Counter()
        num_taken, cost = 0, 0
        for work in queue:
            by_rank[work.alone_on] += work.flops
            together = by_rank[None]
            most = together + max((flops for rank, flops in by_rank.items() if rank is not None), default=0)
            if most > self._credit:
                break
            num_taken, cost = num_taken + 1, most
        self._credit -= cost
        return num_taken


class ToldRuns:
    """Prompts that this rank was told of and has not begun. Told on the link's thread, asked on the one that computes.

    Args:
        timeout_s: longest wait for the leader's word.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._runs: dict[int, engine_pb2.RunPrefill] = {}
        """By number, ascending."""
        self._over = False
        self._changed = threading.Condition()

    def add(self, run: engine_pb2.RunPrefill) -> None:
        """The leader has told of a prompt."""
        with self._changed:
            self._runs[run.number] = run
            self._changed.notify_all()

    def begin(self, run: engine_pb2.RunPrefill) -> bool:
        """It is a prompt's turn; False when it has gone before its turn."""
        with self._changed:
            return self._runs.pop(run.number, None) is not None

    def knows(self, key: AttemptKey) -> bool:
        """Whether a prompt has been told of and not begun."""
        with self._changed:
            return any((run.attempt.request_id, run.attempt.number) == key for run in self._runs.values())

    def short_ones(self) -> Sequence[engine_pb2.RunPrefill]:
        """Those that may go now, in order."""
        with self._changed:
            return list(takewhile(lambda run: run.interlude_flops, self._runs.values()))

    def take(self, last: int) -> Sequence[engine_pb2.RunPrefill]:
        """Begins all up to number `last`, waiting until they have been told of.

        Raises:
            GroupError: the epoch is over, or they were not within the timeout.
        """
        with self._changed:
            told = self._changed.wait_for(lambda: last in self._runs or self._over, self._timeout_s)
            if self._over or not told:
                raise GroupError(f"the leader has not told of prompt {last}")
            return [self._runs.pop(number) for number in list(self._runs) if number <= last]

    def end(self) -> None:
        """The epoch is over: nobody waits for the leader any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Another epoch begins, with prompts of its own."""
        with self._changed:
            self._runs.clear()
            self._over = False


def short_work(runs: Iterable[engine_pb2.RunPrefill]) -> Iterable[ShortWork]:
    """What prompts cost."""
    return (
        ShortWork(run.interlude_flops, run.alone_on if run.HasField("alone_on") else None) for run in runs
    )
