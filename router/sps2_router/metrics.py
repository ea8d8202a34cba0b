"""What a router exports to Prometheus (docs/metrics.md), and the few calls by which it is told.

On the token path there is one observation for each message of tokens; all that can be counted later, or is there as
state, is read when somebody asks.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from sps2.v1 import generation_pb2
from sps2_router.handshake import Phase
from sps2_router.types import Request, Reuse
from sps2_service.errors import ServiceError
from sps2_service.metrics import LoopReader

SHORT_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30,
)  # fmt: skip
"""Seconds between tokens."""
LONG_BUCKETS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 600, 1800, 3600,
)  # fmt: skip
"""Seconds of phases of a request: from a short prompt's to those of one that takes its hour."""

NO_REASON = "none"
SHED_REASONS = frozenset(
    {
        "QUEUE_FULL", "QUEUE_WAIT", "TOO_MANY_REQUESTS", "NO_KV_ROOM",
        "TENANT_QUEUE_FULL", "TOKENS_PER_MINUTE", "TENANT_TOO_MANY_REQUESTS",
    }
)  # fmt: skip
"""Of errors that mean "there is too much to do", not "something is wrong" (docs/operating.md, "Queues")."""
FINISH_REASONS = MappingProxyType(
    {
        number: name.removeprefix("FINISH_REASON_").lower()
        for name, number in generation_pb2.FinishReason.items()
        if number != generation_pb2.FINISH_REASON_UNSPECIFIED
    }
)
COMMITTED = frozenset({Phase.COMMITTED, Phase.FINISHED})


@dataclass(frozen=True)
class RouterState:
    """What is read for each scrape."""

    num_running: int
    """Live requests whose prefill has begun, or that are not in the queue yet."""
    num_waiting: int
    """Those in the queue."""
    waiting_tokens: int
    """Tokens of their prompts."""
    queue_limit_tokens: int
    """How many may wait."""
    is_directory_away: bool
    """Whether groups are those that were last heard of."""


@dataclass
class CallOutcome:
    """What a call that ends well says of its end."""

    finish_reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_UNSPECIFIED


class RouterMetrics:
    """Used on one event loop only; the registry is asked from other threads."""

    def __init__(self, registry: CollectorRegistry, read_state: Callable[[], RouterState]) -> None:
        self._read_state = read_state
        self._answers: set[Callable[[], int]] = set()
        """Each tells how many tokens a live answer has sent."""
        self._num_tokens_ended = 0
        """Of answers that are over."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def seconds(name: str, text: str, buckets: tuple[float, ...] = LONG_BUCKETS) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        self._requests = counter(
            "sps2_requests", "Generate calls that have ended.", "finish_reason", "status"
        )
        self._shed = counter("sps2_shed", "Generate calls that were refused for load.", "reason")
        self._failovers = counter("sps2_failovers", "Failed attempts that were followed by another.", "stage")
        self._prompt_tokens = counter("sps2_prompt_tokens", "Prompt tokens of requests that got a token.")
        self._queries = counter("sps2_prefix_cache_queries", "Prompt tokens that might have been cached.")
        self._hits = counter("sps2_prefix_cache_hits", "Of them, tokens that were.")
        self._ttft = seconds("sps2_time_to_first_token_seconds", "Arrival to the first token's write.")
        self.inter_token = seconds(
            "sps2_inter_token_latency_seconds", "Between writes of a choice's tokens.", SHORT_BUCKETS
        )
        """Observed for each message of tokens but a choice's first."""
        self._e2e = seconds("sps2_e2e_request_latency_seconds", "Arrival to the last token's write.")
        self._queue = seconds("sps2_request_queue_time_seconds", "Arrival to the start of the prefill.")
        self._prefill = seconds("sps2_request_prefill_time_seconds", "Start of the prefill to first token.")
        self._transfer = seconds("sps2_request_transfer_time_seconds", "First token to the commit point.")
        self._decode = seconds("sps2_request_decode_time_seconds", "First token's write to the last one's.")
        for stage in ("before_commit", "after_commit"):
            self._failovers.labels(stage)
        for reason in sorted(SHED_REASONS):
            self._shed.labels(reason)
        registry.register(LoopReader(self._read))

    @contextmanager
    def call(self) -> Iterator[CallOutcome]:
        """One generate call, from its arrival to its end, whatever that is."""
        outcome, status = CallOutcome(), "INTERNAL"
        try:
            yield outcome
            status = "OK"
        except ServiceError as error:
            status = error.code.name
            if error.reason in SHED_REASONS:
                self._shed.labels(error.reason).inc()
            raise
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        finally:
            reason = FINISH_REASONS.get(outcome.finish_reason, NO_REASON)
            self._requests.labels(reason, status).inc()

    @contextmanager
    def answering(self, count_tokens: Callable[[], int]) -> Iterator[None]:
        """An answer under way; `count_tokens` tells how many tokens it has sent so far."""
        self._answers.add(count_tokens)
        try:
            yield
        finally:
            self._answers.remove(count_tokens)
            self._num_tokens_ended += count_tokens()

    def failed_over(self, phase: Phase) -> None:
        """An attempt has failed in that phase, and another follows."""
        self._failovers.labels("after_commit" if phase in COMMITTED else "before_commit").inc()

    def first_token(self, request: Request, num_cached: int, ttft_s: float) -> None:
        """A request's first token was written; of its prompt so many tokens were cached."""
        self._ttft.observe(ttft_s)
        self._prompt_tokens.inc(request.num_prompt_tokens)
        if request.reuse is not Reuse.OFF:
            self._queries.inc(request.num_prompt_tokens)
            self._hits.inc(num_cached)

    def answered(self, timings: generation_pb2.Timings, decode_s: float) -> None:
        """A request's last event was written."""
        self._e2e.observe(timings.e2e)
        self._queue.observe(timings.queue)
        self._prefill.observe(timings.prefill)
        self._transfer.observe(timings.transfer)
        self._decode.observe(decode_s)

    async def _read(self) -> Iterable[Metric]:
        state, num_sent = self._read_state(), sum(count_tokens() for count_tokens in self._answers)

        def gauge(name: str, text: str, value: float) -> Metric:
            return GaugeMetricFamily(name, text, value=value)

        return (
            gauge("sps2_num_requests_running", "Live requests that do not wait.", state.num_running),
            gauge("sps2_num_requests_waiting", "Requests before their prefill.", state.num_waiting),
            gauge("sps2_waiting_tokens", "Tokens of prompts before their prefill.", state.waiting_tokens),
            gauge("sps2_queue_limit_tokens", "Prompt tokens that may wait.", state.queue_limit_tokens),
            gauge("sps2_directory_degraded", "1: the directory is not heard.", state.is_directory_away),
            CounterMetricFamily(
                "sps2_generation_tokens",
                "Tokens written to clients.",
                value=self._num_tokens_ended + num_sent,
            ),
        )
