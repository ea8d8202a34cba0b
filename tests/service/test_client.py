"""The SDK against a scripted real gRPC server: both clients, each promise and each fault."""

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from sps2_client import (
    AsyncClient,
    BetweenTokensTimeout,
    Cancelled,
    Client,
    ConnectionFailed,
    ConnectionLost,
    DataLoss,
    DeadlineExceeded,
    FieldViolation,
    Finished,
    FirstTokenTimeout,
    Generation,
    InvalidArgument,
    NotFound,
    ProtocolError,
    Received,
    ServerBug,
    SPS2Error,
    TextDelta,
    Timeouts,
    TotalTimeout,
    Unavailable,
    UsageReport,
)
from support.fake_router import (
    TOKENS,
    FakeRouter,
    Script,
    delta,
    error_info,
    fail,
    finish,
    good_events,
    hang,
    play,
    usage,
)
from support.fixtures import REPO_ROOT
from support.ports import free_port
from support.process import ManagedProcess
from support.waiting import wait_until

pytestmark = pytest.mark.service

Generate: TypeAlias = Callable[..., Awaitable[Generation]]
IDS = tuple(one for one, _ in TOKENS)
TEXT = "".join(text for _, text in TOKENS)


async def generate_blocking(address: str, max_retries: int = 2, **options: Any) -> Generation:
    with Client(address, max_retries=max_retries) as client:
        return await asyncio.to_thread(client.generate, "hi", **options)


async def generate_async(address: str, max_retries: int = 2, **options: Any) -> Generation:
    async with AsyncClient(address, max_retries=max_retries) as client:
        return await client.generate("hi", **options)


@pytest.fixture(params=[generate_blocking, generate_async], ids=["blocking", "async"])
def generate(request: pytest.FixtureRequest) -> Generate:
    """Every fault is the same through both clients."""
    method: Generate = request.param
    return method


async def failing(generate: Generate, script: Script, **options: Any) -> SPS2Error:
    with FakeRouter(script) as router, pytest.raises(SPS2Error) as caught:
        await generate(router.address, **options)
    return caught.value


async def test_whole_answer(generate: Generate) -> None:
    with FakeRouter() as router:
        answer = await generate(router.address, request_id="mine", max_tokens=3, temperature=0.5, seed=9)
    assert (answer.text, answer.token_ids, answer.finish_reason) == (TEXT, IDS, "length")
    assert answer.request_id == "mine"
    assert answer.usage.timings.ttft == 0.4
    assert answer.usage.bytes_moved.kv_transfer == 300
    spec = router.requests[0].spec
    assert (spec.text, spec.stop.max_tokens, spec.sampling.temperature) == ("hi", 3, 0.5)
    assert (spec.sampling.seed, spec.sampling.HasField("top_p"), len(spec.nonce)) == (9, False, 16)


def test_events_of_a_blocking_stream() -> None:
    with FakeRouter() as router, Client(router.address) as client:
        with client.stream(token_ids=[1, 2]) as stream:
            events = list(stream)
        assert [type(event) for event in events] == [TextDelta] * 3 + [Finished, UsageReport]
        assert events[1] == TextDelta("lo ", (6,), 1)
        assert (stream.text, stream.token_ids, stream.finish_reason) == (TEXT, IDS, "length")
        assert stream.usage == stream.final().usage
        assert list(stream) == []
        assert list(router.requests[0].spec.token_ids.ids) == [1, 2]
        assert router.requests[0].spec.request_id == stream.request_id != ""


async def test_events_of_an_async_stream() -> None:
    with FakeRouter() as router:
        async with AsyncClient(router.address) as client, client.stream("hi") as stream:
            events = [event async for event in stream]
            assert [type(event) for event in events] == [TextDelta] * 3 + [Finished, UsageReport]
            assert (await stream.final()).text == stream.text == TEXT


def test_leaving_a_blocking_stream_early_cancels_on_the_server() -> None:
    with FakeRouter(hang([delta("a", [1], 0)])) as router, Client(router.address) as client:
        with client.stream("hi") as stream:
            next(stream)
        assert router.stream_ended_early.wait(5)
        with pytest.raises(Cancelled, match="closed before its end") as caught:
            stream.final()
        assert caught.value.received == Received("a", (1,))


async def test_leaving_an_async_stream_early_cancels_on_the_server() -> None:
    with FakeRouter(hang([delta("a", [1], 0)])) as router:
        async with AsyncClient(router.address) as client:
            async with client.stream("hi") as stream:
                await anext(stream)
            assert await asyncio.to_thread(router.stream_ended_early.wait, 5)
            with pytest.raises(Cancelled, match="closed before its end"):
                await stream.final()


async def test_lookups_blocking() -> None:
    with FakeRouter() as router, Client(router.address) as client:
        assert client.list_models()[0].context_length == 4096
        assert client.detokenize(client.tokenize("abc")) == "abc"
        state = client.cluster_state()
        assert [one.worker_id for one in state.workers] == [
            "decode-0/0",
            "decode-0/1",
            "prefill-0/0",
            "prefill-0/1",
        ]
        assert (state.workers[0].role, state.workers[0].state) == ("decode", "ready")
        assert client.drain_group("decode-0") == 7
        with pytest.raises(NotFound, match="decode-9"):
            client.drain_group("decode-9")
        client.cancel("live")
        with pytest.raises(NotFound, match="no such request"):
            client.cancel("unknown")
        assert router.cancelled_ids == ["live", "unknown"]


async def test_lookups_async() -> None:
    with FakeRouter() as router:
        async with AsyncClient(router.address) as client:
            assert (await client.list_models())[0].name == "demo"
            assert await client.detokenize(await client.tokenize("abc")) == "abc"
            assert (await client.cluster_state()).num_requests_by_group == {"decode-0": 1}
            assert await client.drain_group("decode-0") == 7
            with pytest.raises(NotFound):
                await client.cancel("unknown")


BROKEN = {
    "MISSING_FINISH": [delta("a", [1], 0)],
    "MISSING_USAGE": [delta("a", [1], 0), finish([1])],
    "TOKEN_INDEX": [delta("a", [1], 0), delta("b", [2], 0)],
    "TOKEN_COUNT": [delta("a", [1], 0), finish([1], token_count=2)],
    "DIGEST": [delta("a", [1], 0), finish([1], digest=b"x" * 32)],
    "EVENT_AFTER_FINISH": [delta("a", [1], 0), finish([1]), finish([1])],
}


@pytest.mark.parametrize("reason", BROKEN)
async def test_a_stream_that_breaks_its_contract_raises(generate: Generate, reason: str) -> None:
    error = await failing(generate, play(BROKEN[reason]))
    assert isinstance(error, ProtocolError)
    assert error.reason == reason
    assert error.received.text.startswith("a")


async def test_gaps_in_the_event_numbers_raise(generate: Generate) -> None:
    def skip(*_: object) -> list[Any]:
        event = delta("a", [1], 0)
        event.sequence_number = 1
        return [event]

    assert (await failing(generate, skip)).reason == "SEQUENCE_GAP"


async def test_status_with_details(generate: Generate) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="spec.text", description="is empty")
    script = fail(
        grpc.StatusCode.INVALID_ARGUMENT,
        "bad request",
        error_info("EMPTY_PROMPT", limit="1"),
        error_details_pb2.BadRequest(field_violations=[violation]),
    )
    error = await failing(generate, script, request_id="r1")
    assert isinstance(error, InvalidArgument)
    assert (error.code, error.reason, error.request_id) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "EMPTY_PROMPT",
        "r1",
    )
    assert error.metadata == {"limit": "1"}
    assert error.field_violations == (FieldViolation("spec.text", "is empty"),)
    assert str(error) == "INVALID_ARGUMENT EMPTY_PROMPT: bad request"


async def test_overload_says_when_to_retry_and_is_not_retried(generate: Generate) -> None:
    delay = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    with FakeRouter(fail(grpc.StatusCode.UNAVAILABLE, "full", error_info("QUEUE_FULL"), delay)) as router:
        with pytest.raises(Unavailable) as caught:
            await generate(router.address)
        assert caught.value.retry_after == 1.5
        assert len(router.requests) == 1


async def test_a_failure_in_mid_stream_names_the_component_and_keeps_what_came(generate: Generate) -> None:
    info = error_info("DECODE_GROUP_LOST", component="decode-0/1")
    script = fail(grpc.StatusCode.UNAVAILABLE, "lost", info, after=good_events()[:2])
    error = await failing(generate, script)
    assert isinstance(error, Unavailable)
    assert error.metadata["component"] == "decode-0/1"
    assert error.received == Received("Hello ", (5, 6))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.DATA_LOSS, DataLoss),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, ServerBug),
    ],
)
async def test_status_classes(generate: Generate, code: grpc.StatusCode, kind: type[SPS2Error]) -> None:
    assert type(await failing(generate, fail(code, "m"))) is kind


async def test_total_timeout(generate: Generate) -> None:
    error = await failing(generate, hang([delta("a", [1], 0)]), timeout=0.4)
    assert isinstance(error, TotalTimeout)
    assert error.received.token_ids == (1,)


async def test_first_token_timeout(generate: Generate) -> None:
    started = time.monotonic()
    error = await failing(generate, hang(), timeout=Timeouts(first_token=0.3))
    assert isinstance(error, FirstTokenTimeout)
    assert time.monotonic() - started < 3


async def test_between_tokens_timeout(generate: Generate) -> None:
    script = hang([delta("a", [1], 0), delta("b", [2], 1)])
    error = await failing(generate, script, timeout=Timeouts(first_token=5, between_tokens=0.3))
    assert isinstance(error, BetweenTokensTimeout)
    assert error.received == Received("ab", (1, 2))


async def test_a_timeout_cancels_on_the_server(generate: Generate) -> None:
    with FakeRouter(hang()) as router:
        with pytest.raises(FirstTokenTimeout):
            await generate(router.address, timeout=Timeouts(first_token=0.2))
        assert await asyncio.to_thread(router.stream_ended_early.wait, 5)


async def test_nobody_listens(generate: Generate) -> None:
    with pytest.raises(ConnectionFailed):
        await generate(f"127.0.0.1:{free_port()}")


async def test_a_connection_lost_before_the_first_event_is_retried_with_the_same_nonce(
    generate: Generate,
) -> None:
    def lose(request: object, context: grpc.ServicerContext) -> NoReturn:
        # What gRPC itself reports for a broken connection: UNAVAILABLE without details.
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    with FakeRouter(lose, lose, play(good_events())) as router:
        answer = await generate(router.address)
        assert answer.text == TEXT
        assert len(router.requests) == 3
        assert [one.spec.retry for one in router.requests] == [0, 1, 2]
        for one in router.requests:
            one.spec.retry = 0
        assert len({one.SerializeToString() for one in router.requests}) == 1
    with FakeRouter(lose, lose, lose, play(good_events())) as router:
        with pytest.raises(ConnectionFailed):
            await generate(router.address)
        assert len(router.requests) == 3


async def test_a_killed_server_is_connection_lost(generate: Generate) -> None:
    command = [sys.executable, "-P", str(REPO_ROOT / "tests/support/fake_router.py")]
    with ManagedProcess(command, name="router") as router:
        address = router.wait_for_line(r"listening on (\S+)").group(1)
        call = asyncio.ensure_future(generate(address))
        await asyncio.sleep(0.3)  # most likely in mid-stream by now; before it the error would be another
        router.kill()
        with pytest.raises((ConnectionLost, ConnectionFailed)):
            await call


def test_a_stopped_server_is_noticed_in_under_five_seconds() -> None:
    command = [sys.executable, "-P", str(REPO_ROOT / "tests/support/fake_router.py")]
    with ManagedProcess(command, name="router") as router:
        address = router.wait_for_line(r"listening on (\S+)").group(1)
        with Client(address) as client, client.stream("hi") as stream:
            next(stream)
            router.send(signal.SIGSTOP)
            started = time.monotonic()
            with pytest.raises(ConnectionLost) as caught:
                next(stream)
            assert time.monotonic() - started < 5
            assert caught.value.received == Received("a", (1,))


def test_one_client_serves_many_threads() -> None:
    with FakeRouter() as router, Client(router.address) as client:
        with_threads = [client.stream("hi", timeout=Timeouts(between_tokens=5)) for _ in range(8)]
        assert [stream.final().text for stream in with_threads] == [TEXT] * 8
        wait_until(lambda: len(router.requests) == 8)


def test_an_async_client_serves_several_event_loops() -> None:
    with FakeRouter() as router:
        client = AsyncClient(router.address)

        async def once() -> str:
            async with client.stream("hi") as stream:
                return (await stream.final()).text

        assert [asyncio.run(once()) for _ in range(2)] == [TEXT] * 2


async def test_usage_is_not_taken_twice(generate: Generate) -> None:
    error = await failing(generate, play([*good_events(), usage()]))
    assert (error.reason, error.message) == ("EVENT_AFTER_FINISH", "a second Usage")


def test_a_blocking_watch() -> None:
    with FakeRouter() as router, Client(router.address) as client:
        first, last = client.watch("r")
        assert (first.phase, first.queue_position, last.phase, last.num_tokens) == ("queued", 2, "ended", 3)
        with pytest.raises(NotFound):
            next(client.watch("unknown"))
        whole, change = client.watch_cluster()
        assert (whole.revision, whole.snapshot, whole.updated[0].worker_id) == (4, True, "decode-0/0")
        assert (change.revision, change.removed) == (5, ("decode-0/0",))


async def test_an_async_watch() -> None:
    with FakeRouter() as router:
        async with AsyncClient(router.address) as client:
            assert [one.phase async for one in client.watch("r")] == ["queued", "ended"]
            with pytest.raises(NotFound):
                await anext(client.watch("unknown"))
            assert [one.revision async for one in client.watch_cluster()] == [4, 5]


def test_messages_are_sent_as_they_are() -> None:
    with FakeRouter() as router, Client(router.address) as client:
        client.generate(messages=[{"role": "user", "content": "hi"}])
        (turn,) = router.requests[0].spec.chat.messages
        assert (turn.role, turn.content) == ("user", "hi")
        for bad in ({"prompt": "x", "messages": []}, {"prompt": "x", "token_ids": [1]}, {}):
            with pytest.raises(ValueError, match="exactly one of prompt, token_ids and messages"):
                client.generate(**bad)
        with pytest.raises(TypeError, match="role and content"):
            client.generate(messages=[{"role": "user"}])  # type: ignore[typeddict-item]
