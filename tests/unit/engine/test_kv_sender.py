"""Sender and receiver in one process, by gRPC: what the engine is told in cases off the main road."""

from collections.abc import Iterator

import pytest

from sps2.internal.v1.kv_transfer_service_pb2 import KvFormat
from sps2.internal.v1.placement_pb2 import Attempt, Fence, Placement, ShardPlacement
from sps2_engine.kv_pool import KvArena
from sps2_engine.kv_transfer.base import MAX_SLOT_BYTES, RingOptions, TransferError
from sps2_engine.kv_transfer.receiver import KvReceiver
from sps2_engine.kv_transfer.rows import Rows, UsedRows
from sps2_engine.kv_transfer.sender import KvSender
from sps2_engine.kv_transfer.transfer import Transfer
from sps2_layout.layout import Span

FORMAT = KvFormat(model_hash="m", dtype="fp32", layout_version=1, num_layers=1, num_kv_heads=1, head_dim=8)
ATTEMPT = Attempt(request_id="r", number=1)


def arena() -> KvArena:
    return KvArena(num_layers=1, num_blocks=2, num_kv_heads=1, head_dim=8)


@pytest.fixture
def sender() -> Iterator[KvSender]:
    one = KvSender(arena(), FORMAT, "prefill-0/0", "source", "grpc")
    yield one
    one.close()


@pytest.fixture
def receiver() -> Iterator[KvReceiver]:
    one = KvReceiver(arena(), FORMAT, "target", "127.0.0.1", transport="grpc")
    yield one
    one.close()


def begin(sender: KvSender, to: Placement, spans: list[Span], blocks: list[int]) -> Transfer:
    return sender.begin(ATTEMPT, to, spans, [UsedRows.of_all(Rows(spans, blocks))])


def placement(address: str) -> Placement:
    fence = Fence(process_incarnation="target", epoch=1, attempt=ATTEMPT)
    return Placement(
        shards=[ShardPlacement(token_begin=0, token_end=100, transfer_address=address, fence=fence)]
    )


def test_a_layer_goes_over_and_is_counted(sender: KvSender, receiver: KvReceiver) -> None:
    sender._bytes.arena.k.fill_(1)
    sender._bytes.arena.v.fill_(2)
    done: list[str] = []
    fence = placement("").shards[0].fence
    receiver.expect(fence, 0, 100, [0, 1], lambda: done.append("complete"))
    transfer = begin(sender, placement(receiver.address), [Span(0, 100)], [1, 0])
    sender.layer_ready(transfer, 0)
    assert transfer.done.result(10).bytes_sent == sender.bytes_posted == 100 * 2 * 8 * 4
    assert done == ["complete"]
    assert bool((receiver._bytes.arena.v[0, :100] == 2).all())
    assert sender.abort(transfer).result(10) is None


def test_of_rows_that_began_as_another_text_only_what_is_used_goes(
    sender: KvSender, receiver: KvReceiver
) -> None:
    """The rows hold tokens 0 to 59 of another text; this one shares 40 of them and has computed what follows."""
    keys = sender._bytes.arena.k[0]
    keys[:64], keys[64:] = 1, 2
    receiver.expect(placement("").shards[0].fence, 0, 100, [0, 1], lambda: None)
    cached = UsedRows(Rows([Span(0, 60)], [0]), [Span(0, 40)])
    sources = [cached, UsedRows.of_all(Rows([Span(40, 100)], [1]))]
    to = placement(receiver.address)
    transfer = sender.begin(ATTEMPT, to, [Span(0, 40), Span(40, 100)], sources)
    sender.layer_ready(transfer, 0)
    transfer.done.result(10)
    arrived = receiver._bytes.arena.k[0]
    assert bool((arrived[:40] == 1).all())
    assert bool((arrived[40:100] == 2).all())
    unclear = sender.begin(ATTEMPT, to, [Span(0, 40)], [cached, cached])
    with pytest.raises(TransferError, match="2 sources hold"):
        unclear.done.result(10)


def test_nothing_leaves_a_fenced_rank(receiver: KvReceiver) -> None:
    lease = [True]
    sender = KvSender(arena(), FORMAT, "prefill-0/0", "source", "grpc", may_send=lambda: lease[0])
    receiver.expect(placement("").shards[0].fence, 0, 100, [0, 1], lambda: None)
    transfer = begin(sender, placement(receiver.address), [Span(0, 100)], [1, 0])
    lease[0] = False
    sender.layer_ready(transfer, 0)
    with pytest.raises(TransferError, match="lease") as caught:
        transfer.done.result(10)
    assert (caught.value.reason, sender.bytes_posted) == ("FENCED", 0)
    lease[0] = True
    again = begin(sender, placement(receiver.address), [Span(0, 100)], [1, 0])
    sender.layer_ready(again, 0)
    assert again.done.result(10).slabs_sent > 0
    sender.close()


def test_a_rank_without_tokens_is_done_at_once(sender: KvSender) -> None:
    assert begin(sender, placement("nowhere:1"), [Span(50, 50)], []).done.result(0).bytes_sent == 0


@pytest.mark.parametrize(("end", "blocks"), [(101, [0, 1]), (100, [0])])
def test_a_placement_that_does_not_fit_is_told_by_the_future(
    sender: KvSender, end: int, blocks: list[int]
) -> None:
    transfer = begin(sender, placement("nowhere:1"), [Span(0, end)], blocks)
    with pytest.raises(TransferError, match="BAD_PLACEMENT"):
        transfer.done.result(0)


def test_another_life_of_the_target_is_refused(sender: KvSender, receiver: KvReceiver) -> None:
    stale = placement(receiver.address)
    stale.shards[0].fence.process_incarnation = "before"
    transfer = begin(sender, stale, [Span(0, 100)], [0, 1])
    sender.layer_ready(transfer, 0)
    with pytest.raises(TransferError, match=r"REFUSED.*process target, the placement means before"):
        transfer.done.result(10)


def test_close_ends_what_goes_on_and_what_comes_later(sender: KvSender, receiver: KvReceiver) -> None:
    transfer = begin(sender, placement(receiver.address), [Span(0, 100)], [0, 1])
    sender.close()
    with pytest.raises(TransferError, match="ABORTED"):
        transfer.done.result(0)
    late = begin(sender, placement(receiver.address), [Span(0, 100)], [0, 1])
    with pytest.raises(TransferError, match="ABORTED"):
        late.done.result(0)
    with pytest.raises(TransferError, match="ABORTED"):
        sender.abort(transfer).result(0)


def test_a_layer_is_ready_once(sender: KvSender, receiver: KvReceiver) -> None:
    transfer = begin(sender, placement(receiver.address), [Span(0, 100)], [0, 1])
    sender.layer_ready(transfer, 0)
    for layer in (0, 1, -1):
        with pytest.raises(ValueError, match=f"layer {layer}"):
            sender.layer_ready(transfer, layer)


def test_an_empty_part_is_complete_at_once(receiver: KvReceiver) -> None:
    told: list[int] = []
    receiver.expect(placement("").shards[0].fence, 10, 10, [], lambda: told.append(1))
    receiver.close()  # its thread has carried everything out by then
    assert told == [1]


@pytest.mark.parametrize("options", [{"slot_bytes": 0}, {"num_slots": 0}, {"slot_bytes": MAX_SLOT_BYTES + 1}])
def test_ring_options_have_bounds(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        RingOptions(**options)


def test_a_slot_holds_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="a token has 64 bytes"):
        KvReceiver(arena(), FORMAT, "target", "127.0.0.1", ring=RingOptions(slot_bytes=32), transport="grpc")
