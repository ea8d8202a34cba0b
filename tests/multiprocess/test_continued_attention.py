"""A text behind a cached beginning, over 1 to 4 ranks: equals dense attention of all of it, posts what is counted."""

import pytest
import torch

from sps2_engine.attention.continued import CachedKeys, ContinuedSchedule
from sps2_engine.attention.csa_schedule import KIND, CsaSchedule
from sps2_engine.collectives import Communicator
from sps2_engine.slices import Slicer
from sps2_kernels import reference
from sps2_layout.layout import exact_layout
from support.csa_cases import ELEMENT_BYTES, HEAD_DIM, PLANS, SCALE, draw
from support.ranks import run_ranks

LSE_BYTES = 4


@pytest.mark.parametrize("schedule", PLANS)
@pytest.mark.parametrize(
    ("held", "num_rest"),
    [
        ([70], 30),
        ([60, 4], 31),
        ([0, 64], 3),
        ([64, 0], 1),
        ([10, 0, 80, 38], 77),
    ],
)
def test_equals_dense_attention(schedule: str, held: list[int], num_rest: int) -> None:
    """The beginning lies on the ranks as it was left there: unevenly, in pieces, on some not at all."""
    num_ranks, num_cached, heads = len(held), sum(held), (6, 2)
    inputs = draw(num_cached + num_rest, *heads)
    plan = PLANS[schedule](exact_layout(num_rest, num_ranks), num_ranks, *heads, HEAD_DIM, ELEMENT_BYTES)
    tokens = [
        torch.cat([torch.arange(one.begin, one.end) for one in plan.spans(rank)]) + num_cached
        for rank in range(num_ranks)
    ]
    cached = CachedKeys(held, [len(own) for own in tokens])

    def on_rank(group: Communicator) -> tuple[torch.Tensor, int, int]:
        agreed = 0

        def end_slice() -> None:
            nonlocal agreed
            agreed += 1
            assert not group.agree(False)

        first = sum(held[: group.rank])
        middle = first + held[group.rank] // 3
        runs = [slice(first, middle), slice(middle, first + held[group.rank])]
        q, k, v = inputs
        slicer = Slicer(2000, end_slice)
        continued = ContinuedSchedule(
            CsaSchedule(plan, group, SCALE, slicer),
            cached,
            lambda _layer: [(k[run], v[run]) for run in runs if run.start < run.stop],
            group,
            SCALE,
            slicer,
        )
        own = tokens[group.rank]
        before = group.bytes_posted[KIND]
        o = continued.attend(0, q[own], k[own], v[own])
        return o, group.bytes_posted[KIND] - before, agreed

    results = run_ranks(num_ranks, on_rank)
    dense, _ = reference.segment_attention(*inputs, 0, SCALE)
    vector = heads[0] * HEAD_DIM * ELEMENT_BYTES
    for rank, (own, (o, posted, _)) in enumerate(zip(tokens, results, strict=True)):
        torch.testing.assert_close(o.double(), dense[own], atol=3e-6, rtol=1e-5)
        counted = cached.sent_bytes(rank, vector, heads[0] * LSE_BYTES)
        assert posted == counted + plan.sent_bytes(rank, 0)
    assert len({agreed for *_, agreed in results}) == 1
    assert results[0][2] > 0
