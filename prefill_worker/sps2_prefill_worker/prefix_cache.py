"""The leader's book of cached KV: what all ranks of its group keep, who reads it, what goes when room is needed. Pure.

KV is kept by runs: what one prompt computed behind the runs that it had found, up to its last full block. Runs form
trees; a run's blocks lie on the ranks that computed them, as many on each as the book counts. The ranks execute what
it decides, in the order of their commands, so that it never has to ask them.

A run is found once its prompt is delivered. Room comes from runs that nobody reads and nothing continues, the least
recently used first; then, before a prompt would wait for ever, from those that are read (their blocks are free when
the reader is through) and from prompts under way, which then are not kept.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from sps2_engine.kv_pool import BLOCK_TOKENS
from sps2_engine.kv_transfer.rows import num_before
from sps2_layout.attention import Attention
from sps2_layout.layout import Span

Key = Hashable
SpansByRank = Sequence[Sequence[Span]]
"""Tokens of each sequence rank, ascending."""


@dataclass(frozen=True)
class Prompt:
    """What the book needs to know of a text."""

    attention: Attention
    keys: tuple[bytes, ...]
    """Chain hashes of the full blocks of its prompt; none: it neither finds nor leaves anything."""
    num_tokens: int
    """With what was generated behind it."""


@dataclass(eq=False)
class Run:
    """Tokens [begin, end) of a chain of blocks, computed at once."""

    number: int
    attention: Attention
    """Under which they and all before them were made."""
    keys: tuple[bytes, ...]
    """Of all blocks before `end`."""
    begin: int
    parent: "Run | None"
    spans: SpansByRank
    num_blocks: tuple[int, ...]
    """On each sequence rank."""
    last_used: int = 0
    num_children: int = 0
    """Kept runs that continue it."""
    num_readers: int = 0
    """Attempts under way that use it."""

    @property
    def end(self) -> int:
        """One past its last token."""
        return len(self.keys) * BLOCK_TOKENS

    @property
    def own_keys(self) -> tuple[bytes, ...]:
        """Of its own blocks."""
        return self.keys[self.begin // BLOCK_TOKENS :]

    def path(self) -> Iterator["Run"]:
        """It, what it continues, and so on."""
        run: Run | None = self
        while run is not None:
            yield run
            run = run.parent


@dataclass(frozen=True)
class Match:
    """The beginning of a text that is cached."""

    num_tokens: int
    parts: tuple[tuple[Run, Span], ...]
    """What is used of each run, in token order, without gaps."""

    def tokens_by_rank(self) -> list[int]:
        """How many of the tokens lie on each sequence rank."""
        totals: Counter[int] = Counter()
        for run, part in self.parts:
            for rank, spans in enumerate(run.spans):
                totals[rank] += sum(len(span.cut(part.begin, part.end)) for span in spans)
        return [totals[rank] for rank in sorted(totals)]


NO_MATCH = Match(0, ())


@dataclass
class Admitted:
    """An attempt under way."""

    match: Match
    num_blocks: Sequence[int]
    """That it takes on each sequence rank until it is delivered."""
    run: Run | None
    """What is kept of it then."""
    evicted: list[int]
    """Runs that the ranks must give up before it begins."""


@dataclass
class Changes:
    """What others are to be told of: keys by the attention under which the KV was made."""

    recorded: list[tuple[Attention, bytes]] = field(default_factory=list)
    evicted: list[tuple[Attention, bytes]] = field(default_factory=list)


class PrefixCache:
    """The book of one epoch.

    Args:
        blocks_by_rank: KV blocks of each sequence rank.
    """

    def __init__(self, blocks_by_rank: Sequence[int]) -> None:
        self._blocks = tuple(blocks_by_rank)
        self._runs: dict[int, Run] = {}
        self._by_key: dict[bytes, list[Run]] = {}
        self._admitted: dict[Key, Admitted] = {}
        self._told: Counter[tuple[Attention, bytes]] = Counter()
        self._numbers = itertools.count(1)
        self._clock = itertools.count(1)
        self.changes = Changes()

    def find(self, prompt: Prompt) -> Match:
        """The longest cached beginning that this prompt may use; at least its last token is left to compute."""
        longest = min(len(prompt.keys), (prompt.num_tokens - 1) // BLOCK_TOKENS)
        for num_blocks in range(longest, 0, -1):
            for run in self._by_key.get(prompt.keys[num_blocks - 1], ()):
                usable = prompt.attention.num_usable(run.attention, num_blocks * BLOCK_TOKENS)
                usable -= usable % BLOCK_TOKENS
                if usable and usable >= prompt.attention.dense_from:
                    return Match(usable, tuple(_cut(run, usable)))
        return NO_MATCH

    def most_blocks(self, match: Match, spans: SpansByRank) -> int:
        """Blocks of one rank that an attempt reads or takes; none may have more than a rank has."""
        read = _sum(self._blocks, [run.num_blocks for run, _ in match.parts])
        return max(used + _blocks_of(sum(map(len, own))) for used, own in zip(read, spans, strict=True))

    def has_idle_room(self, match: Match, spans: SpansByRank) -> bool:
        """Whether an attempt would begin without an eviction that its readers or attempts under way would notice."""
        path = {run for run, _ in match.parts}
        idle = (run.num_blocks for run in self._runs.values() if not run.num_readers and run not in path)
        wanted = [_blocks_of(sum(map(len, own))) for own in spans]
        return not _lacks(_sum(self._blocks, [self.num_free, *idle]), wanted)

    def admit(self, key: Key, prompt: Prompt, match: Match, spans: SpansByRank) -> Admitted:
        """Makes room for an attempt.

        Args:
            key: of the attempt.
            prompt: its text.
            match: found just now.
            spans: what each rank computes of it.
        """
        num_blocks = [_blocks_of(sum(map(len, own))) for own in spans]
        path = {run for run, _ in match.parts}
        evicted = [run.number for run in self._make_room(num_blocks, path)]
        admitted = Admitted(match, num_blocks, self._run_of(prompt, match, spans), evicted)
        for run in path:
            run.num_readers += 1
            run.last_used = next(self._clock)
        self._admitted[key] = admitted
        return admitted

    def delivered(self, key: Key) -> list[int]:
        """All ranks have delivered an attempt: what it made is found from now on. Returns runs to be evicted."""
        admitted = self._end(key)
        run = admitted.run
        if run is None:
            return []
        parents_kept = all(one.number in self._runs for one in itertools.islice(run.path(), 1, None))
        if not parents_kept or any(one.attention == run.attention for one in self._holders(run.keys[-1])):
            return [run.number]  # it hangs in the air, or another attempt made the same meanwhile
        run.last_used = next(self._clock)
        self._runs[run.number] = run
        if run.parent is not None:
            run.parent.num_children += 1
        for one in run.own_keys:
            self._by_key.setdefault(one, []).append(run)
        for one in run.keys:
            self._told[run.attention, one] += 1
            if self._told[run.attention, one] == 1:
                self.changes.recorded.append((run.attention, one))
        return []

    def abandon(self, key: Key) -> list[int]:
        """An attempt is given up: nothing of it is kept. Returns runs to be evicted."""
        admitted = self._admitted.get(key)
        if admitted is None or admitted.run is None:
            return []
        number, admitted.run = admitted.run.number, None
        return [number]

    def forget(self, key: Key) -> None:
        """An attempt that was given up is over on every rank; unknown where it never began, or was delivered."""
        if key in self._admitted:
            self._end(key)

    def take_changes(self) -> Changes:
        """What has changed since this was called last."""
        changes, self.changes = self.changes, Changes()
        return changes

    @property
    def num_cached(self) -> list[int]:
        """Blocks that are kept, by sequence rank."""
        return _sum(self._blocks, (run.num_blocks for run in self._runs.values()))

    @property
    def num_free(self) -> list[int]:
        """Blocks that are neither kept nor taken by an attempt, by sequence rank.

        Those of runs that were evicted under their readers count as free a little early.
        """
        taken = _sum(self._blocks, (one.num_blocks for one in self._admitted.values()))
        return [
            total - cached - used
            for total, cached, used in zip(self._blocks, self.num_cached, taken, strict=True)
        ]

    def _end(self, key: Key) -> Admitted:
        admitted = self._admitted.pop(key)
        for run, _ in admitted.match.parts:
            run.num_readers -= 1
        return admitted

    def _run_of(self, prompt: Prompt, match: Match, spans: SpansByRank) -> Run | None:
        token_end = len(prompt.keys) * BLOCK_TOKENS
        if token_end <= match.num_tokens:
            return None
        num_blocks = tuple(_blocks_of(num_before(own, token_end)) for own in spans)
        parent = match.parts[-1][0] if match.parts else None
        attention = prompt.attention.of_any_length
        number = next(self._numbers)
        return Run(number, attention, prompt.keys, match.num_tokens, parent, spans, num_blocks)

    def _make_room(self, wanted: Sequence[int], path: set[Run]) -> Iterator[Run]:
        """Evicts until so many blocks are free on each rank, as far as that is possible."""
        while _lacks(self.num_free, wanted):
            run = self._least_used(lambda run: not run.num_readers and run not in path)
            if run is None:
                break
            yield self._evict(run)
        while _lacks(self._free_in_the_end, wanted):
            run = self._least_used(lambda run: run not in path)
            if run is not None:
                yield self._evict(run)
                continue
            unkept = next((one for one in self._admitted.values() if one.run is not None), None)
            if unkept is None or unkept.run is None:
                return
            run, unkept.run = unkept.run, None
            yield run

    @property
    def _free_in_the_end(self) -> list[int]:
        """Blocks that are free once all that is under way is delivered, or given up."""
        kept = [one.run.num_blocks for one in self._admitted.values() if one.run is not None]
        kept_then = _sum(self._blocks, kept)
        return [
            total - cached - more
            for total, cached, more in zip(self._blocks, self.num_cached, kept_then, strict=True)
        ]

    def _least_used(self, may_go: Callable[[Run], bool]) -> Run | None:
        ends = (run for run in self._runs.values() if not run.num_children and may_go(run))
        return min(ends, key=lambda run: run.last_used, default=None)

    def _evict(self, run: Run) -> Run:
        del self._runs[run.number]
        if run.parent is not None:
            run.parent.num_children -= 1
        for one in run.own_keys:
            self._by_key[one].remove(run)
            if not self._by_key[one]:
                del self._by_key[one]
        for one in run.keys:
            self._told[run.attention, one] -= 1
            if not self._told[run.attention, one]:
                del self._told[run.attention, one]
                self.changes.evicted.append((run.attention, one))
        return run

    def _holders(self, key: bytes) -> Sequence[Run]:
        return self._by_key.get(key, ())


def _cut(run: Run, num_tokens: int) -> Iterator[tuple[Run, Span]]:
    """What the first tokens take of the run in which they may end, and of those before it."""
    parts = []
    end = num_tokens
    for one in run.path():
        if one.begin < end:
            parts.append((one, Span(one.begin, end)))
            end = one.begin
    return reversed(parts)


def _blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def _sum(like: Sequence[int], counts: "Iterator[Sequence[int]] | Sequence[Sequence[int]]") -> list[int]:
    return [sum(column) for column in zip([0] * len(like), *counts, strict=True)]


def _lacks(free: Sequence[int], wanted: Sequence[int]) -> bool:
    return any(have < want for have, want in zip(free, wanted, strict=True))
