"""Decode attention over 1 to 4 ranks equals attention over all keys in one place, and posts what the plan counts."""

import pytest
import torch

from sps2_engine.attention.decode_plan import DecodePlan, DecodeRow
from sps2_engine.attention.q_exchange import LayerCache, QExchange
from sps2_engine.collectives import Communicator
from sps2_kernels import reference
from support.ranks import run_ranks

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_STEPS = 6, 2, 8, 3
SCALE = HEAD_DIM**-0.5


def rows_for(num_ranks: int) -> tuple[DecodeRow, ...]:
    """One row at home only, one over all ranks, one over the outer two."""
    everywhere = tuple(range(num_ranks))
    return (
        DecodeRow(3, num_ranks - 1, (num_ranks - 1,)),
        DecodeRow(5, 0, everywhere),
        DecodeRow(8, num_ranks - 1, tuple(sorted({0, num_ranks - 1}))),
    )


@pytest.mark.parametrize("by_memory", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_equals_attention_over_all_keys(num_ranks: int, *, by_memory: bool) -> None:
    rows = rows_for(num_ranks)
    plan = DecodePlan(rows, num_ranks, NUM_Q_HEADS, HEAD_DIM, 4)
    generator = torch.Generator().manual_seed(num_ranks)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # Row i holds 5 + i old keys on each of its holders, at slots 40 * i on.
    old = {
        (row.row_id, rank): draw(2, 5 + i, NUM_KV_HEADS, HEAD_DIM)
        for i, row in enumerate(rows)
        for rank in row.holders
    }
    q = {row.row_id: draw(NUM_STEPS, NUM_Q_HEADS, HEAD_DIM) for row in rows}
    new = {row.row_id: draw(NUM_STEPS, 2, NUM_KV_HEADS, HEAD_DIM) for row in rows}

    def on_rank(communicator: Communicator) -> tuple[list[dict[int, torch.Tensor]], int]:
        cache = LayerCache(*torch.zeros(2, 200, NUM_KV_HEADS, HEAD_DIM))
        counts: dict[int, int] = {}
        for i, row in enumerate(rows):
            if communicator.rank in row.holders:
                counts[row.row_id] = 5 + i
                cache.k[40 * i : 40 * i + 5 + i] = old[row.row_id, communicator.rank][0]
                cache.v[40 * i : 40 * i + 5 + i] = old[row.row_id, communicator.rank][1]
        runs = {row.row_id: [(40 * i, 40 * i + 5 + i)] for i, row in enumerate(rows) if row.row_id in counts}
        exchange = QExchange(plan, communicator, SCALE, cache, runs)
        outputs = []
        for step in range(NUM_STEPS):
            slots = [40 * rows.index(row) + counts[row.row_id] for row in exchange.home_rows]
            for row in exchange.home_rows:
                counts[row.row_id] += 1
            exchange.begin_step(slots)
            ids = [row.row_id for row in exchange.home_rows]
            empty = torch.empty(0, NUM_KV_HEADS, HEAD_DIM)
            o = exchange.attend(
                cache,
                torch.stack([q[i][step] for i in ids]) if ids else torch.empty(0, NUM_Q_HEADS, HEAD_DIM),
                torch.stack([new[i][step, 0] for i in ids]) if ids else empty,
                torch.stack([new[i][step, 1] for i in ids]) if ids else empty,
            )
            outputs.append(dict(zip(ids, o, strict=True)))
        assert (exchange.exposed_s > 0) == plan.exchanges, "what is waited for is counted, and nothing else"
        return outputs, communicator.bytes_posted["q_exchange"]

    results = run_ranks(num_ranks, on_rank, by_memory=by_memory)

    for row in rows:
        for step in range(NUM_STEPS):
            seen = torch.cat([old[row.row_id, rank] for rank in row.holders], dim=1)
            grown = torch.cat([seen, new[row.row_id][: step + 1].transpose(0, 1)], dim=1)
            everything = torch.ones(1, grown.shape[1], dtype=torch.bool)
            expected, _ = reference.masked_attention(
                q[row.row_id][step : step + 1], grown[0], grown[1], everything, SCALE
            )
            actual = results[row.home][0][step][row.row_id]
            torch.testing.assert_close(actual.double(), expected[0], atol=1e-6, rtol=1e-5)
    assert sum(posted for _, posted in results) == NUM_STEPS * plan.bytes_per_layer()
