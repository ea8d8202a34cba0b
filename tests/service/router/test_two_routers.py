"""Two routers over one directory: each reaches what the other serves, and no request is served twice."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from sps2.internal.v1.kv_directory_service_pb2 import RequestAdmission
from sps2.v1 import inference_service_pb2 as pb
from support.fake_workers import FakeRequestDirectory
from support.router_deployment import Code, Deployment, failure, prompt, reason, until

pytestmark = pytest.mark.service

Pair = tuple[Deployment, Deployment]


@pytest.fixture
async def routers() -> AsyncIterator[Pair]:
    requests = FakeRequestDirectory()
    async with Deployment(requests=requests) as one, Deployment(requests=requests) as other:
        yield one, other
        for up in (one, other):
            await up.assert_all_freed()
        assert not requests.admitted


def slow(up: Deployment) -> None:
    up.decode.tokens, up.decode.pause_s = [9] * 400, 0.01


async def test_either_router_cancels_and_watches_what_the_other_serves(routers: Pair) -> None:
    one, other = routers
    slow(one)
    ended = asyncio.ensure_future(failure(one.stream(prompt(request_id="r"))))
    await until(lambda: one.decode.num_sent > 2)
    watch = other.inference.WatchGeneration(pb.WatchGenerationRequest(request_id="r"), timeout=9)
    assert (await watch.read()).phase == pb.GENERATION_PHASE_DECODING
    await other.inference.CancelGeneration(pb.CancelGenerationRequest(request_id="r"), timeout=9)
    error = await asyncio.wait_for(ended, 3)
    assert (error.code(), reason(error)) == (Code.CANCELLED, "CANCELLED")
    while (await watch.read()).phase != pb.GENERATION_PHASE_ENDED:
        pass


@pytest.mark.parametrize("grace_s", [0.0, 0.3])
async def test_a_watch_of_what_a_stopped_router_served_may_be_asked_again(
    routers: Pair, grace_s: float
) -> None:
    one, other = routers
    slow(one)
    stream = one.stream(prompt(request_id="r"))
    await stream.read()
    watch = other.inference.WatchGeneration(pb.WatchGenerationRequest(request_id="r"), timeout=9)
    seen: list[pb.WatchGenerationResponse] = []
    broken = asyncio.ensure_future(failure(watch, seen))
    await until(lambda: seen)
    await one.router.server.stop(grace_s)
    error = await broken
    assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "ROUTER_STOPPED")
    stream.cancel()


async def test_a_cancel_waits_for_a_request_that_is_on_its_way(routers: Pair) -> None:
    one, other = routers
    slow(one)
    cancel = asyncio.ensure_future(
        other.inference.CancelGeneration(pb.CancelGenerationRequest(request_id="r"), timeout=9)
    )
    await asyncio.sleep(0.3)  # the cancel looks around meanwhile
    error = await failure(one.stream(prompt(request_id="r")))
    assert error.code() == Code.CANCELLED
    await cancel


async def test_the_later_of_two_calls_with_one_id_ends_before_it_says_anything(routers: Pair) -> None:
    one, other = routers
    slow(one)
    first = one.stream(prompt(request_id="r", nonce=b"a"))
    await first.read()
    seen: list[pb.StreamGenerateTextResponse] = []
    error = await failure(other.stream(prompt(request_id="r", nonce=b"b")), seen)
    assert (error.code(), reason(error)) == (Code.ALREADY_EXISTS, "REQUEST_ID_LIVE")
    assert not seen
    await first.read()  # and the first goes on
    first.cancel()


async def test_a_call_that_is_over_but_not_yet_dismissed_is_outwaited(routers: Pair) -> None:
    one, other = routers
    await one.generate(prompt(request_id="r", nonce=b"a"))
    ended = RequestAdmission(request_id="r", call_id="ended", router_address="127.0.0.1:1", nonce=b"a")
    one.requests.admitted["r"] = ended  # as a dismissal that comes late leaves it
    asyncio.get_running_loop().call_later(0.2, one.requests.dismiss, "r", "ended")
    assert (await other.generate(prompt(request_id="r", nonce=b"b"))).text


async def test_a_retry_on_another_router_takes_the_place_of_its_call(routers: Pair) -> None:
    one, other = routers
    slow(one)
    first = asyncio.ensure_future(failure(one.stream(prompt(request_id="r", nonce=b"a"))))
    await until(lambda: one.decode.num_sent > 2)
    events = [event async for event in other.stream(prompt(request_id="r", nonce=b"a"))]
    assert events[-1].HasField("usage")
    error = await asyncio.wait_for(first, 3)
    assert (error.code(), reason(error)) == (Code.ABORTED, "SUPERSEDED")


async def test_a_router_that_was_not_told_of_a_retry_hears_it_when_it_renews(routers: Pair) -> None:
    one, other = routers
    slow(one)
    first = asyncio.ensure_future(failure(one.stream(prompt(request_id="r", nonce=b"a"))))
    await until(lambda: one.decode.num_sent > 2)
    other.requests.admitted["r"].router_address = "127.0.0.1:1"  # where nobody is
    slow(other)
    retry = other.stream(prompt(request_id="r", nonce=b"a"))
    await retry.read()
    await one.router._claims.renew()
    error = await asyncio.wait_for(first, 3)
    assert (error.code(), reason(error)) == (Code.ABORTED, "SUPERSEDED")
    retry.cancel()


async def test_a_call_that_arrives_after_its_retry_on_another_router_ends_itself(routers: Pair) -> None:
    one, other = routers
    slow(other)
    retry = other.stream(prompt(request_id="r", nonce=b"a", retry=1))
    await retry.read()
    error = await failure(one.stream(prompt(request_id="r", nonce=b"a")))
    assert (error.code(), reason(error)) == (Code.ABORTED, "SUPERSEDED")
    await other.router._claims.renew()
    await retry.read()  # and the retry goes on
    retry.cancel()


@pytest.mark.parametrize("nonce", [b"a", b"of an earlier request with this id"])
async def test_an_admission_that_comes_after_its_dismissal_ends_nobody(routers: Pair, nonce: bytes) -> None:
    """What the router has told of a call that is over was executed late; each at its place, by another connection."""
    one, other = routers
    slow(one)
    retry = one.stream(prompt(request_id="r", nonce=b"a", retry=1))
    await retry.read()
    admitted = one.requests.admitted["r"]
    over = RequestAdmission(
        request_id="r", call_id="over", router_address=admitted.router_address, nonce=nonce
    )
    one.requests.admitted["r"] = over
    await one.router._claims.renew()
    await one.router._claims.renew()
    await retry.read()
    assert one.requests.admitted["r"].call_id == admitted.call_id
    retry.cancel()
    await until(lambda: not one.requests.admitted)
    over.router_address = other.router._address
    one.requests.admitted["r"] = over
    assert (await other.generate(prompt(request_id="r", nonce=b"b"))).text


async def test_while_the_directory_is_away_requests_are_served_and_cancels_are_told(routers: Pair) -> None:
    one, other = routers
    one.requests.is_away = True
    await one.generate(prompt(request_id="r"))
    cancel = other.inference.CancelGeneration(pb.CancelGenerationRequest(request_id="r"), timeout=9)
    error = await failure(cancel)
    assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "STORE_AWAY")


async def test_a_request_whose_router_is_gone(routers: Pair) -> None:
    one, other = routers
    slow(one)
    call = one.stream(prompt(request_id="r"))
    await call.read()
    one.requests.admitted["r"].router_address = "127.0.0.1:1"
    error = await failure(
        other.inference.CancelGeneration(pb.CancelGenerationRequest(request_id="r"), timeout=9)
    )
    assert error.code() == Code.UNAVAILABLE
    call.cancel()
