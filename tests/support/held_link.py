"""A communicator as if over a link of a given bandwidth: nothing is complete sooner than it allows.

Nothing sleeps at a post, and a wait blocks only until the exchange would be there: what a caller computes
meanwhile hides it. The link of a rank carries one exchange after the other, and both ways at once.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sps2_engine.collectives import Communicator, PendingExchange


@dataclass(frozen=True)
class _HeldExchange:
    pending: PendingExchange
    complete_at_s: float

    def wait(self) -> Tensor:
        received = self.pending.wait()
        time.sleep(max(0.0, self.complete_at_s - time.perf_counter()))
        return received

    def when_complete(self, call: Callable[[float], None]) -> None:
        self.pending.when_complete(lambda at_s: call(max(at_s, self.complete_at_s)))


class HeldLink:
    """See the module; implements `Communicator` over another.

    Args:
        inner: does the real exchange, which must be quicker than the link that it stands for.
        bytes_per_s: of the link, each way.
    """

    def __init__(self, inner: Communicator, bytes_per_s: float) -> None:
        self._inner = inner
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self.busy_s = 0.0
        """How long the link has carried something, so far as posted."""
        self.rank = inner.rank
        self.size = inner.size
        self.bytes_posted: Counter[str] = inner.bytes_posted

    def all_to_all(
        self,
        send: Tensor,
        send_bytes: Sequence[int],
        recv_bytes: Sequence[int],
        kind: str,
        lane: int = 0,
        into: Tensor | None = None,
    ) -> PendingExchange:
        """See `Communicator.all_to_all`."""
        pending = self._inner.all_to_all(send, send_bytes, recv_bytes, kind, lane, into)
        took_s = max(sum(send_bytes), sum(recv_bytes)) / self._bytes_per_s
        self._free_at_s = max(self._free_at_s, time.perf_counter()) + took_s
        self.busy_s += took_s
        return _HeldExchange(pending, self._free_at_s)

    def agree(self, value: int) -> int:
        """See `Communicator.agree`."""
        return self._inner.agree(value)

    def close(self) -> None:
        """See `Communicator.close`."""
        self._inner.close()
