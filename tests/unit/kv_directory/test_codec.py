"""Workers in parts: whatever is cut can be joined, and equal messages have equal bytes."""

from hypothesis import given
from hypothesis import strategies as st

from sps2.internal.v1.kv_directory_service_pb2 import LeaseRenewal, RequestRecord, RequestShard
from sps2.v1.cluster_pb2 import WorkerCapabilities, WorkerInfo, WorkerLoad
from sps2_kv_directory.codec import newest_epoch, split_renewal, split_worker

NAMES = st.text("abc/é", max_size=6)
LOADS = st.builds(
    WorkerLoad,
    num_requests_running=st.integers(-1, 3),
    load_fraction=st.sampled_from([0.0, 0.5]),
    bytes_posted=st.dictionaries(NAMES, st.integers(0, 2**64 - 1), max_size=4),
)
WORKERS = st.builds(
    WorkerInfo,
    worker_id=NAMES,
    epoch=st.integers(0, 2**64 - 1),
    state=st.integers(0, 3),
    transfer_address=NAMES,
    rank=st.integers(-(2**31), 2**31 - 1),
    capabilities=st.none() | st.builds(WorkerCapabilities, model_name=NAMES),
    load=st.none() | LOADS,
)


@given(WORKERS)
def test_the_parts_make_the_whole(worker: WorkerInfo) -> None:
    assert WorkerInfo.FromString(split_worker(worker).joined()) == worker


@given(WORKERS, WORKERS)
def test_a_renewal_replaces_what_it_carries_and_nothing_else(worker: WorkerInfo, later: WorkerInfo) -> None:
    renewal = LeaseRenewal(
        state=later.state,
        epoch=later.epoch,
        transfer_address=later.transfer_address,
        load=later.load if later.HasField("load") else None,
    )
    parts = split_renewal(renewal)
    assert parts.static == b""
    merged = WorkerInfo.FromString(split_worker(worker).static + parts.vital + parts.load)
    for field in ("state", "epoch", "transfer_address", "load"):
        assert getattr(merged, field) == getattr(later, field)
        worker.ClearField(field)
        merged.ClearField(field)
    assert merged == worker


def test_the_order_of_a_map_is_no_change() -> None:
    one = WorkerInfo(load=WorkerLoad(bytes_posted={"a": 1, "b": 2, "c": 3}))
    other = WorkerInfo(load=WorkerLoad(bytes_posted={"c": 3, "b": 2, "a": 1}))
    assert split_worker(one).load == split_worker(other).load


def test_the_newest_epoch_of_a_record() -> None:
    assert newest_epoch(RequestRecord()) == 0
    assert newest_epoch(RequestRecord(shards=[RequestShard(epoch=3), RequestShard(epoch=2)])) == 3
