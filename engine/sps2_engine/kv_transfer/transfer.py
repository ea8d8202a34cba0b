"""One attempt's KV on its way from this rank: what the engine holds, and what it learns at the end."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from sps2.internal.v1.placement_pb2 import Attempt, Placement, ShardPlacement
from sps2_engine.kv_transfer.base import TransferError
from sps2_engine.kv_transfer.relayout import Part
from sps2_engine.kv_transfer.rows import UsedRows


@dataclass(frozen=True)
class TransferSummary:
    """A transfer that succeeded."""

    bytes_sent: int
    """Bytes of slabs posted, resends included."""
    slabs_sent: int
    slabs_resent: int


@dataclass(eq=False)
class Transfer:
    """Handle of one transfer; only `done` is for the engine."""

    attempt: Attempt
    placement: Placement
    sources: Sequence[UsedRows]
    """Where this rank has its tokens; each token in one of them."""
    done: Future[TransferSummary] = field(default_factory=Future)
    """The summary when every target has accepted every slab, or a TransferError."""
    parts: list[Part] = field(default_factory=list)
    """What each target takes."""
    layers: set[int] = field(default_factory=set)
    """Layers that were said to be ready; the calling thread's."""
    num_missing: int = 0
    """(layer, token, head) not accepted yet."""
    bytes_sent: int = 0
    slabs_sent: int = 0
    slabs_resent: int = 0

    def __post_init__(self) -> None:
        # Cancelling goes by `KvSender.abort`: a future that is running cannot be cancelled past the sender.
        self.done.set_running_or_notify_cancel()

    @property
    def live(self) -> bool:
        """Whether it is still going on."""
        return not self.done.done()

    def shard(self, part: Part) -> ShardPlacement:
        """Where a part goes."""
        return self.placement.shards[part.shard]

    def runs(self, part: Part) -> list[tuple[int, int]]:
        """The slots of a part's tokens.

        Raises:
            ValueError: none of the sources holds them, or several do.
        """
        held = [source for source in self.sources if source.hold(part.tokens)]
        if len(held) != 1:
            raise ValueError(f"{len(held)} sources hold tokens {part.tokens}")
        return held[0].rows.slots(part.tokens)

    def fail(self, error: TransferError) -> None:
        """Ends it, unless it has ended."""
        if self.live:
            self.done.set_exception(error)

    def count_accepted(self, part: Part) -> None:
        """Notes that a slab of one layer is in its blocks; ends the transfer with the last one."""
        self.num_missing -= part.num_cells
        self.finish_if_complete()

    def finish_if_complete(self) -> None:
        """Ends the transfer well when nothing is missing."""
        if self.num_missing == 0 and self.live:
            self.done.set_result(TransferSummary(self.bytes_sent, self.slabs_sent, self.slabs_resent))


@dataclass(frozen=True)
class Share:
    """One layer of what one target takes: ready in the arena, not cut into slabs yet."""

    transfer: Transfer
    part: Part
    layer: int


@dataclass(frozen=True)
class Slab:
    """One slab to be sent."""

    transfer: Transfer
    part: Part
    layer: int
    num_resends: int = 0
