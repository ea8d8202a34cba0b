"""What of a worker goes into Redis, in which pieces. Pure; knows nothing about Redis.

The scripts do not read protobuf: they compare and join bytes. A WorkerInfo is cut into three parts which are
compared separately (a change of load alone is published at leisure) and whose concatenation parses as the
whole, since no field stands in two of them.
"""

from dataclasses import dataclass

from sps2.internal.v1.kv_directory_service_pb2 import LeaseRenewal, RequestRecord
from sps2.internal.v1.placement_pb2 import AttentionLayout
from sps2.v1.cluster_pb2 import WorkerInfo


@dataclass(frozen=True)
class WorkerParts:
    """A serialized WorkerInfo in three parts."""

    static: bytes
    """What stays for the life of a registration."""
    vital: bytes
    """State, epoch and transfer address: a change is published at once."""
    load: bytes
    """Load: published at most once a second."""

    def joined(self) -> bytes:
        """The serialized whole."""
        return self.static + self.vital + self.load


def split_worker(worker: WorkerInfo) -> WorkerParts:
    """The parts of a registration."""
    static = WorkerInfo()
    static.CopyFrom(worker)
    for field in ("state", "epoch", "transfer_address", "load"):
        static.ClearField(field)
    vital = WorkerInfo(state=worker.state, epoch=worker.epoch, transfer_address=worker.transfer_address)
    load = WorkerInfo(load=worker.load) if worker.HasField("load") else WorkerInfo()
    return WorkerParts(_bytes(static), _bytes(vital), _bytes(load))


def split_renewal(renewal: LeaseRenewal) -> WorkerParts:
    """The parts that a renewal replaces; `static` is empty."""
    return split_worker(
        WorkerInfo(
            state=renewal.state,
            epoch=renewal.epoch,
            transfer_address=renewal.transfer_address,
            load=renewal.load if renewal.HasField("load") else None,
        )
    )


def newest_epoch(record: RequestRecord) -> int:
    """The largest epoch among the shards, 0 without shards: of two records of one attempt the newer wins."""
    return max((shard.epoch for shard in record.shards), default=0)


def layout_bytes(attention: AttentionLayout) -> bytes:
    """A layout as it is compared. Exact KV is the same whatever the length of the prompt that it was made for."""
    if attention.HasField("exact"):
        attention = AttentionLayout(exact=attention.exact)
    return _bytes(attention)


def _bytes(message: WorkerInfo | AttentionLayout) -> bytes:
    # Deterministic: maps would otherwise change their order, and the bytes would look like a change.
    return message.SerializeToString(deterministic=True)
