"""Which prompt a prefill group computes next. Pure: no torch, no clock, no network.

One prompt computes at a time, first come first served; a prompt whose KV is still on its way no longer holds the
compute up.
"""

from collections import deque
from dataclasses import dataclass, field

AttemptKey = tuple[str, int]


@dataclass(frozen=True)
class Job:
    """One attempt's prefill, as the scheduler sees it."""

    key: AttemptKey
    num_tokens: int


@dataclass
class PrefillScheduler:
    """Waiting prompts and the one that computes."""

    waiting: deque[Job] = field(default_factory=deque)
    computing: Job | None = None

    def submit(self, job: Job) -> None:
        """Puts a prompt at the end of the queue."""
        self.waiting.append(job)

    def start_next(self) -> Job | None:
        """The prompt to start now, if the group is free and one waits."""
        if self.computing is not None or not self.waiting:
            return None
        self.computing = self.waiting.popleft()
        return self.computing

    def withdraw(self, key: AttemptKey) -> bool:
        """Takes a waiting prompt out; False when it is not waiting (any more)."""
        for job in self.waiting:
            if job.key == key:
                self.waiting.remove(job)
                return True
        return False

    def computed(self, key: AttemptKey) -> None:
        """The prompt's compute is over, whatever became of it."""
        if self.computing is not None and self.computing.key == key:
            self.computing = None

    def clear(self) -> None:
        """Forgets everything: the group is gone."""
        self.waiting.clear()
        self.computing = None

    @property
    def num_tokens(self) -> int:
        """Prompt tokens waiting or computing."""
        running = self.computing.num_tokens if self.computing else 0
        return running + sum(job.num_tokens for job in self.waiting)
