"""Rows that share a prompt on one rank: which blocks are whose, what is copied, and that nothing is left."""

import pytest
import torch

from sps2.internal.v1.engine_pb2 import ReserveRow
from sps2.internal.v1.placement_pb2 import HeldTokens, Placement, ShardPlacement
from sps2.internal.v1.prefill_service_pb2 import TokenChoice
from sps2.v1.generation_pb2 import FINISH_REASON_LENGTH, SamplingSpec
from sps2_decode_worker.receive import Receiver
from sps2_decode_worker.rows import RowState
from sps2_engine.kv_pool import BLOCK_TOKENS, slot_runs
from support.decode_ranks import receiver

NUM_BLOCKS = 20


def rows_of(holder: Receiver, num_tokens: int, home: int) -> list[RowState]:
    """Three choices of a prompt that lies on rank 0, seen from there; up to 70 new tokens each."""
    reserve = ReserveRow(
        row=4,
        choice_rows=[5, 6],
        home=home,
        num_prompt_tokens=num_tokens,
        placement=Placement(shards=[ShardPlacement(token_end=num_tokens), ShardPlacement(rank=1)]),
        choice=TokenChoice(sampling=SamplingSpec(top_p=1), max_tokens=70, num_choices=3),
    )
    return holder.reserve(reserve, 0, (), lambda: None)


def slots_of(row: RowState, num_tokens: int) -> list[int]:
    """Slots of the prompt."""
    return [slot for run in slot_runs(row.blocks, num_tokens) for slot in range(*run)]


@pytest.mark.parametrize(("num_tokens", "num_used"), [(130, 2 + 3 * 2), (128, 2 + 3 * 1), (10, 3 * 2)])
def test_home_shares_full_blocks_and_copies_the_last(num_tokens: int, num_used: int) -> None:
    holder = receiver(NUM_BLOCKS)
    rows = rows_of(holder, num_tokens, home=0)
    assert [(row.row_id, row.choice_index) for row in rows] == [(4, 0), (5, 1), (6, 2)]
    assert holder.blocks_used == num_used
    values = torch.randn(1, num_tokens, 1, 2)
    slots = slots_of(rows[0], num_tokens)
    holder._arena.k[:, slots], holder._arena.v[:, slots] = values, -values
    for row in rows:
        holder.copy_prompt(row)
        row.admit(1, torch.device("cpu"))
        row.append_slot()
    appended = [row.append_slot() for row in rows]
    assert len({slot // BLOCK_TOKENS for slot in appended}) == 3  # nobody writes into another's block
    holder.release(rows[0])
    for row in rows[1:]:
        kept = slots_of(row, num_tokens)
        assert torch.equal(holder._arena.k[:, kept], values)
        assert torch.equal(holder._arena.v[:, kept], -values)
        holder.release(row)
    assert holder.blocks_used == 0


def test_a_check_finds_what_is_astray() -> None:
    holder = receiver(NUM_BLOCKS)
    rows = rows_of(holder, 130, home=0)
    holder.check(rows, 8)
    with pytest.raises(AssertionError, match="8 blocks are used, the leader counts 7"):
        holder.check(rows, 7)
    with pytest.raises(AssertionError, match="other owners"):
        holder.check(rows[:2], 8)
    rows[2].own.blocks[-1] = rows[1].own.blocks[-1]
    with pytest.raises(AssertionError, match="other owners"):
        holder.check(rows, 8)


def test_other_holders_share_all() -> None:
    holder = receiver(NUM_BLOCKS)
    rows = rows_of(holder, 130, home=1)
    assert holder.blocks_used == 3
    assert rows[0].blocks == rows[1].blocks == rows[2].blocks
    assert rows[2].copied_slots() == ([], [])
    for row in rows:
        holder.release(row)
    assert holder.blocks_used == 0


def test_a_row_takes_blocks_as_its_output_comes() -> None:
    holder = receiver(NUM_BLOCKS)
    row, *others = rows_of(holder, 10, home=0)
    for other in others:
        holder.release(other)
    row.admit(1, torch.device("cpu"))
    slots = []
    for _ in range(70):
        holder.extend(row)
        slots.append(row.append_slot())
    assert holder.blocks_used == 2
    for _ in range(60):
        holder.extend(row)
        slots.append(row.append_slot())
    assert holder.blocks_used == len(row.blocks) == 3
    assert len(set(slots)) == 130
    holder.release(row)
    assert holder.blocks_used == 0


def test_a_row_that_comes_back_has_its_place_in_the_text() -> None:
    """Ten tokens, of which the last three were generated: the next is output 3, and its penalties know them."""
    holder = receiver(NUM_BLOCKS)
    reserve = ReserveRow(
        row=1,
        home=0,
        num_prompt_tokens=10,
        placement=Placement(shards=[ShardPlacement(token_end=10)]),
        choice=TokenChoice(
            sampling=SamplingSpec(top_p=1, presence_penalty=1), max_tokens=5, generated_token_ids=[4, 5, 4]
        ),
    )
    (row,) = holder.reserve(reserve, 0, (), lambda: None)
    row.admit(6, torch.device("cpu"))
    assert (row.position, row.at_home.num_outputs) == (10, 4)
    assert row.at_home.take(7) == FINISH_REASON_LENGTH
    assert row.at_home.edits is not None
    logits = torch.zeros(9)
    row.at_home.edits.apply(logits)
    assert logits.tolist() == [0, 0, 0, 0, -1, -1, -1, -1, 0]
    holder.release(row)


def sharer(num_held: int, num_tokens: int) -> ReserveRow:
    """A row at home on rank 0 whose first tokens are row 4's, which has them there."""
    return ReserveRow(
        row=9,
        home=0,
        num_prompt_tokens=num_tokens,
        placement=Placement(
            held=[HeldTokens(token_end=num_held)],
            shards=[ShardPlacement(token_begin=num_held, token_end=num_tokens)],
        ),
        choice=TokenChoice(sampling=SamplingSpec(top_p=1), max_tokens=70),
        held_from=4,
    )


def test_what_is_taken_over_outlives_who_brought_it() -> None:
    """130 tokens of which 128 are there: one block for the rest, one for the output. They may leave at once."""
    holder = receiver(NUM_BLOCKS)
    donors = rows_of(holder, 130, home=0)
    used, reserve = holder.blocks_used, sharer(128, 130)
    held = holder.hold(reserve, 0, {row.row_id: row for row in donors})
    for row in donors:
        holder.release(row)
    assert holder.blocks_used == 2
    (row,) = holder.reserve(reserve, 0, held, lambda: None)
    assert (row.blocks[:2], row.num_local) == (donors[0].blocks[:2], 130)
    assert holder.blocks_used == 4 <= used
    row.admit(1, torch.device("cpu"))
    assert row.append_slot() // BLOCK_TOKENS == row.blocks[2]
    holder.check([row], 4)
    with pytest.raises(AssertionError, match="4 blocks are used, the leader counts 5"):
        holder.check([row], 5)
    holder.release(row)
    assert holder.blocks_used == 0


def test_only_full_blocks_of_the_prompt_are_taken_over() -> None:
    holder = receiver(NUM_BLOCKS)
    donors = {row.row_id: row for row in rows_of(holder, 130, home=0)}
    with pytest.raises(ValueError, match="row 4 has no 3 blocks"):
        holder.hold(sharer(192, 200), 0, donors)
    assert holder.hold(sharer(128, 130), 1, donors) == ()
