"""The way of one attempt to its commit point: the good orders, and every event where it does not belong."""

import pytest

from sps2.internal.v1 import decode_service_pb2, placement_pb2, prefill_service_pb2
from sps2.internal.v1.decode_service_pb2 import DecodeResponse
from sps2.internal.v1.prefill_service_pb2 import PrefillResponse
from sps2.v1 import generation_pb2
from sps2_router.handshake import Handshake, Phase, Step
from sps2_router.timings import Milestones, timings
from sps2_service.errors import Internal

Shard = placement_pb2.ShardPlacement

STARTED = PrefillResponse(started=prefill_service_pb2.PrefillStarted())
PROGRESS = PrefillResponse(progress=prefill_service_pb2.PrefillProgress(fraction=0.5))
FIRST = PrefillResponse(first_token=prefill_service_pb2.FirstToken(token_id=9))
LAST = PrefillResponse(
    first_token=prefill_service_pb2.FirstToken(token_id=9, finish_reason=generation_pb2.FINISH_REASON_STOP)
)
DELIVERED = PrefillResponse(delivered=prefill_service_pb2.PrefillDelivered(collective_bytes=1))
COMMITTED = DecodeResponse(committed=decode_service_pb2.DecodeCommitted())
TOKENS = DecodeResponse(tokens=decode_service_pb2.DecodedTokens(first_index=1, token_ids=[1]))
FINISHED = DecodeResponse(finished=decode_service_pb2.DecodeFinished())


def placement(*ranges: tuple[int, int]) -> DecodeResponse:
    shards = [Shard(rank=i, token_begin=a, token_end=b) for i, (a, b) in enumerate(ranges)]
    return DecodeResponse(placement=placement_pb2.Placement(group="decode-0", shards=shards))


PLACED = placement((0, 64), (64, 100))


def feed(*events: DecodeResponse | PrefillResponse) -> tuple[Handshake, list[Step]]:
    """A handshake after these events, one second apart, and what it answered."""
    handshake = Handshake(num_prompt_tokens=100)
    steps = [
        handshake.on_decode(event, now)
        if isinstance(event, DecodeResponse)
        else handshake.on_prefill(event, now)
        for now, event in enumerate(events)
    ]
    return handshake, steps


def test_the_way_to_the_commit() -> None:
    handshake, steps = feed(PLACED, STARTED, PROGRESS, FIRST, DELIVERED, COMMITTED)
    assert steps == [Step.PREFILL, Step.NOTHING, Step.NOTHING, Step.START, Step.NOTHING, Step.ANSWER]
    assert handshake.phase is Phase.COMMITTED
    assert handshake.delivered.collective_bytes == 1
    assert (handshake.prefill_started_at, handshake.first_token_at, handshake.committed_at) == (1, 3, 5)


def test_delivery_may_be_told_after_the_commit() -> None:
    handshake, steps = feed(PLACED, STARTED, FIRST, COMMITTED, DELIVERED)
    assert (steps[-1], handshake.phase, handshake.delivered.collective_bytes) == (
        Step.NOTHING,
        Phase.COMMITTED,
        1,
    )


def test_late_progress_of_another_rank_means_nothing() -> None:
    handshake, steps = feed(PLACED, FIRST, STARTED, PROGRESS, COMMITTED, PROGRESS)
    assert steps[2:] == [Step.NOTHING, Step.NOTHING, Step.ANSWER, Step.NOTHING]
    assert handshake.prefill_started_at == handshake.first_token_at == 1


def test_a_first_token_that_is_the_last() -> None:
    handshake, steps = feed(PLACED, STARTED, LAST)
    assert (steps[-1], handshake.phase) == (Step.ANSWER, Phase.FINISHED)
    handshake.on_prefill(DELIVERED, 9)
    assert handshake.delivered.collective_bytes == 1


@pytest.mark.parametrize(
    "events",
    [
        [COMMITTED],
        [TOKENS],
        [FINISHED],
        [FIRST],
        [PLACED, PLACED],
        [PLACED, COMMITTED],
        [PLACED, DELIVERED],
        [PLACED, STARTED, COMMITTED],
        [PLACED, FIRST, FIRST],
        [STARTED],
        [PLACED, FIRST, TOKENS],
        [PLACED, FIRST, COMMITTED, COMMITTED],
        [PLACED, LAST, COMMITTED],
        [DecodeResponse()],
        [PLACED, PrefillResponse()],
    ],
)
def test_out_of_order_is_a_bug(events: list[DecodeResponse | PrefillResponse]) -> None:
    with pytest.raises(Internal, match="OUT_OF_ORDER"):
        feed(*events)


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [(0, 99)],
        [(0, 101)],
        [(1, 100)],
        [(0, 64), (65, 100)],
        [(0, 64), (60, 100)],
        [(0, 64), (64, 60), (60, 100)],
        [(0, 100), (0, 64)],
        [(0, 100), (64, 100)],
    ],
)
def test_a_placement_covers_the_prompt_exactly(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(Internal, match="BAD_PLACEMENT"):
        feed(placement(*ranges))


def test_a_placement_covers_the_prompt_once_for_each_range_of_heads() -> None:
    _, steps = feed(placement((0, 64), (64, 100), (0, 64), (64, 100)), STARTED)
    assert steps == feed(PLACED, STARTED)[1]


def test_a_placement_may_begin_with_what_is_held() -> None:
    placed = placement((64, 100))
    placed.placement.held.add(token_end=64)
    handshake, steps = feed(placed)
    assert (handshake.placement, steps) == (placed.placement, [Step.PREFILL])
    placed.placement.held[0].token_end = 63
    with pytest.raises(Internal, match="BAD_PLACEMENT"):
        feed(placed)


def test_timings_are_differences_of_the_milestones() -> None:
    handshake, _ = feed(PLACED, STARTED, PROGRESS, FIRST, DELIVERED, COMMITTED)
    found = timings(Milestones(arrived_at=-2, first_sent_at=6, last_sent_at=10), handshake, num_tokens=5)
    assert found == generation_pb2.Timings(queue=3, prefill=2, transfer=2, ttft=8, tpot=1, e2e=12)


def test_timings_of_a_single_token() -> None:
    handshake, _ = feed(PLACED, STARTED, LAST)
    found = timings(Milestones(arrived_at=0, first_sent_at=3, last_sent_at=3), handshake, num_tokens=1)
    assert found == generation_pb2.Timings(queue=1, prefill=1, ttft=3, e2e=3)
