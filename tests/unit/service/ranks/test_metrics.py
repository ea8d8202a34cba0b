"""What a rank exports, from what its supervisor knows."""

from prometheus_client import CollectorRegistry, Metric

from sps2.internal.v1 import engine_pb2
from sps2.v1 import cluster_pb2
from sps2_service.ranks.metrics import RankState, rank_families

PREFILL, DECODE = cluster_pb2.WORKER_ROLE_PREFILL, cluster_pb2.WORKER_ROLE_DECODE


def exported(role: cluster_pb2.WorkerRole.ValueType, rank: int = 0) -> CollectorRegistry:
    info = cluster_pb2.WorkerInfo(role=role, rank=rank, epoch=1_700_000_000_000_001)
    info.capabilities.kv_blocks_total = 100
    info.load.kv_blocks_used, info.load.kv_blocks_cached = 25, 5
    info.load.num_requests_running, info.load.num_requests_waiting = 3, 2
    heartbeat = engine_pb2.Heartbeat(
        steps_done=7, exposed_s=1.5, bytes_posted={"all_to_all": 10, "control": 8, "kv_transfer": 30}
    )
    made = RankState(info, heartbeat, num_restarts=2, lease_age_s=0.5)
    registry = CollectorRegistry()
    registry.register(Fixed([*rank_families(made)]))
    return registry


class Fixed:
    """A collector of what is there already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def test_a_prefill_leader() -> None:
    value = exported(PREFILL).get_sample_value
    assert value("sps2_kv_cache_usage_ratio") == 0.25
    blocks = [value("sps2_kv_blocks", {"state": state}) for state in ("used", "cached", "free")]
    assert blocks == [25, 5, 70]
    assert value("sps2_kv_transfer_bytes_total") == 30
    assert value("sps2_collective_bytes_total", {"kind": "all_to_all"}) == 10
    assert value("sps2_collective_bytes_total", {"kind": "kv_transfer"}) is None
    assert value("sps2_exposed_communication_seconds_total") == 1.5
    assert (value("sps2_engine_steps_total"), value("sps2_engine_restarts_total")) == (7, 2)
    assert value("sps2_group_epoch") == 1_700_000_000_000_001
    assert value("sps2_lease_age_seconds") == 0.5
    assert (value("sps2_num_requests_running"), value("sps2_num_requests_waiting")) == (3, 2)


def test_a_follower_knows_no_requests() -> None:
    value = exported(DECODE, rank=1).get_sample_value
    assert value("sps2_num_requests_running") is None
    assert value("sps2_kv_transfer_bytes_total") is None
    assert value("sps2_kv_blocks", {"state": "cached"}) is None


def test_before_anything_is_known() -> None:
    families = rank_families(RankState(cluster_pb2.WorkerInfo(role=DECODE), engine_pb2.Heartbeat(), 0, None))
    values = {sample.name: sample.value for family in families for sample in family.samples}
    assert values["sps2_kv_cache_usage_ratio"] == 0
    assert "sps2_lease_age_seconds" not in values
