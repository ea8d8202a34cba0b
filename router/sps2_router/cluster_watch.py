"""What changes of the router's view of the cluster, for whoever watches it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping

from sps2.v1 import cluster_pb2
from sps2.v1 import cluster_service_pb2 as pb
from sps2_router.scheduler import WorkersView

INTERVAL_S = 0.1


async def watch_cluster(
    view: WorkersView, count_live: Callable[[], int]
) -> AsyncGenerator[pb.WatchClusterStateResponse]:
    """The whole state, then each change of it; never ends."""
    said = difference({}, view, count_live())
    said.snapshot = True
    known = dict(view.workers)
    yield said
    while True:
        await asyncio.sleep(INTERVAL_S)
        change = difference(known, view, count_live())
        if is_news(change, said):
            known, said = dict(view.workers), change
            yield change


def difference(
    known: Mapping[str, cluster_pb2.WorkerInfo], view: WorkersView, num_live: int
) -> pb.WatchClusterStateResponse:
    """The view as a change of what is known."""
    return pb.WatchClusterStateResponse(
        revision=view.revision,
        updated=[worker for name, worker in sorted(view.workers.items()) if known.get(name) is not worker],
        removed_worker_ids=sorted(known.keys() - view.workers.keys()),
        directory_connected=view.connected,
        num_requests_live=num_live,
    )


def is_news(change: pb.WatchClusterStateResponse, said: pb.WatchClusterStateResponse) -> bool:
    """Whether a change tells anything that was not said last."""
    return (
        bool(change.updated or change.removed_worker_ids)
        or change.directory_connected != said.directory_connected
        or change.num_requests_live != said.num_requests_live
    )
