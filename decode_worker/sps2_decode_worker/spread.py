"""Where an attempt's KV lies in its decode group while it decodes, and which whole blocks of it go elsewhere. Pure.

All that moves is whole blocks that nobody writes any more. The block that takes new tokens is always at home; it
goes elsewhere only when home itself does.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self, TypeAlias

from sps2_decode_worker.placing import Places

Spans: TypeAlias = tuple[tuple[int, int], ...]
"""Tokens [begin, end) of the text, in the order in which they lie in blocks."""


class TooShortError(Exception):
    """An attempt has fewer blocks than ranks are to hold some."""


@dataclass(frozen=True)
class Move:
    """Blocks that go from the front of what one rank holds of an attempt to another rank."""

    source: int
    target: int
    prompt_blocks: int
    """Those that its rows share."""
    own_blocks: int
    """Of each row."""

    def num_blocks(self, num_rows: int) -> int:
        """Blocks of all rows together."""
        return self.prompt_blocks + num_rows * self.own_blocks

    def split(self, most: int, num_rows: int) -> "tuple[Move, Move | None]":
        """A part of at most so many blocks, but one of each row if need be, and the rest if there is any."""
        prompt = min(self.prompt_blocks, most)
        own = min(self.own_blocks, (most - prompt) // num_rows)
        if not prompt + own:
            own = 1
        rest = replace(self, prompt_blocks=self.prompt_blocks - prompt, own_blocks=self.own_blocks - own)
        return replace(self, prompt_blocks=prompt, own_blocks=own), rest if rest.num_blocks(1) else None


@dataclass(frozen=True)
class Spread:
    """The KV of one attempt by rank; that of its rows differs in the tokens alone."""

    home: int
    prompt: Mapping[int, Spans]
    """Whole blocks that its rows share, by rank."""
    own: Mapping[int, Spans]
    """Whole blocks of each row, by rank; at home those before `open_begin`."""
    open_begin: int
    """First token of the run at home that grows; up to it all tokens lie in whole blocks."""
    block_tokens: int
    movable: bool
    """Whether the run that grows has the end of the prompt, so that every other block is whole."""

    @classmethod
    def of(cls, places: Places) -> Self:
        """An attempt's, when its KV has come."""
        size, home, num_tokens = places.block_tokens, places.home, places.num_tokens
        begin, end = places.shards.get(home, (num_tokens, num_tokens))
        whole = begin + (end - begin) // size * size
        at_home = end == num_tokens
        prompt: dict[int, Spans] = dict.fromkeys(places.holders, ())
        first = 0
        for rank, num_blocks in places.held:
            prompt[rank] = _joined(*prompt[rank], *_spans(first, first + num_blocks * size))
            first += num_blocks * size
        for rank, shard in (places.shards | {home: (begin, whole)}).items():
            prompt[rank] = _joined(*prompt[rank], *_spans(*shard))
        return cls(
            home, prompt, {}, whole if at_home else num_tokens, size, at_home or num_tokens % size == 0
        )

    @property
    def holders(self) -> tuple[int, ...]:
        """Ranks that hold some of it, ascending."""
        away = {rank for part in (self.prompt, self.own) for rank, spans in part.items() if spans}
        return tuple(sorted(away | {self.home}))

    def prompt_blocks(self, rank: int) -> int:
        """Blocks on a rank that its rows share."""
        return -(-_length(self.prompt.get(rank, ())) // self.block_tokens)

    def own_blocks(self, rank: int, num_tokens: int) -> int:
        """Blocks of each row on a rank when so many tokens have KV."""
        grows = num_tokens - self.open_begin if rank == self.home else 0
        return -(-(_length(self.own.get(rank, ())) + grows) // self.block_tokens)

    def whole_blocks(self, rank: int, num_tokens: int) -> tuple[int, int]:
        """Blocks on a rank that nobody writes any more: shared ones and those of each row."""
        grows = num_tokens - self.open_begin if rank == self.home else 0
        return self.prompt_blocks(rank), (_length(self.own.get(rank, ())) + grows) // self.block_tokens

    def after(self, move: Move) -> Self:
        """Where it lies once these blocks have gone; what comes to a rank goes behind what is there already.

        But at home it goes before the blocks of its row, so that the one that grows stays last.
        """
        size, source, target = self.block_tokens, move.source, move.target
        prompt, kept = _split(self.prompt.get(source, ()), move.prompt_blocks * size)
        own, own_kept = _split(self.own.get(source, ()), move.own_blocks * size)
        grown = move.own_blocks * size - _length(own)
        own = _joined(*own, *_spans(self.open_begin, self.open_begin + grown))
        there = self.own.get(target, ())
        ordered = (*own, *there) if target == self.home else (*there, *own)
        return replace(
            self,
            prompt={**self.prompt, source: kept, target: _joined(*self.prompt.get(target, ()), *prompt)},
            own={**self.own, source: own_kept, target: _joined(*ordered)},
            open_begin=self.open_begin + grown,
        )

    def handed_over(self, home: int, num_tokens: int) -> Self:
        """With another home, to which the block that grows has gone when so many tokens have KV."""
        last = self.open_begin + (num_tokens - 1 - self.open_begin) // self.block_tokens * self.block_tokens
        stays = _joined(*self.own.get(self.home, ()), *_spans(self.open_begin, last))
        return replace(self, home=home, own={**self.own, self.home: stays}, open_begin=last)

    def tokens_on(self, rank: int, num_tokens: int) -> Spans:
        """Tokens that a rank holds when so many have KV, in their order in the text."""
        grows = _spans(self.open_begin, num_tokens) if rank == self.home else ()
        return _joined(*sorted((*self.prompt.get(rank, ()), *self.own.get(rank, ()), *grows)))


def even_moves(spread: Spread, holders: Collection[int], num_tokens: int) -> tuple[Move, ...]:
    """The moves after which these ranks, and no others, hold as many blocks each as the others, or one more.

    Args:
        spread: where it lies; home must be one of `holders`.
        holders: ranks.
        num_tokens: that have KV.

    Raises:
        TooShortError: there are fewer blocks than holders.
    """
    ranks = sorted({*holders, *spread.holders})
    whole = {rank: spread.whole_blocks(rank, num_tokens) for rank in ranks}
    held = {rank: sum(whole[rank]) + (rank == spread.home) for rank in ranks}
    share, more = divmod(sum(held.values()), len(holders))
    if not share:
        raise TooShortError
    largest_first = sorted(holders, key=lambda rank: (-held[rank], rank))
    goal = {rank: share + (place < more) for place, rank in enumerate(largest_first)}
    lacking = [[rank, goal[rank] - held[rank]] for rank in sorted(goal) if goal[rank] > held[rank]]
    moves = []
    for source in ranks:
        surplus, shared = held[source] - goal.get(source, 0), whole[source][0]
        while surplus > 0:
            num = min(surplus, lacking[0][1])
            moves.append(Move(source, lacking[0][0], min(num, shared), max(0, num - shared)))
            surplus, shared, lacking[0][1] = surplus - num, max(0, shared - num), lacking[0][1] - num
            if not lacking[0][1]:
                del lacking[0]
    return tuple(moves)


def _spans(begin: int, end: int) -> Spans:
    return ((begin, end),) if begin < end else ()


def _length(spans: Spans) -> int:
    return sum(end - begin for begin, end in spans)


def _joined(*spans: tuple[int, int]) -> Spans:
    """Each joined with the next where it ends at the other's begin."""
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return tuple(joined)


def _split(spans: Iterable[tuple[int, int]], num_tokens: int) -> tuple[Spans, Spans]:
    """The first tokens, or all that there are, and the rest."""
    front: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    for begin, end in spans:
        middle = min(end, begin + num_tokens)
        num_tokens -= middle - begin
        front += _spans(begin, middle)
        rest += _spans(middle, end)
    return tuple(front), tuple(rest)
