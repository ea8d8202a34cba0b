"""The SDK against a scripted real gRPC server: channels, tries and tokens of both clients."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import grpc
import pytest

from sps2_client import AsyncClient, Cancelled, Client, ConnectionFailed, ConnectionLost, Received
from support.fake_router import FakeRouter, Response, delta, good_events, numbered, play

pytestmark = pytest.mark.service

TEXT = "Hello wörld"


def lose(_: object, context: grpc.ServicerContext) -> NoReturn:
    """What gRPC itself reports for a broken connection: UNAVAILABLE without details."""
    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


def lose_after_one(request: Any, context: grpc.ServicerContext) -> Iterator[Response]:
    yield from numbered([delta("a", [1], 0)], request.spec.request_id)
    lose(request, context)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Targets of the channels that are made."""
    targets: list[str] = []
    for module in (grpc, grpc.aio):
        make = module.insecure_channel

        def note(target: str, *args: Any, make: Any = make) -> Any:
            targets.append(target)
            return make(target, *args)

        monkeypatch.setattr(module, "insecure_channel", note)
    return targets


def test_one_channel_made_with_the_first_call(opened: list[str]) -> None:
    with FakeRouter() as router:
        with Client(router.address) as client:
            assert not opened
            assert [client.generate("hi").text for _ in range(2)] == [TEXT] * 2
            client.list_models()
        assert opened == [router.address]
        client.close()  # again
        with pytest.raises(ValueError, match="closed"):
            client.generate("hi")


def test_one_channel_for_each_event_loop_made_with_its_first_call(opened: list[str]) -> None:
    with FakeRouter() as router:
        client = AsyncClient(router.address)
        assert not opened

        async def use() -> None:
            assert [(await client.generate("hi")).text for _ in range(2)] == [TEXT] * 2

        for num_loops in (1, 2):
            asyncio.run(use())
            assert opened == [router.address] * num_loops
        asyncio.run(client.close())


@pytest.mark.parametrize("max_retries", [0, 1])
def test_so_many_tries_before_the_first_token(max_retries: int) -> None:
    with FakeRouter(lose) as router, Client(router.address, max_retries=max_retries) as client:
        with pytest.raises(ConnectionFailed):
            client.generate("hi")
        assert len(router.requests) == 1 + max_retries


async def test_no_second_try_after_it() -> None:
    with FakeRouter(lose_after_one, play(good_events())) as router:
        with Client(router.address) as client, pytest.raises(ConnectionLost) as caught:
            await asyncio.to_thread(client.generate, "hi")
        assert caught.value.received == Received("a", (1,))
        assert len(router.requests) == 1
        router.scripts[:] = [lose_after_one]
        async with AsyncClient(router.address) as asynchronous:
            with pytest.raises(ConnectionLost):
                await asynchronous.generate("hi")
        assert len(router.requests) == 2


def test_a_stream_that_is_closed_between_two_tries_stays_closed() -> None:
    closing = threading.Event()

    def lose_and_close(request: object, context: grpc.ServicerContext) -> NoReturn:
        closing.set()
        lose(request, context)

    def close() -> None:
        closing.wait(5)
        stream.close()

    with FakeRouter(lose_and_close, play(good_events())) as router, Client(router.address) as client:
        stream = client.stream("hi")
        closer = threading.Thread(target=close)
        closer.start()
        with pytest.raises(Cancelled):
            stream.final()
        closer.join(5)


async def test_the_token_is_asked_for_with_each_call() -> None:
    seen: list[str] = []

    def note(request: Any, context: grpc.ServicerContext) -> Iterator[Response]:
        seen.extend(str(value) for key, value in context.invocation_metadata() if key == "authorization")
        yield from play(good_events())(request, context)

    numbers = iter(range(4))
    with FakeRouter(note) as router:
        with Client(router.address, token=lambda: f"t{next(numbers)}") as client:
            await asyncio.to_thread(client.generate, "hi")
            await asyncio.to_thread(client.generate, "hi")
        async with AsyncClient(router.address, token=lambda: f"t{next(numbers)}") as asynchronous:
            await asynchronous.generate("hi")
        async with AsyncClient(router.address, token="fixed") as fixed:
            await fixed.generate("hi")
    assert seen == ["Bearer t0", "Bearer t1", "Bearer t2", "Bearer fixed"]
