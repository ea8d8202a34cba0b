"""What the leader of a decode group exports to Prometheus beside what every rank does (docs/metrics.md)."""

from collections.abc import Iterable

from prometheus_client import Counter, Histogram
from prometheus_client.registry import Collector

STEP_BUCKETS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5,
)  # fmt: skip


class LeaderMetrics:
    """Told by the coordinator, once for each step of all rows together."""

    def __init__(self) -> None:
        self._steps = Histogram(
            "sps2_step_seconds",
            "A step of all rows, on the last rank that reports it.",
            buckets=STEP_BUCKETS,
            registry=None,
        )
        self._tokens = Counter("sps2_generation_tokens", "Tokens drawn for live rows.", registry=None)
        self._preemptions = Counter(
            "sps2_preemptions", "Attempts whose room went to earlier ones.", registry=None
        )

    def step(self, step_s: float) -> None:
        """Every rank has reported a step; the last one says that it took so long."""
        self._steps.observe(step_s)

    def drawn(self, num_tokens: int) -> None:
        """A rank has drawn tokens that are wanted."""
        self._tokens.inc(num_tokens)

    def preempted(self) -> None:
        """An attempt has to come again."""
        self._preemptions.inc()

    @property
    def collectors(self) -> Iterable[Collector]:
        """To be registered."""
        return self._steps, self._tokens, self._preemptions
