"""What a target expects, and the only place where a slab gets into blocks.

A slab is taken when its fence, source, ranges, length and checksum hold; the checks run on the target's own
copy, so that a source that goes on writing into its ring cannot change what was checked. Knows nothing about
rings, streams or threads; any thread may call it.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sps2.internal.v1.kv_transfer_service_pb2 import SlabAck, SlabHeader, SlabVerdict
from sps2.internal.v1.placement_pb2 import Fence
from sps2_engine.kv_pool import slot_runs
from sps2_engine.kv_transfer.slab import ArenaBytes, checksum, header_fault
from sps2_layout.layout import Span

logger = logging.getLogger(__name__)

AttemptKey = tuple[str, int]


@dataclass(eq=False)  # identity tells an expectation from its successor under the same attempt
class Expectation:
    """KV that will come for one attempt."""

    fence: Fence
    tokens: Span
    heads: Span
    blocks: Sequence[int]
    """Blocks in token order; the first token lies in the first slot of the first."""
    on_complete: Callable[[], None]
    num_layers: int
    num_missing: int = field(init=False)
    """(layer, token, head) that are not in their blocks."""
    _seen: NDArray[np.uint8] = field(init=False)
    """[layers, tokens, ceil(heads / 8)], a bit for each head: in its block."""

    def __post_init__(self) -> None:
        num_heads = len(self.heads)
        self.num_missing = self.num_layers * len(self.tokens) * num_heads
        # 32 layers by 8 heads of a million tokens: 32 MB as bits, 256 MB as flags.
        self._seen = np.zeros((self.num_layers, len(self.tokens), -(-num_heads // 8)), dtype=np.uint8)

    def runs(self, header: SlabHeader) -> list[tuple[int, int]]:
        """The slots of the tokens of a slab."""
        first = header.token_begin - self.tokens.begin
        return slot_runs(self.blocks, header.token_end - header.token_begin, first)

    def mark(self, header: SlabHeader) -> int:
        """Counts a slab as there; how much of it was not, in (token, head) pairs."""
        window = self._seen[header.layer, header.token_begin - self.tokens.begin :]
        window = window[: header.token_end - header.token_begin]
        heads = np.zeros(len(self.heads), dtype=np.bool_)
        heads[header.head_begin - self.heads.begin : header.head_end - self.heads.begin] = True
        bits = np.packbits(heads)
        num_new = int(np.bitwise_count(bits & ~window).sum())
        window |= bits
        self.num_missing -= num_new
        return num_new


class SlabIntake:
    """The expectations of one target process, and the verdict on every slab.

    Attributes:
        num_verdicts: Slabs by verdict since the start.
        bytes_accepted: Bytes that came in accepted slabs, repeated ones included.
    """

    def __init__(self, arena: ArenaBytes, process_incarnation: str) -> None:
        self._arena = arena
        self._incarnation = process_incarnation
        self._expected: dict[AttemptKey, Expectation] = {}
        # Held while bytes go into blocks, so that nothing is being written when `forget` returns.
        self._lock = threading.Lock()
        self.num_verdicts: Counter[int] = Counter()
        self.bytes_accepted = 0

    def expect(
        self,
        fence: Fence,
        token_begin: int,
        token_end: int,
        blocks: Sequence[int],
        on_complete: Callable[[], None],
    ) -> None:
        """See `KvReceiver.expect`; at least one token."""
        if fence.process_incarnation != self._incarnation:
            raise ValueError(
                f"the fence is of process {fence.process_incarnation}, this is {self._incarnation}"
            )
        if not 0 <= token_begin < token_end:
            raise ValueError(f"no tokens in [{token_begin}, {token_end})")
        slot_runs(blocks, token_end - token_begin)  # raises when the blocks are too few
        copied = Fence()
        copied.CopyFrom(fence)
        tokens, arena = Span(token_begin, token_end), self._arena
        expectation = Expectation(copied, tokens, arena.heads, list(blocks), on_complete, arena.num_layers)
        with self._lock:
            if _key(fence) in self._expected:
                raise ValueError(f"attempt {_key(fence)} is expected already")
            self._expected[_key(fence)] = expectation

    def forget(self, fence: Fence) -> None:
        """See `KvReceiver.forget`."""
        with self._lock:
            expectation = self._expected.get(_key(fence))
            if expectation is not None and expectation.fence == fence:
                del self._expected[_key(fence)]

    def num_incomplete(self) -> int:
        """Attempts that still lack KV."""
        with self._lock:
            return sum(expectation.num_missing > 0 for expectation in self._expected.values())

    def take(self, header: SlabHeader, source_incarnation: str, copy: Callable[[], memoryview]) -> SlabAck:
        """Verifies one slab and puts it into its blocks; a slab that is there already is accepted again.

        Args:
            header: As it came.
            source_incarnation: Whose ring or stream it came by.
            copy: Makes the target's own copy of the slab, `header.num_bytes` long; called at most once, and
                not for a header that is refused.
        """
        verdict, detail, completed = self._judge(header, source_incarnation, copy)
        with self._lock:
            self.num_verdicts[verdict] += 1
        if completed is not None:
            tell_complete(completed.on_complete, completed.fence)
        return SlabAck(sequence=header.sequence, slot=header.slot, verdict=verdict, detail=detail)

    def _judge(
        self, header: SlabHeader, source_incarnation: str, copy: Callable[[], memoryview]
    ) -> tuple[SlabVerdict.ValueType, str, Expectation | None]:
        if header.source_incarnation != source_incarnation:
            return SlabVerdict.SLAB_VERDICT_REFUSED, "the slab came by another source's ring", None
        with self._lock:
            expectation, fault = self._match(header)
        if expectation is None:
            return SlabVerdict.SLAB_VERDICT_REFUSED, fault, None
        payload = copy()
        if len(payload) != header.num_bytes:
            return SlabVerdict.SLAB_VERDICT_REFUSED, f"{len(payload)} bytes came", None
        if checksum([payload]) != header.crc32:
            return SlabVerdict.SLAB_VERDICT_CORRUPT, "checksum", None
        with self._lock:
            # Without the lock during the checksum, the attempt may have been forgotten and its blocks reused.
            if self._expected.get(_key(header.fence)) is not expectation:
                return SlabVerdict.SLAB_VERDICT_REFUSED, "the attempt was forgotten meanwhile", None
            completed = self._store(header, expectation, payload)
        return SlabVerdict.SLAB_VERDICT_ACCEPTED, "", expectation if completed else None

    def _match(self, header: SlabHeader) -> tuple[Expectation | None, str]:
        if header.fence.process_incarnation != self._incarnation:
            return None, f"this is process {self._incarnation}, not {header.fence.process_incarnation}"
        expectation = self._expected.get(_key(header.fence))
        if expectation is None:
            return None, f"attempt {_key(header.fence)} is not expected"
        if expectation.fence != header.fence:
            return None, f"the attempt is of epoch {expectation.fence.epoch}, not {header.fence.epoch}"
        fault = header_fault(header, expectation.tokens, self._arena)
        return (None, fault) if fault else (expectation, "")

    def _store(self, header: SlabHeader, expectation: Expectation, payload: memoryview) -> bool:
        """Scatters under the lock; whether the attempt has all its KV only now."""
        self.bytes_accepted += len(payload)
        if expectation.mark(header) == 0:  # sent again: what is there may have been read since
            return False
        heads = Span(header.head_begin, header.head_end)
        self._arena.scatter(payload, header.layer, expectation.runs(header), heads)
        return expectation.num_missing == 0


def _key(fence: Fence) -> AttemptKey:
    return (fence.attempt.request_id, fence.attempt.number)


def tell_complete(on_complete: Callable[[], None], fence: Fence) -> None:
    """Calls it; an error of the engine's is logged and goes no further."""
    try:
        on_complete()
    except Exception:
        # The slab is in its block whatever the engine makes of the news, and other attempts need this thread.
        logger.exception("on_complete of attempt %s failed", _key(fence))
