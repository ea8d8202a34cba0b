"""Blocks of prompts that attempts use together: what two prompts have in common, and who uses what. Pure.

A full block of a prompt is never written again once its KV is complete. So an attempt whose prompt begins with the
same tokens, seen by the same mask, may use it in place of one of its own; it is free when the last user has left.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from sps2_layout.attention import Attention


@dataclass(frozen=True)
class Prefix:
    """What tells whether prompts have blocks in common."""

    mask: Attention | None = None
    """Under which the KV is made; None: dense causal attention, which is the same for prompts of any length."""
    hashes: tuple[bytes, ...] = ()
    """Chain hashes of the prompt's full blocks: two that are equal stand behind equal ones."""

    def num_common(self, other: "Prefix") -> int:
        """Leading blocks that are the same in both prompts."""
        if self.mask != other.mask:
            return 0
        most = range(min(len(self.hashes), len(other.hashes)))
        return bisect_left(most, True, key=lambda index: self.hashes[index] != other.hashes[index])


NO_PREFIX = Prefix()


class HeldBlocks(NamedTuple):
    """Blocks that follow each other in a prompt and lie on one rank."""

    rank: int
    num_blocks: int


@dataclass(eq=False)
class Run:
    """Blocks that follow each other in a prompt, lie on one rank and have the same users."""

    rank: int
    num_blocks: int
    users: "set[PromptBlocks]" = field(default_factory=set, repr=False)


@dataclass(eq=False)
class PromptBlocks:
    """The blocks of an attempt's prompt into which none of its rows appends, in the order of the prompt."""

    prefix: Prefix
    runs: list[Run]

    @classmethod
    def of(cls, prefix: Prefix, held: Sequence[Run], new: Iterable[HeldBlocks]) -> Self:
        """Those of a new attempt: the runs that it takes over, and blocks of its own behind them."""
        return cls(prefix, [*held, *_runs(new)])

    def join(self) -> None:
        """Its attempt has come: it uses its runs from now on."""
        for run in self.runs:
            run.users.add(self)

    @property
    def is_shared(self) -> bool:
        """Whether another attempt uses some of them."""
        return any(len(run.users) > 1 for run in self.runs)

    def where(self, num_blocks: int) -> tuple[HeldBlocks, ...]:
        """Where the first blocks lie."""
        found: list[HeldBlocks] = []
        for run in self.runs:
            taken = min(run.num_blocks, num_blocks)
            num_blocks -= taken
            if found and found[-1].rank == run.rank:
                found[-1] = HeldBlocks(run.rank, found[-1].num_blocks + taken)
            elif taken:
                found.append(HeldBlocks(run.rank, taken))
        return tuple(found)

    def first(self, num_blocks: int) -> list[Run]:
        """The runs of the first blocks; the one in which they end is cut in two, for all of its users."""
        found: list[Run] = []
        for run in list(self.runs):
            if not num_blocks:
                break
            if run.num_blocks > num_blocks:
                _cut(run, num_blocks)
            found.append(run)
            num_blocks -= run.num_blocks
        return found

    def leave(self) -> None:
        """Its attempt is gone."""
        for run in self.runs:
            run.users.remove(self)
        self.runs = []

    def move(self, where: Iterable[HeldBlocks]) -> None:
        """It lies there now, and nobody else uses any of it.

        What a rank has of it is no more the first of the prompt in its order: nobody takes it over from now on.
        """
        self.leave()
        self.prefix, self.runs = NO_PREFIX, _runs(where)
        self.join()


def _runs(blocks: Iterable[HeldBlocks]) -> list[Run]:
    return [Run(*one) for one in blocks if one.num_blocks]


def _cut(run: Run, num_blocks: int) -> None:
    """Makes it end after so many blocks; a new run with the same users follows it."""
    rest = Run(run.rank, run.num_blocks - num_blocks, set(run.users))
    run.num_blocks = num_blocks
    for user in run.users:
        user.runs.insert(user.runs.index(run) + 1, rest)


def num_used(prompts: Iterable[PromptBlocks], num_ranks: int) -> list[int]:
    """Blocks that these use on each rank, shared ones once."""
    used = [0] * num_ranks
    for run in {run for blocks in prompts for run in blocks.runs}:
        used[run.rank] += run.num_blocks
    return used


def num_freed(leaving: Sequence[PromptBlocks], rank: int) -> int:
    """Blocks of a rank that nobody uses any more when these leave together."""
    users = set(leaving)
    runs = {run for blocks in leaving for run in blocks.runs if run.rank == rank and run.users <= users}
    return sum(run.num_blocks for run in runs)
