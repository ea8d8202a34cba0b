"""Attempts in a decode group and the rows of their choices: the blocks that they hold on each rank. Pure."""

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from sps2_decode_worker.placing import Places
from sps2_decode_worker.resizing import Resize, RowMoves
from sps2_decode_worker.sharing import HeldBlocks, PromptBlocks, num_freed
from sps2_decode_worker.spread import Move, Spread, even_moves


class RowState(enum.Enum):
    """Where a row is in its life."""

    RESERVED = "reserved"
    """It has room; its KV is on the way."""
    ACTIVE = "active"
    """Each step makes a token for it."""


@dataclass(eq=False)
class Tenant:
    """One attempt in the group: its rows come and are preempted together."""

    turn: int
    """Of two attempts the one with the lower turn keeps or gets its room."""
    number: int
    """Counts attempts."""
    places: Places
    """Where it began."""
    prompt: PromptBlocks
    """Whole blocks of the prompt, with the attempts that use them."""
    held_from: int = 0
    """A row of the attempt that brought `places.held`; 0 where nothing is held. It may have left since."""
    rows: "list[Row]" = field(default_factory=list)
    """Those that have not left, by number."""
    spread: Spread = field(init=False)
    """Where its KV lies."""
    resize: Resize | None = None
    """Under way."""

    def __post_init__(self) -> None:
        self.spread = Spread.of(self.places)

    @property
    def age(self) -> tuple[int, int]:
        """Where it stands among all, the last to be preempted first."""
        return self.turn, self.number

    @property
    def num_tokens(self) -> int:
        """Tokens that have KV once every step planned so far is done."""
        return self.places.num_tokens + self.rows[0].num_planned - 1

    @property
    def moves_now(self) -> bool:
        """Whether blocks of it may go elsewhere: all its rows decode, nothing is under way, and no other uses them."""
        active = all(row.state is RowState.ACTIVE for row in self.rows)
        return active and self.resize is None and self.spread.movable and not self.prompt.is_shared

    @property
    def why_not_movable(self) -> str:
        """Where not `moves_now`."""
        if self.prompt.is_shared:
            return "other requests use its prompt's KV"
        return "a resize is under way" if self.resize else "its KV cannot move now"

    @property
    def gives_now(self) -> bool:
        """Whether others may take over blocks of its prompt: their KV is there, and none of them is to move."""
        return self.resize is None and any(row.state is RowState.ACTIVE for row in self.rows)

    @property
    def changes_home(self) -> bool:
        """Whether the next part of the resize under way is another home."""
        return self.resize is not None and self.resize.new_home is not None

    def held(self, rank: int) -> int:
        """What is counted for it on a rank: what it uses there, and what is promised to it."""
        return (self.spread.prompt_blocks(rank) if self.rows else 0) + self.own(rank)

    def own(self, rank: int) -> int:
        """The same without the prompt's whole blocks, which others may use as well."""
        shared = self.spread.prompt_blocks(rank)
        return sum(row.blocks.get(rank, 0) - shared for row in self.rows) + self.promised(rank)

    def own_at_last(self, rank: int) -> int:
        """`own` when the output of its rows is as long as it may become."""
        home, growing = self.spread.home, 0
        if rank == home:
            growing = len(self.rows) * self.blocks_at_home(self.places.max_new_tokens)
            growing -= sum(row.blocks[home] for row in self.rows)
        return self.own(rank) + max(0, growing)

    def promised(self, rank: int) -> int:
        """Blocks that a rank keeps free for what is to move there."""
        return self.resize.incoming(rank, len(self.rows)) if self.resize and self.rows else 0

    def alone(self, rank: int) -> int:
        """Of `held`, what nobody else uses: so much is free when it leaves."""
        return self.own(rank) + num_freed([self.prompt], rank)

    def blocks_at_home(self, num_new_tokens: int) -> int:
        """Blocks of one row at home with so many new tokens."""
        home, spread = self.spread.home, self.spread
        return spread.prompt_blocks(home) + spread.own_blocks(home, self.places.num_tokens + num_new_tokens)

    def plan_resize(self, holders: Collection[int], home: int) -> tuple[Resize, Spread]:
        """What it takes to spread it evenly over these holders, and how it lies then.

        Raises:
            TooShortError: it has fewer blocks than that.
        """
        spread, num_tokens = self.spread, self.num_tokens
        new_home = home if home != spread.home else None
        if new_home is not None:
            num_tokens += 1  # that of the step with which it is handed over
            spread = spread.handed_over(new_home, num_tokens)
        resize = Resize(new_home, list(even_moves(spread, holders, num_tokens)))
        for move in resize.moves:
            spread = spread.after(move)
        return resize, spread

    def fits_at_home(self, spread: Spread, blocks: int) -> bool:
        """Whether a home with so many blocks holds all of its rows' output, spread like that."""
        num_tokens = self.places.num_tokens + self.places.max_new_tokens
        own = len(self.rows) * spread.own_blocks(spread.home, num_tokens)
        return spread.prompt_blocks(spread.home) + own <= blocks

    def go_on(self, most: int) -> RowMoves:
        """The next part of the resize under way, of about so many blocks; it counts as done."""
        assert self.resize is not None, "asked where one is under way"
        moves: tuple[Move, ...] = ()
        if (new_home := self.resize.new_home) is not None:
            self._hand_over(new_home)
            self.resize.new_home = None
        else:
            moves = self.resize.take(most, len(self.rows))
            self._move(moves)
        if not self.resize.moves:
            self.resize = None
        return self._told(moves)

    def away(self, source: int, target: int, most: int) -> Move | None:
        """Up to so many whole blocks of all its rows, those that they share first."""
        shared, own = self.spread.whole_blocks(source, self.num_tokens)
        shared = min(shared, most)
        move = Move(source, target, shared, min(own, (most - shared) // len(self.rows)))
        return move if move.num_blocks(1) else None

    def give(self, move: Move) -> RowMoves:
        """Moves these blocks; they count as moved."""
        self._move([move])
        return self._told((move,))

    def _move(self, moves: Iterable[Move]) -> None:
        for move in moves:
            self.spread = self.spread.after(move)
            for row in self.rows:
                row.blocks[move.source] -= move.num_blocks(1)
                row.blocks[move.target] = row.blocks.get(move.target, 0) + move.num_blocks(1)
            if move.prompt_blocks:
                self.prompt.move(
                    HeldBlocks(rank, self.spread.prompt_blocks(rank)) for rank in self.spread.prompt
                )

    def _hand_over(self, home: int) -> None:
        before, num_tokens = self.spread.home, self.num_tokens + 1
        self.spread = self.spread.handed_over(home, num_tokens)
        left = self.spread.prompt_blocks(before) + self.spread.own_blocks(before, num_tokens)
        for row in self.rows:
            row.blocks[before] = left  # those ahead of its tokens are free as well
            row.blocks[home] = row.blocks.get(home, 0) + 1

    def _told(self, moves: tuple[Move, ...]) -> RowMoves:
        """As the ranks are told, once it counts as done."""
        return RowMoves(
            rows=tuple(row.row_id for row in self.rows),
            moves=moves,
            holders=self.spread.holders,
            home=self.spread.home,
            num_outputs=self.rows[0].num_planned + 1,
            last=self.resize is None,
        )


@dataclass(eq=False)
class Row:
    """One choice of an attempt."""

    row_id: int
    tenant: Tenant = field(repr=False)
    blocks: dict[int, int]
    """Blocks on each of its holders, those that choices share included."""
    state: RowState = RowState.RESERVED
    num_planned: int = 1
    """New tokens planned so far; the first is prefill's."""

    @property
    def home(self) -> int:
        """Rank that takes its new tokens."""
        return self.tenant.spread.home

    @property
    def needs_block(self) -> bool:
        """Whether the next step's token finds its blocks full."""
        return self.tenant.blocks_at_home(self.num_planned) > self.blocks[self.home]

    @property
    def may_grow(self) -> bool:
        """Whether its last token does."""
        return self.tenant.blocks_at_home(self.tenant.places.max_new_tokens) > self.blocks[self.home]
