"""KV transfer between real processes, by NIXL and by gRPC: contents, bytes, faults, and late writers."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.kv_cluster import Cluster, Peer, Shape, cluster
from support.ports import free_port
from support.stopped_writer import stopped_writer
from support.waiting import wait_until

pytestmark = pytest.mark.multiprocess
TRANSPORTS = ["nixl", "grpc"]
WIDE = Shape(num_blocks=16)
LARGE = Shape(num_blocks=64, num_kv_heads=4, head_dim=64, dtype="bf16", slot_bytes=1 << 20)
WHOLE = (0, 500)
FOUR_HEADS = Shape(num_kv_heads=4)
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - looked at, not written


@pytest.fixture(scope="module", params=TRANSPORTS)
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Four sources and four targets that live as long as the tests of one transport."""
    with cluster(request.param, 4, 4, WIDE, ack_timeout_s=3.0) as peers:
        yield peers


@pytest.fixture(params=TRANSPORTS)
def pair(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two sources and one target that a test may break."""
    with cluster(request.param, 2, 1) as peers:
        yield peers


@pytest.mark.parametrize("num_targets", [1, 2, 3, 4])
@pytest.mark.parametrize("num_sources", [1, 2, 3, 4])
def test_any_number_of_sources_to_any_number_of_targets(
    mesh: Cluster, num_sources: int, num_targets: int
) -> None:
    posted = [source.ask("stats")["bytes_posted"] for source in mesh.sources]
    request = mesh.request(777, num_sources, num_targets).expect().begin()
    for layer in range(mesh.shape.num_layers):
        request.ready([layer])
    minimum = request.num_tokens * mesh.shape.num_layers * mesh.shape.token_bytes
    assert sum(result["bytes_sent"] for result in request.results()) == minimum
    assert request.complete() == [True] * num_targets
    assert request.wrong_elements() == 0
    newly = [source.ask("stats")["bytes_posted"] for source in mesh.sources]
    assert sum(newly) - sum(posted) == minimum
    request.forget()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_tensor_ranks_send_their_heads_of_two_spans_to_targets_of_all_or_some(transport: str) -> None:
    """Two sequence ranks of two blocks each, by two tensor ranks."""
    spans = [[(0, 70), (300, 500)], [(70, 150), (150, 300)]]
    source_heads = [(0, 2), (2, 4)] * 2
    target_heads = [(0, 4), (0, 3), (3, 4)]
    with cluster(transport, 4, 3, FOUR_HEADS, source_heads=source_heads, target_heads=target_heads) as peers:
        for targets in (peers.targets[:1], peers.targets[1:]):
            request = peers.request(500)
            request.sources = [(source, spans[i // 2]) for i, source in enumerate(peers.sources)]
            request.targets = [(target, WHOLE) for target in targets]
            results = request.expect().begin().ready().results()
            minimum = 500 * peers.shape.num_layers * peers.shape.token_bytes
            assert sum(result["bytes_sent"] for result in results) == minimum
            assert request.complete() == [True] * len(targets)
            assert request.wrong_elements() == 0
            request.forget()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_heads_that_the_target_does_not_hold_are_refused(transport: str) -> None:
    with cluster(transport, 2, 1, FOUR_HEADS, source_heads=[(0, 2), (2, 4)], target_heads=[(0, 2)]) as peers:
        target = peers.targets[0]
        target.heads = None  # the placement says that it holds all
        request = peers.request(130)
        request.sources = [(source, [(0, 130)]) for source in peers.sources]
        first, second = request.expect().begin().ready().results()
        assert first["bytes_sent"] == 130 * peers.shape.num_layers * peers.shape.token_bytes // 2
        assert second["reason"] == "REFUSED"
        assert "heads [2, 4) are not in [0, 2)" in second["message"]
        assert request.wrong_elements() == 0


def test_two_requests_at_once_do_not_disturb_each_other(mesh: Cluster) -> None:
    first, second = mesh.request(300, 2, 1), mesh.request(500, 3, 1)
    second.targets = [(mesh.targets[1], (0, 500))]
    for request in (first, second):
        request.expect()
    first.begin().ready([0])
    # The sources' blocks of the first are filled anew for the second only when they have left.
    first.ready([1, 2]).results()
    second.begin().ready()
    assert first.complete() == second.complete() == [True]
    assert "reason" not in second.results()[0]
    assert (first.wrong_elements(), second.wrong_elements()) == (0, 0)
    first.forget()
    second.forget()


def test_slabs_that_come_corrupt_are_sent_again(mesh: Cluster) -> None:
    source, target = mesh.sources[0], mesh.targets[0]
    posted, corrupt = source.ask("stats")["bytes_posted"], target.ask("stats")["corrupt"]
    target.ask("corrupt", count=3)
    request = mesh.request(200).expect().begin().ready()
    result = request.results()[0]
    assert result["resent"] == 3
    assert request.complete() == [True]
    assert request.wrong_elements() == 0
    assert result["bytes_sent"] == source.ask("stats")["bytes_posted"] - posted
    assert result["bytes_sent"] > 200 * mesh.shape.num_layers * mesh.shape.token_bytes
    assert target.ask("stats")["corrupt"] - corrupt == 3
    request.forget()


def test_a_slab_that_stays_corrupt_is_data_loss(mesh: Cluster) -> None:
    mesh.targets[0].ask("corrupt", count=10_000)
    request = mesh.request(64).expect().begin().ready([0])
    assert request.results()[0]["reason"] == "DATA_LOSS"
    mesh.targets[0].ask("corrupt", count=0)
    request.forget()
    assert mesh.request(64).expect().begin().ready().results()[0]["resent"] == 0


@pytest.mark.parametrize(
    "changed", [{"epoch": 2}, {"number": 2}, {"request_id": "other"}, {"process_incarnation": "before"}]
)
def test_a_stale_fence_is_refused(mesh: Cluster, changed: dict[str, object]) -> None:
    target = mesh.targets[0]
    before = target.ask("digest")
    request = mesh.request(130).expect().begin(**changed).ready()
    result = request.results()[0]
    assert result["reason"] == "REFUSED"
    assert target.address in result["message"]
    assert target.ask("digest") == before
    request.forget()


def test_another_model_is_turned_away_at_the_handshake(mesh: Cluster) -> None:
    with cluster("grpc", 1, 0, model_hash="other") as stranger:
        request = mesh.request(64)
        request.sources = [(stranger.sources[0], [(0, 64)])]
        result = request.expect().begin().results()[0]
    assert result["reason"] == "FORMAT_MISMATCH"
    assert "model_hash" in result["message"]
    request.forget()


def test_an_aborted_transfer_is_quiet_and_the_source_goes_on(mesh: Cluster) -> None:
    request = mesh.request(512).expect().begin().ready([0])
    mesh.sources[0].ask("abort", key=request.id)
    assert request.results()[0].get("reason") == "ABORTED"
    request.ready([1, 2]).forget()
    second = mesh.request(512).expect().begin().ready()
    assert "reason" not in second.results()[0]
    assert second.wrong_elements() == 0
    second.forget()


def test_a_target_that_was_never_there_is_named(mesh: Cluster) -> None:
    target = Peer("target", "grpc", mesh.shape, "nobody")
    target.address = f"127.0.0.1:{free_port()}"
    request = mesh.request(64)
    request.targets = [(target, (0, 64))]
    result = request.begin().results()[0]
    assert result["reason"] == "PEER_UNREACHABLE"
    assert target.address in result["message"]
    mesh.sources[0].ask("abort", key=request.id)


def test_a_stopped_target_is_given_up_and_its_blocks_stay_until_it_goes_on(mesh: Cluster) -> None:
    source, target = mesh.sources[0], mesh.targets[0]
    connected = mesh.request(64).expect().begin().ready()
    assert "reason" not in connected.results()[0]
    connected.forget()
    request = mesh.request(1024).expect().begin()
    target.process.send(signal.SIGSTOP)
    result = request.ready().results()[0]
    assert result["reason"] == "PEER_TIMEOUT"
    assert target.address in result["message"]
    # With NIXL a write is under way as long as the target stands still, so the blocks are not free.
    source.tell("abort", key=request.id)
    target.process.send(signal.SIGCONT)
    source.answer()
    request.forget()
    second = mesh.request(64).expect().begin().ready()
    assert "reason" not in second.results()[0]
    second.forget()


def test_a_killed_target_is_named_at_once(pair: Cluster) -> None:
    request = pair.request(600).expect().begin().ready([0])
    pair.targets[0].process.kill()
    start = time.monotonic()
    result = request.ready([1, 2]).results()[0]
    assert result["reason"] == "PEER_UNREACHABLE"
    assert pair.targets[0].address in result["message"]
    assert time.monotonic() - start < 1.0
    pair.sources[0].ask("abort", key=request.id)


def test_a_killed_source_leaves_the_target_whole(pair: Cluster) -> None:
    source, target = pair.sources.pop(0), pair.targets[0]
    request = pair.request(300)
    request.sources = [(source, [(0, 300)])]
    request.expect().begin().ready([0])
    target.until("stats", "bytes_accepted", 300 * pair.shape.token_bytes)
    source.process.kill()
    # Its ring goes when its connection is known to be gone, and not before.
    wait_until(lambda: not target.ask("rings")["rings"], timeout=10)
    request.forget()
    second = pair.request(300).expect().begin().ready()
    assert "reason" not in second.results()[0]
    assert second.complete() == [True]
    assert second.wrong_elements() == 0


def test_a_stopped_source_that_is_replaced_keeps_its_ring_to_itself() -> None:
    with cluster("nixl", 2) as both:
        old, target = both.sources[0], both.targets[0]
        first = both.request(100).expect().begin().ready()
        assert "reason" not in first.results()[0]
        old.process.send(signal.SIGSTOP)
        with cluster("nixl", 1, 0) as fresh:  # the same name, another process
            both.sources[:] = fresh.sources
            second = both.request(100)
            second.targets = [(target, (0, 100))]
            first.forget()
            second.expect().begin().ready()
            assert "reason" not in second.results()[0]
            rings = target.ask("rings")["rings"]
            assert not rings[old.incarnation]["trusted"]
            assert rings[fresh.sources[0].incarnation]["trusted"]
            assert rings[old.incarnation]["address"] != rings[fresh.sources[0].incarnation]["address"]
            old.process.kill()
            wait_until(lambda: old.incarnation not in target.ask("rings")["rings"], timeout=10)


@pytest.mark.parametrize(
    ("transport", "env"),
    [("nixl", {}), ("nixl", {"UCX_TLS": "tcp,self"}), ("grpc", {})],
    ids=["nixl", "nixl-tcp", "grpc"],
)
def test_a_stopped_writer_changes_no_byte_of_reused_blocks(transport: str, env: dict[str, str]) -> None:
    figures = stopped_writer(transport, env=env)
    assert figures.changed_elements == 0
    assert figures.arena_unchanged
    assert figures.late_slabs_refused > 0
    assert figures.writer_result == "REFUSED"
    if transport == "nixl":
        assert figures.late_bytes_in_ring > 0


def test_auto_falls_back_to_grpc_where_the_target_lacks_nixl() -> None:
    with cluster("auto", 1, 1, LARGE, target_transport="grpc") as peers:
        request = peers.request(4000).expect().begin().ready()
        assert "reason" not in request.results()[0]
        assert request.wrong_elements() == 0
        assert "by gRPC" in peers.sources[0].process.output
        with cluster("nixl", 1, 0, LARGE) as strict:
            peers.sources[:] = strict.sources
            assert peers.request(64).expect().begin().results()[0]["reason"] == "TRANSPORT_UNAVAILABLE"


def test_large_slabs_and_killed_processes_that_leave_nothing_behind() -> None:
    before = set(Path(SHARED_MEMORY).iterdir())
    with cluster("auto", 1, 1, LARGE) as peers:
        request = peers.request(4000).expect().begin().ready()
        assert request.complete() == [True]
        assert request.wrong_elements() == 0
        assert "by NIXL" in peers.sources[0].process.output
        both = (*peers.sources, *peers.targets)
        pair_of_pids = {peer.process.pid for peer in both}
        for peer in both:
            peer.process.kill()
    assert not pair_of_pids & _segment_owners()
    # Files of other processes on the machine come and go; those of a killed one would stay.
    wait_until(lambda: set(Path(SHARED_MEMORY).iterdir()) <= before, timeout=10)


def test_idle_peers_use_next_to_no_processor() -> None:
    with cluster("nixl") as peers:
        assert "reason" not in peers.request(64).expect().begin().ready().results()[0]
        waiting = peers.request(64).expect()  # a target that expects something polls more often
        both: list[Peer] = [*peers.sources, *peers.targets]
        start, before = time.monotonic(), [peer.ask("process")["cpu_s"] for peer in both]
        wait_until(lambda: time.monotonic() - start > 2, timeout=5, interval=0.2)
        used = [peer.ask("process")["cpu_s"] - cpu for peer, cpu in zip(both, before, strict=True)]
        waiting.forget()
    assert used[0] < 0.1
    assert used[1] < 0.4


def _segment_owners() -> set[int]:
    segments = Path("/proc/sysvipc/shm").read_text(encoding="ascii").splitlines()[1:]
    return {int(line.split()[4]) for line in segments}
