"""What a replica of the directory exports to Prometheus (docs/metrics.md), and how its calls are timed."""

import asyncio
import time
from collections import Counter as Tally
from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily

from sps2.v1 import cluster_pb2
from sps2_kv_directory.membership import Membership
from sps2_kv_directory.store import Expired, Store
from sps2_kv_directory.watch import WatchHub
from sps2_service.errors import ServiceError, Unavailable
from sps2_service.interceptors import Continuation, Handler
from sps2_service.metrics import LoopReader

RPC_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
"""Seconds: from a script of Redis to twice the time that it gets."""
ROLES = {cluster_pb2.WORKER_ROLE_PREFILL: "prefill", cluster_pb2.WORKER_ROLE_DECODE: "decode"}
STATES = {
    cluster_pb2.WORKER_STATE_STARTING: "starting",
    cluster_pb2.WORKER_STATE_READY: "ready",
    cluster_pb2.WORKER_STATE_DRAINING: "draining",
}


class DirectoryMetrics:
    """One replica's."""

    def __init__(self, registry: CollectorRegistry, service: ServiceDescriptor) -> None:
        """`service` is the one whose calls are timed; its streams, which last as long as both ends do, are not."""
        self._registry = registry
        names = {
            f"/{service.full_name}/{method.name}": method.name
            for method in service.methods
            if not method.server_streaming
        }
        seconds = Histogram(
            "sps2_directory_rpc_seconds",
            "What calls take here, Redis included.",
            ["method"],
            buckets=RPC_BUCKETS,
            registry=registry,
        )
        self._seconds = {path: seconds.labels(name) for path, name in names.items()}
        self._names = names
        self._errors = Counter(
            "sps2_directory_rpc_errors", "Calls that failed.", ["method", "status"], registry=registry
        )
        expired = Counter(
            "sps2_directory_leases_expired", "Leases ended by this replica.", ["kind"], registry=registry
        )
        self._workers, self._requests, self._admissions = (
            expired.labels(kind) for kind in ("worker", "request", "admission")
        )

    def read(self, membership: Membership, hub: WatchHub, store: Store) -> None:
        """From now on tells what these hold; on the event loop."""

        async def families() -> Iterable[Metric]:
            return [*view_families(membership, hub, is_away=store.is_away), *await stored_families(store)]

        self._registry.register(LoopReader(families))

    def expired(self, expired: Expired) -> None:
        """Leases have ended."""
        self._workers.inc(expired.num_workers)
        self._requests.inc(expired.num_requests)
        self._admissions.inc(expired.num_admissions)

    def failed(self, method: str, status: str) -> None:
        """A call has ended with an error."""
        self._errors.labels(method, status).inc()

    def metered(self, path: str, handler: Handler) -> Handler:
        """The same handler, timed, if its calls are to be."""
        seconds, name = self._seconds.get(path), self._names.get(path)
        if seconds is None or name is None:
            return handler
        behavior: Any = handler.unary_unary

        async def call(request: Any, context: Any) -> Any:
            began, status = time.perf_counter(), "INTERNAL"
            try:
                response = await behavior(request, context)
                status = ""
            except ServiceError as error:
                status = error.code.name
                raise
            except asyncio.CancelledError:
                status = "CANCELLED"
                raise
            else:
                return response
            finally:
                seconds.observe(time.perf_counter() - began)
                if status:
                    self.failed(name, status)

        return grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


class MeteredCalls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs only
    """Times calls, inside of the interceptor that makes statuses of errors."""

    def __init__(self, metrics: DirectoryMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(  # type: ignore[override] # the stubs do not know that there may be no handler
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """Called by gRPC once for each call."""
        handler = await continuation(handler_call_details)
        return handler and self._metrics.metered(handler_call_details.method, handler)


def view_families(membership: Membership, hub: WatchHub, *, is_away: bool) -> Iterable[Metric]:
    """What this replica knows by itself; `is_away` says that it cannot reach its store."""
    workers = GaugeMetricFamily("sps2_directory_workers", "Ranks with a lease.", labels=["role", "state"])
    tally = Tally((worker.role, worker.state) for worker in membership.workers)
    for role, role_name in ROLES.items():
        for state, state_name in STATES.items():
            workers.add_metric([role_name, state_name], tally[role, state])
    yield workers
    now = "degraded" if is_away else "recovering" if membership.recovering else "ok"
    states = GaugeMetricFamily("sps2_directory_state", "1 for the state it is in.", labels=["state"])
    for name in ("ok", "degraded", "recovering"):
        states.add_metric([name], name == now)
    yield states
    yield GaugeMetricFamily(
        "sps2_directory_revision", "Changes of workers that were followed.", value=membership.revision
    )
    yield GaugeMetricFamily("sps2_directory_watchers", "Watches of workers now.", value=hub.num_watchers)


async def stored_families(store: Store) -> Iterable[Metric]:
    """What only the store knows; nothing while it is away."""
    try:
        state = await store.state()
    except Unavailable:
        return ()
    return (
        GaugeMetricFamily("sps2_directory_requests", "Requests recorded.", value=state.num_requests),
        GaugeMetricFamily("sps2_directory_prefixes", "Blocks that groups hold.", value=state.num_prefix_keys),
    )
