"""The change of an attempt's holders while it decodes: which ranks, and a few blocks with each step. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from sps2_decode_worker.spread import Move, Spread


class NotMovableError(Exception):
    """An attempt's blocks must stay where they are, now or for good; says why."""


@dataclass
class Resize:
    """What is still to be done."""

    new_home: int | None
    """First of all the attempt is handed over to it; None where home stays, or it has been."""
    moves: list[Move]
    """Then these, in order."""

    def incoming(self, rank: int, num_rows: int) -> int:
        """Blocks that a rank has promised."""
        moved = sum(move.num_blocks(num_rows) for move in self.moves if move.target == rank)
        return moved + (num_rows if rank == self.new_home else 0)

    def take(self, most: int, num_rows: int) -> tuple[Move, ...]:
        """The next moves, at least one of them and of at most so many blocks if rows are that few."""
        taken: list[Move] = []
        while self.moves and most > 0:
            part, rest = self.moves.pop(0).split(most, num_rows)
            taken.append(part)
            most -= part.num_blocks(num_rows)
            if rest is not None:
                self.moves.insert(0, rest)
        return tuple(taken)


@dataclass(frozen=True)
class RowMoves:
    """What moves of one attempt in one step: it is elsewhere from the next step on."""

    rows: tuple[int, ...]
    moves: tuple[Move, ...]
    holders: tuple[int, ...]
    """After the step."""
    home: int
    """After the step; another one takes the block that grows and the tokens so far."""
    num_outputs: int
    """Tokens that a row has drawn after the step."""
    last: bool
    """Whether nothing more of it is under way."""

    @property
    def num_blocks(self) -> int:
        """Blocks of all rows together, without that of a change of home."""
        return sum(move.num_blocks(len(self.rows)) for move in self.moves)


def choose_ranks(spread: Spread, degree: int, room: Sequence[int]) -> tuple[int, ...]:
    """So many ranks: home, then holders, then others, the ones with most room first; ascending."""
    order = sorted(
        range(len(room)),
        key=lambda rank: (rank != spread.home, rank not in spread.holders, -room[rank], rank),
    )
    return tuple(sorted(order[:degree]))
