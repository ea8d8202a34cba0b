"""Groups of workers as the router's view has them, for tests of its pure parts."""

from typing import Any

from sps2.v1 import cluster_pb2
from sps2_router.types import Group, GroupPair, group_workers

READY = cluster_pb2.WORKER_STATE_READY


def worker(worker_id: str, size: int = 1, **changes: Any) -> cluster_pb2.WorkerInfo:
    """A READY rank; its role is the first word of its id."""
    name, _, rank = worker_id.partition("/")
    role = cluster_pb2.WorkerRole.Value(f"WORKER_ROLE_{name.partition('-')[0].upper()}")
    capabilities = cluster_pb2.WorkerCapabilities(model_hash=changes.pop("model_hash", "hash"))
    capabilities.dtype = changes.pop("dtype", "fp32")
    values: dict[str, Any] = {"state": READY, "capabilities": capabilities} | changes
    return cluster_pb2.WorkerInfo(
        worker_id=worker_id, role=role, group=name, rank=int(rank), group_size=size, **values
    )


def group(name: str, **changes: Any) -> Group:
    """A READY group of one rank."""
    return group_workers([worker(f"{name}/0", **changes)])[name]


def pair(prefill: str, decode: str) -> GroupPair:
    """Two groups that work together."""
    return GroupPair(group(prefill), group(decode))
