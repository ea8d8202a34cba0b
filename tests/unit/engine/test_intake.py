"""The intake: what is expected, what is counted, and everything that is refused."""

import threading

import pytest
import torch

from sps2.internal.v1.kv_transfer_service_pb2 import SlabVerdict
from sps2.internal.v1.placement_pb2 import Attempt, Fence
from sps2_engine.kv_pool import BLOCK_TOKENS
from sps2_layout.layout import Span
from support.slabs import BOTH, FENCE, HEAD_BYTES, TOKEN_BYTES, Target, header_of, random_arena


def test_a_slab_lands_in_its_blocks_and_nowhere_else() -> None:
    target, source = Target(), random_arena()
    before = target.bytes.arena.k.clone()
    payload = b"".join(source.pieces(0, [(0, 70)], BOTH))
    assert target.send(payload) == (SlabVerdict.SLAB_VERDICT_ACCEPTED, "")
    arena = target.bytes.arena
    # Token 10 lies in the first slot of block 3, token 74 in the first of block 0.
    assert torch.equal(arena.k[1, 192:256], source.arena.k[0, :64])
    assert torch.equal(arena.v[1, 0:6], source.arena.v[0, 64:70])
    assert torch.equal(arena.k[0], before[0])
    assert torch.equal(arena.k[1, 6:192], before[1, 6:192])


def test_completion_is_told_once_when_every_layer_and_token_is_there() -> None:
    completions: list[int] = []
    target = Target(lambda: completions.append(1))
    first, second = bytes(70 * TOKEN_BYTES), bytes(60 * TOKEN_BYTES)
    for layer in (0, 1):
        target.send(first, layer=layer)
        target.send(first, layer=layer)  # again
        assert not completions
        target.send(second, layer=layer, token_begin=80, token_end=140)
    assert completions == [1]
    assert target.intake.num_incomplete() == 0
    target.send(first)
    assert completions == [1]


def test_a_slab_that_comes_again_does_not_overwrite() -> None:
    target = Target()
    target.send(bytes(70 * TOKEN_BYTES))
    target.bytes.arena.k.fill_(7)
    assert target.send(bytes(70 * TOKEN_BYTES))[0] == SlabVerdict.SLAB_VERDICT_ACCEPTED
    assert bool((target.bytes.arena.k == 7).all())


def test_completion_counts_each_head_of_each_token_once() -> None:
    completions: list[int] = []
    target = Target(lambda: completions.append(1))
    half = bytes(130 * TOKEN_BYTES // 2)
    for layer in (0, 1):
        for head in (0, 0, 1):  # one of them again
            assert not completions
            target.send(half, layer=layer, token_end=140, head_begin=head, head_end=head + 1)
    assert completions == [1]
    assert target.intake.num_incomplete() == 0


def test_more_heads_than_a_byte_has_bits_are_counted() -> None:
    arena = random_arena(Span(0, 11), 12)
    completions: list[int] = []
    target = Target(lambda: completions.append(1), arena)
    for layer in (0, 1):
        for begin, end in ((6, 11), (0, 7)):  # head 6 comes twice
            assert not completions
            slab = bytes(130 * (end - begin) * HEAD_BYTES)
            target.send(slab, layer=layer, token_end=140, head_begin=begin, head_end=end)
    assert completions == [1]


@pytest.mark.parametrize("heads", [(0, 2), (0, 4), (3, 4)])
def test_heads_that_the_target_does_not_hold_are_refused(heads: tuple[int, int]) -> None:
    target = Target(arena=random_arena(Span(1, 3), 4))
    payload = bytes(70 * (heads[1] - heads[0]) * HEAD_BYTES)
    verdict, why = target.send(payload, head_begin=heads[0], head_end=heads[1])
    assert (verdict, why) == (
        SlabVerdict.SLAB_VERDICT_REFUSED,
        f"heads [{heads[0]}, {heads[1]}) are not in [1, 3)",
    )


def stale(**changed: object) -> Fence:
    attempt = Attempt(request_id="r", number=int(str(changed.pop("number", 1))))
    return Fence(**{"process_incarnation": "target", "epoch": 3, "attempt": attempt, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "detail"),
    [
        ({"fence": stale(process_incarnation="before")}, "not before"),
        ({"fence": stale(epoch=2)}, "epoch 3, not 2"),
        ({"fence": stale(epoch=4)}, "epoch 3, not 4"),
        ({"fence": stale(number=2)}, "not expected"),
        ({"fence": Fence()}, "this is process"),
        ({"source_incarnation": "another"}, "another source's ring"),
        ({"layer": 2}, "layer 2 of 2"),
        ({"layer": -1}, "layer -1"),
        ({"token_begin": 9, "token_end": 79}, "not in"),
        ({"token_begin": 80, "token_end": 150}, "not in"),
        ({"token_begin": 80, "token_end": 80}, "no range"),
        ({"token_end": 81}, "bytes where"),
        ({"head_begin": 1}, "bytes where"),
        ({"head_end": 1}, "bytes where"),
        ({"head_begin": 1, "head_end": 1}, "heads [1, 1) are not in [0, 2)"),
        ({"head_end": 3}, "heads [0, 3)"),
        ({"head_begin": -1}, "heads [-1, 2)"),
        ({"num_bytes": 0}, "0 bytes"),
    ],
)
def test_a_header_that_is_not_of_the_placement_is_refused(changed: dict[str, object], detail: str) -> None:
    target = Target()
    before = target.bytes.arena.k.clone()
    verdict, why = target.send(bytes(70 * TOKEN_BYTES), **changed)
    assert verdict == SlabVerdict.SLAB_VERDICT_REFUSED
    assert detail in why
    assert torch.equal(target.bytes.arena.k, before)


def test_fewer_bytes_than_the_header_says_are_refused() -> None:
    target = Target()
    header = header_of(bytes(70 * TOKEN_BYTES))
    ack = target.intake.take(header, "source", lambda: memoryview(b"short"))
    assert ack.verdict == SlabVerdict.SLAB_VERDICT_REFUSED


def test_a_wrong_checksum_is_corrupt_and_changes_nothing() -> None:
    target = Target()
    before = target.bytes.arena.v.clone()
    verdict, _ = target.send(bytes(70 * TOKEN_BYTES), crc32=1)
    assert verdict == SlabVerdict.SLAB_VERDICT_CORRUPT
    assert torch.equal(target.bytes.arena.v, before)


def test_what_is_forgotten_while_a_slab_is_checked_is_not_written() -> None:
    target = Target()
    payload = bytes(70 * TOKEN_BYTES)
    before = target.bytes.arena.k.clone()
    in_copy, forgotten = threading.Event(), threading.Event()
    verdicts: list[int] = []

    def copy() -> memoryview:
        in_copy.set()
        assert forgotten.wait(10)
        return memoryview(payload)

    taking = threading.Thread(
        target=lambda: verdicts.append(target.intake.take(header_of(payload), "source", copy).verdict)
    )
    taking.start()
    assert in_copy.wait(10)
    target.intake.forget(FENCE)
    target.intake.expect(FENCE, 10, 140, [3, 0, 1], lambda: None)  # even under the very same fence
    forgotten.set()
    taking.join(10)
    assert verdicts == [SlabVerdict.SLAB_VERDICT_REFUSED]
    assert torch.equal(target.bytes.arena.k, before)


def test_a_failing_callback_is_logged_and_the_slab_still_accepted(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("the engine is closing")

    target = Target(fail)
    for layer in (0, 1):
        payload = bytes(130 * TOKEN_BYTES)
        verdict, _ = target.send(payload, layer=layer, token_end=140)
    assert verdict == SlabVerdict.SLAB_VERDICT_ACCEPTED
    assert "the engine is closing" in caplog.text


def test_expectations_that_make_no_sense_are_refused() -> None:
    target = Target()
    with pytest.raises(ValueError, match="expected already"):
        target.intake.expect(FENCE, 0, 1, [0], lambda: None)
    with pytest.raises(ValueError, match="fence is of process"):
        target.intake.expect(stale(process_incarnation="before"), 0, 1, [0], lambda: None)
    with pytest.raises(ValueError, match="do not lie in"):
        target.intake.expect(stale(number=2), 0, BLOCK_TOKENS + 1, [0], lambda: None)


def test_forgetting_a_stale_fence_forgets_nothing() -> None:
    target = Target()
    target.intake.forget(stale(epoch=2))
    assert target.send(bytes(70 * TOKEN_BYTES))[0] == SlabVerdict.SLAB_VERDICT_ACCEPTED
