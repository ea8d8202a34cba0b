"""Must show 2: Redis loses everything, dies and hangs under load; streams do not notice, and no token comes again."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from redis import Redis

from sps2.internal.v1.decode_service_pb2 import DecodeRequest, ReserveKv
from sps2.internal.v1.decode_service_pb2_grpc import DecodeServiceStub
from sps2.internal.v1.kv_directory_service_pb2 import GetClusterStateResponse
from sps2.internal.v1.placement_pb2 import Attempt
from sps2.internal.v1.prefill_service_pb2 import TokenChoice
from sps2.v1.generation_pb2 import SamplingSpec
from sps2_client import SPS2Error, Stream
from sps2_service.directory_client import DirectoryClient
from sps2_service.errors import ServiceError
from support.faults import PROMPT, SEEN_BEFORE, SHORT, Target, Victim, make_model, read_tokens, target
from support.must_show import MustShow
from support.redis_server import RedisServer
from support.waiting import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]

TTL_S = 5.0
NUM_STREAMS = 3
NUM_TOKENS = 600
AWAY_S = 1.0
LONG_TOKENS = 3000
"""For longer than it takes workers to be fenced."""
FENCED_S = 3.0 + 1.0


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def one(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    model = make_model(tmp_path_factory.mktemp("redis") / "tiny")
    with target(model, arguments=["--redis", redis.url]) as deployed:
        yield deployed


def flush_all(redis: RedisServer) -> None:
    with Redis.from_url(redis.url) as client:
        client.flushall()


def kill_and_restart(redis: RedisServer) -> None:
    redis.kill()
    time.sleep(AWAY_S)  # how long it is away is the fault
    redis.start()


FAULTS: dict[str, Callable[[RedisServer], None]] = {
    "FLUSHALL": flush_all,
    "SIGKILL and restart": kill_and_restart,
}


class Load:
    """Short requests, one after another, until the block ends; each must be right."""

    def __init__(self, one: Target) -> None:
        self._one = one
        self._expected = one.expected(SHORT)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.num_done = 0
        self.failures: list[str] = []

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)

    def _run(self) -> None:
        with self._one.client() as client:
            while not self._over.is_set():
                try:
                    done = client.generate(token_ids=PROMPT, max_tokens=SHORT, ignore_eos=True, timeout=30)
                except SPS2Error as error:
                    self.failures.append(repr(error))
                    continue
                self.num_done += 1
                if done.token_ids != self._expected:
                    self.failures.append("wrong tokens")


def state_of(one: Target) -> GetClusterStateResponse | None:
    """As the directory has it; None while it cannot tell."""

    async def ask() -> GetClusterStateResponse | None:
        async with DirectoryClient(one.directory) as client:
            try:
                return await client.get_cluster_state()
            except ServiceError:
                return None

    return asyncio.run(ask())


def draw_epoch(one: Target) -> int:
    async def draw() -> int:
        async with DirectoryClient(one.directory) as client:
            return await client.draw_epoch("a-group-of-the-test")

    return asyncio.run(draw())


def whole_again(one: Target, lost: str, since: float, num_requests: int) -> float:
    """Seconds from `since` until the directory knows every rank and every stream again, under another incarnation."""
    state = None
    while time.monotonic() < since + 4 * TTL_S:
        state = state_of(one)
        if (
            state is not None
            and state.directory_incarnation != lost
            and not state.recovering
            and {worker.worker_id for worker in state.workers} == set(one.ranks)
            and state.num_requests >= num_requests
        ):
            return time.monotonic() - since
        time.sleep(0.05)
    raise AssertionError(f"the directory is not whole: {state}\n{one.log}")


def epoch_of(one: Target, group: str) -> int:
    return max(worker.epoch for worker in one.state().workers if worker.group == group)


def epoch_after(one: Target, group: str, last: int) -> int:
    """That of the life that follows; what is told of a group may be older than Redis' return."""
    wait_until(lambda: epoch_of(one, group) != last, timeout=60.0)
    return epoch_of(one, group)


@pytest.mark.parametrize("fault", list(FAULTS))
def test_redis_loses_everything_under_load(
    one: Target, redis: RedisServer, fault: str, must_show: MustShow
) -> None:
    with must_show(f"2 {fault} of Redis under load") as figures:
        expected = one.expected(NUM_TOKENS)
        state = state_of(one)
        assert state is not None
        with Load(one) as load:
            threads, results = start_streams(one)
            FAULTS[fault](redis)
            since = time.monotonic()
            whole_s = whole_again(one, state.directory_incarnation, since, 0)
            for thread in threads:
                thread.join(90)
        assert results == [expected] * NUM_STREAMS, f"{results}\n{one.log}"
        assert not load.failures, load.failures
        figures.append(
            f"{NUM_STREAMS} streams of {NUM_TOKENS} tokens right, {load.num_done} requests beside them"
        )
        figures.append(f"whole again after {whole_s:.1f} s (two TTLs are {2 * TTL_S:g})")
        assert whole_s <= 2 * TTL_S


def start_streams(one: Target) -> tuple[list[threading.Thread], list[tuple[int, ...] | str]]:
    """Streams of which each has given its first tokens; what they end with."""
    begun = threading.Barrier(NUM_STREAMS + 1)
    results: list[tuple[int, ...] | str] = []

    def read(stream: Stream) -> None:
        read_tokens(stream, SEEN_BEFORE)
        begun.wait(60)
        results.append(stream.final().token_ids)

    def serve() -> None:
        try:
            with one.streaming(num_tokens=NUM_TOKENS) as stream:
                read(stream)
        except SPS2Error as error:
            results.append(repr(error))

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    return threads, results


def refusal_of_leader(one: Target, group: str) -> str:
    """With what a decode leader refuses an attempt that it would refuse in any case, for its model."""
    (leader,) = (worker for worker in one.state().workers if worker.worker_id == f"{group}/0")
    choice = TokenChoice(sampling=SamplingSpec(top_p=1), max_tokens=1, num_choices=1)
    attempt = Attempt(request_id="probe", number=1)
    reserve = ReserveKv(attempt=attempt, num_prompt_tokens=1, model_hash="none", choice=choice)
    with grpc.insecure_channel(leader.grpc_address) as channel:
        call = DecodeServiceStub(channel).Decode(iter([DecodeRequest(reserve=reserve)]), timeout=5)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)  # it says nothing before it ends
    return str(caught.value.code().name)


def test_without_any_directory(one: Target, must_show: MustShow) -> None:
    with must_show("2 SIGSTOP of the only directory in mid-stream") as figures:
        expected = one.expected(LONG_TOKENS)
        assert refusal_of_leader(one, "decode-0") == "FAILED_PRECONDITION"
        with one.streaming(num_tokens=LONG_TOKENS) as stream:
            read_tokens(stream, SEEN_BEFORE)
            since = one.send(Victim("directory"), signal.SIGSTOP)
            try:
                wait_until(lambda: refusal_of_leader(one, "decode-0") == "UNAVAILABLE", timeout=10.0)
                fenced_s = time.monotonic() - since
                figures.append(f"workers fenced after {fenced_s:.1f} s")
                one.check_live()
                with one.client() as client, pytest.raises(SPS2Error) as refused:
                    client.generate(token_ids=PROMPT, max_tokens=SHORT, ignore_eos=True, timeout=60)
                assert stream.final().token_ids == expected
                figures.append(f"the stream's {LONG_TOKENS} tokens right, a new request UNAVAILABLE")
                assert refused.value.code is grpc.StatusCode.UNAVAILABLE
                assert refused.value.retry_after
            finally:
                back = one.send(Victim("directory"), signal.SIGCONT)
        figures.append(f"serving again {one.serves_again(back, 30.0):.1f} s after it is back")
        one.settled(60.0)
        assert 1.0 <= fenced_s <= FENCED_S


def test_no_fencing_token_comes_again(one: Target, redis: RedisServer, must_show: MustShow) -> None:
    """Groups form anew, and epochs are drawn, around each loss and while Redis is away."""
    with must_show("2 no fencing token repeats") as figures:
        drawn, formed = [draw_epoch(one)], [epoch_of(one, "decode-0")]
        for fault in (flush_all, kill_and_restart, flush_all):
            fault(redis)
            drawn.append(draw_epoch(one))
            one.serves_again(one.send(Victim("decode-0/1", "engine")), 60.0)
            one.settled(60.0)
            formed.append(epoch_after(one, "decode-0", formed[-1]))
            drawn.append(draw_epoch(one))
        redis.kill()
        drawn.append(draw_epoch(one))
        one.serves_again(one.send(Victim("decode-0/1", "engine")), 60.0)
        redis.start()
        one.settled(60.0)
        formed.append(epoch_after(one, "decode-0", formed[-1]))
        drawn.append(draw_epoch(one))
        figures.append(
            f"{len(drawn)} drawn, {len(formed)} lives of decode-0, each larger than the one before"
        )
        for epochs in (drawn, formed):
            assert epochs == sorted(set(epochs)), epochs
