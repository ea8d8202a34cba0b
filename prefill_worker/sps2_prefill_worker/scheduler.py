"""Which prompts a prefill group computes next, and where. Pure: no torch, no clock, no network.

Long prompts compute one at a time, first come first served. Short ones do not wait for them: a few are handed to the
ranks at any time, in the order in which they came, and go between the slices of a long one, as often as its fair share
allows (`interludes`). Those that a rank computes by itself go to the rank that has least of them to do, so that ranks
compute several at once. A prompt whose KV is still on its way no longer holds the compute up.

A prompt has its place in line from when it came, also while its beginning is fetched from another group: long ones
behind it wait for that, which takes less than the prompt would have, short ones do not.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

AttemptKey = tuple[str, int]


@dataclass(frozen=True)
class Job:
    """One attempt's prefill, as the scheduler sees it."""

    key: AttemptKey
    num_tokens: int
    interlude_flops: int = 0
    """What a short prompt costs its busiest rank; 0 of one that is not short."""
    alone: bool = False
    """Whether one sequence rank computes it by itself."""
    num_blocks: int = 0
    """KV blocks that it takes, on the rank that has most of them."""
    number: int = 0
    """Its place in line: the lower goes first."""
    is_fetching: bool = False
    """Whether its beginning is on its way from another group."""

    @property
    def is_short(self) -> bool:
        """Whether it may go between the slices of another."""
        return self.interlude_flops > 0


@dataclass(frozen=True)
class Start:
    """A prompt that the ranks are to be told of now."""

    job: Job
    alone_on: int | None = None
    """The sequence rank that computes it by itself; None: all do together."""


@dataclass
class PrefillScheduler:
    """Waiting prompts, and those that the ranks know of."""

    num_ranks: int = 1
    """Sequence ranks of the group."""
    short_flops: int = 0
    """Short work that a rank knows of at most, but for one prompt: what waits here is withdrawn at once."""
    kv_blocks: int = 0
    """Blocks of KV that a rank can hold."""
    waiting: deque[Job] = field(default_factory=deque)
    long: Job | None = None
    """The long prompt that computes."""
    short: dict[AttemptKey, Start] = field(default_factory=dict)
    """Short ones that the ranks know of and have not computed."""
    _blocks: dict[AttemptKey, int] = field(default_factory=dict)
    """Of prompts that the ranks know of, until they are over."""

    def submit(self, job: Job) -> None:
        """Puts a prompt in line, behind those of lower numbers and those of its own."""
        insort(self.waiting, job, key=lambda one: one.number)

    def start_next(self) -> Start | None:
        """The prompt to start now, if there is one; call until there is none."""
        start = self._next()
        if start is None:
            return None
        job = start.job
        self.waiting.remove(job)
        self._blocks[job.key] = job.num_blocks
        if job.is_short:
            self.short[job.key] = start
        else:
            self.long = job
        return start

    def withdraw(self, key: AttemptKey) -> bool:
        """Takes a waiting prompt out; False when it is not waiting (any more)."""
        for job in self.waiting:
            if job.key == key:
                self.waiting.remove(job)
                return True
        return False

    def computed(self, key: AttemptKey) -> None:
        """The prompt's compute is over, whatever became of it."""
        self.short.pop(key, None)
        if self.long is not None and self.long.key == key:
            self.long = None

    def over(self, key: AttemptKey) -> None:
        """No rank holds anything of it any more."""
        self.computed(key)
        self._blocks.pop(key, None)

    def clear(self) -> None:
        """Forgets everything: the group is gone."""
        self.waiting.clear()
        self.short.clear()
        self._blocks.clear()
        self.long = None

    @property
    def num_tokens(self) -> int:
        """Prompt tokens waiting or computing."""
        computing = [start.job for start in self.short.values()] + ([self.long] if self.long else [])
        return sum(job.num_tokens for job in (*computing, *self.waiting))

    def _next(self) -> Start | None:
        may_start_long = self.long is None
        for job in self.waiting:
            if job.is_fetching:
                may_start_long = False
            elif job.is_short:
                return self._place(job)  # the next short one waits behind it
            elif may_start_long:
                return Start(job)  # no short one has come before it
        return None

    def _place(self, job: Job) -> Start | None:
        """Where a short prompt goes, None while there is no room for it.

        It must not wait for blocks between the slices of a long one, which holds some until it is computed.
        """
        if self.long is not None and sum(self._blocks.values()) + job.num_blocks > self.kv_blocks:
            return None
        ranks = range(self.num_ranks)
        rank = min(ranks, key=self._load)
        busiest = self._load(rank) if job.alone else max(map(self._load, ranks))
        if busiest and busiest + job.interlude_flops > self.short_flops:
            return None
        return Start(job, rank if job.alone else None)

    def _load(self, rank: int) -> int:
        """Short work that a sequence rank knows of."""
        return sum(
            start.job.interlude_flops for start in self.short.values() if start.alone_on in (None, rank)
        )
