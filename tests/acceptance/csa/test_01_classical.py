"""Must show 1: the tests that catch the classical mistakes (`attention.md`), one line each.

Shown here: 1 to 11 within the attention of one layer, and 11 for whole models on (sp, tp) meshes. `test_01_model` has
12 and 13, `test_01_kernels` 14 and 15.
"""

from collections.abc import Callable
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import torch

from sps2_engine.attention.csa_plan import CsaPlan
from sps2_engine.mesh import Mesh
from sps2_kernels import reference
from sps2_kernels.csa_pack import csa_pack, csa_unpack
from sps2_kernels.merge_states import merge_pair, merge_states
from sps2_kernels.paged_decode import PAGE_TOKENS, PagedRows, paged_decode_partial
from sps2_kernels.segment_attention import UNMASKED, segment_attention
from sps2_layout.layout import Layout, exact_layout
from sps2_layout.profiles import Profile
from support.checkpoints import make_tiny_checkpoint
from support.csa_cases import (
    ELEMENT_BYTES,
    HEAD_DIM,
    PLANS,
    PROFILES,
    SCALE,
    Inputs,
    closed_forms,
    draw,
    oracle,
    run_plan,
)
from support.deployment import DEMO_MODEL
from support.identity import Prompt, book_prompts, byte_prompts
from support.mesh_cases import EXCHANGES, MASKS, MESHES, MODELS, check_mesh, run_model
from support.must_show import MustShow

pytestmark = pytest.mark.acceptance

RANKS = (1, 2, 4, 8)
TINY_CHUNKS = 64


def assert_close(o: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(o.double(), wanted, atol=3e-6, rtol=1e-5)


def run_all(layout: Layout, layer: int, inputs: Inputs) -> list[torch.Tensor]:
    """Outputs by both schedules at every degree that divides the shards; posted bytes are checked on the way."""
    heads, outputs = (inputs[0].shape[1], inputs[1].shape[1]), []
    for kind in PLANS.values():
        for num_ranks in (ranks for ranks in RANKS if layout.num_shards % ranks == 0):
            plan = kind(layout, num_ranks, *heads, HEAD_DIM, ELEMENT_BYTES, TINY_CHUNKS)
            outcome = run_plan(plan, layer, inputs)
            assert outcome.posted == [plan.sent_bytes(rank, layer) for rank in range(num_ranks)]
            outputs.append(outcome.o)
    return outputs


def check_oracle(layout: Layout, layer: int, heads: tuple[int, int]) -> int:
    """All outputs against the mask; returns how many."""
    inputs = draw(layout.num_tokens, *heads)
    outputs, wanted = run_all(layout, layer, inputs), oracle(layout, layer, inputs)
    for o in outputs:
        assert_close(o, wanted)
    return len(outputs)


def strides_of_one_are_dense() -> str:
    count = 0
    for num_shards, heads in ((1, (4, 2)), (2, (14, 2)), (8, (8, 8)), (8, (5, 1))):
        inputs = draw(203, *heads)
        dense, _ = reference.segment_attention(*inputs, 0, SCALE)
        for groups in ((num_shards,), (2, 8))[: 1 + (num_shards == 8)]:
            levels = ((1, 1), *((group, 1) for group in groups if group > 1))
            for o in run_all(Profile(num_shards, levels).resolve(203), 0, inputs):
                assert_close(o, dense)
                count += 1
    return f"{count} runs"


def sparse_is_the_mask() -> str:
    return f"{sum(check_oracle(profile.resolve(310), 3, (8, 2)) for profile in PROFILES.values())} runs"


def constant_values_give_one() -> str:
    layout = PROFILES["two levels, tail, sinks"].resolve(150)
    q, k, v = draw(150, 4, 2)
    inputs = (q, k, torch.ones_like(v))
    copies = [x.clone() for x in inputs]
    outputs = run_all(layout, 2, inputs)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    worst = max(float((o - 1).abs().max()) for o in outputs)
    assert worst < 1e-5
    states = [torch.randn(3, 9, 4, 8), torch.randn(3, 9, 4)]
    copies = [x.clone() for x in states]
    merge_states(*states)
    merge_pair(states[0][0], states[1][0], states[0][1], states[1][1])
    assert all(torch.equal(x, copy) for x, copy in zip(states, copies, strict=True))
    return f"off by {worst:.0e}; no input of attention or of a merge changed"


def the_past_ignores_the_future() -> str:
    layout, inputs = PROFILES["two levels, tail, sinks"].resolve(150), draw(150, 4, 2)
    before = run_all(layout, 1, inputs)
    for x in inputs:
        x[99] += 1.0
    after = run_all(layout, 1, inputs)
    assert all(torch.equal(one[:99], other[:99]) for one, other in zip(before, after, strict=True))
    return f"bit-equal in {len(before)} runs"


def extremes_stay_finite() -> str:
    layout = PROFILES["two levels, tail, sinks"].resolve(150)
    q, k, v = draw(150, 4, 2)
    assert all(bool(o.isfinite().all()) for o in run_all(layout, 0, (q * 1e4, k, v)))
    keys, values = torch.ones(70_000, 1, HEAD_DIM), torch.ones(70_000, 1, HEAD_DIM)
    o, lse = segment_attention(torch.ones(1, 1, HEAD_DIM), keys, values, UNMASKED, SCALE)
    torch.testing.assert_close(o, torch.ones_like(o))
    torch.testing.assert_close(lse, torch.full_like(lse, 70_000.0).log() + HEAD_DIM * SCALE)
    return "scores of 1e4, 70,000 equal keys"


def merging_is_a_sum() -> str:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (
        (torch.randn(9, 4, 8, generator=generator), torch.randn(9, 4, generator=generator)) for _ in range(3)
    )
    empty = torch.zeros(9, 4, 8), torch.full((9, 4), float("-inf"))
    for one, other in (
        (merge_pair(*merge_pair(*a, *b), *c), merge_pair(*a, *merge_pair(*b, *c))),
        (merge_pair(*a, *b), merge_pair(*b, *a)),
        (merge_pair(*a, *empty), a),
        (merge_pair(*empty, *a), a),
        (merge_pair(*empty, *empty), empty),
    ):
        torch.testing.assert_close(one, other)
    o, lse = (torch.stack(parts) for parts in zip(a, b, c, empty, strict=True))
    orders = list(permutations(range(4)))
    for order in orders:
        torch.testing.assert_close(merge_states(o[list(order)], lse[list(order)]), merge_states(o, lse))
    return f"associative, the same in {len(orders)} orders, -inf is the identity"


def ragged_prompts() -> str:
    count = 0
    for num_tokens in (1, 5, 8, 63, 65, 129):
        for name in ("exact", "paper", "two levels, tail, sinks", "long tail, long sinks"):
            count += check_oracle(PROFILES[name].resolve(num_tokens), 1, (4, 2))
    lengths = (0, 1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 3 * PAGE_TOKENS)
    check_kv_lengths(lengths)
    return f"{count} runs from 1 token on; decode over {', '.join(map(str, lengths))} keys"


def check_kv_lengths(lengths: tuple[int, ...]) -> None:
    """Decode of a row for each number of keys, in blocks that do not begin at the cache's first."""
    (q, _, _), (_, k, v) = draw(len(lengths), 4, 2), draw(5 * PAGE_TOKENS, 4, 2)
    runs = tuple([(PAGE_TOKENS, PAGE_TOKENS + length)] if length else [] for length in lengths)
    slots = [[slot for begin, end in row for slot in range(begin, end)] for row in runs]
    o, lse = paged_decode_partial(q, k, v, PagedRows(runs, q.device), SCALE)
    wanted_o, wanted_lse = reference.paged_decode_partial(q, k, v, slots, SCALE)
    assert_close(o, wanted_o)
    assert_close(lse, wanted_lse)


def few_kv_heads() -> str:
    layout = Profile(8, ((1, 1), (8, 8)), tail=4).resolve(260)
    return f"{sum(check_oracle(layout, 5, heads) for heads in ((4, 1), (8, 2), (1, 1), (14, 2)))} runs"


def nothing_stale_is_read() -> str:
    """Uninitialised memory is filled with NaN: one element that is read before it is written would show."""
    torch.use_deterministic_algorithms(mode=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined,unused-ignore]
        assert bool(torch.empty(8).isnan().all())
        count = check_oracle(PROFILES["two levels, tail, sinks"].resolve(150), 2, (14, 2))
        there_and_back()
    finally:
        torch.use_deterministic_algorithms(mode=False)
    return f"pack then unpack is identity; {count} runs with canaries in every buffer"


def there_and_back() -> None:
    """Dilated planes packed and unpacked: what they cover is the same, what they do not stays a canary."""
    q, k, _ = draw(37, 4, 2)

    def planes(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        return [q[3::8, 1:3], k[1::4, 1:], q[:0], k[:1, :1]]

    packed = torch.empty(sum(plane.numel() for plane in planes(q, k)))
    csa_pack(planes(q, k), packed)
    assert bool(packed.isfinite().all())
    other_q, other_k = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan)
    csa_unpack(packed, planes(other_q, other_k))
    for found, meant in zip(planes(other_q, other_k), planes(q, k), strict=True):
        assert torch.equal(found, meant)
    covered = int(other_q.isfinite().sum() + other_k.isfinite().sum())
    assert covered == packed.numel(), "an element outside the planes was written"


def bytes_are_counted() -> str:
    layout = Profile(8, ((1, 1), (2, 2), (8, 4))).resolve(8 * 4 * 16)
    posted = []
    for num_ranks in RANKS:
        plan = CsaPlan(layout, num_ranks, 8, 2, HEAD_DIM, ELEMENT_BYTES)
        posted.append(sum(run_plan(plan, 0, draw(layout.num_tokens, 8, 2)).posted))
        assert posted[-1] == plan.bytes_per_layer()
        _, moved = closed_forms(plan)
        assert posted[-1] == pytest.approx(moved * num_ranks, rel=1e-12)
    return f"posted {posted} at {RANKS} ranks = counted = the closed form"


def every_degree_is_the_same() -> str:
    worst = 0.0
    for profile in (*PROFILES.values(), Profile(8, ((1, 1), (8, 8)), dense_queries=True)):
        layout = profile.resolve(500)
        outputs = run_all(layout, 0, draw(500, 8, 2))
        worst = max(worst, *(float((a - b).abs().max()) for a, b in pairwise(outputs)))
    assert worst < 1e-5
    assert exact_layout(500, 3).is_exact
    return f"P = 1, 2, 4, 8 by heads and kv differ by {worst:.0e} at most"


TESTS: tuple[Callable[[], str], ...] = (
    strides_of_one_are_dense,
    sparse_is_the_mask,
    constant_values_give_one,
    the_past_ignores_the_future,
    extremes_stay_finite,
    merging_is_a_sum,
    ragged_prompts,
    few_kv_heads,
    nothing_stale_is_read,
    bytes_are_counted,
    every_degree_is_the_same,
)


@pytest.mark.parametrize("number", range(1, len(TESTS) + 1))
def test_classical(must_show: MustShow, number: int) -> None:
    test = TESTS[number - 1]
    with must_show(f"1.{number} {test.__name__.replace('_', ' ')}") as figures:
        figures.append(test())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Prompt]]:
    """Every kind of tiny checkpoint with a short prompt, and the demo model with a long one."""
    (short,) = byte_prompts([310])
    tiny = [
        (make_tiny_checkpoint(tmp_path_factory.mktemp("model"), family, **overrides), short)
        for family, overrides in MODELS.values()
    ]
    return [*tiny, (DEMO_MODEL, book_prompts([4_000])[0])]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh.sp}x{mesh.tp}")
def test_meshes(must_show: MustShow, models: list[tuple[Path, Prompt]], mesh: Mesh) -> None:
    with must_show(f"1.11 whole models on (sp, tp) = ({mesh.sp}, {mesh.tp})") as figures:
        results = [
            check_mesh(folder, mesh, mask, prompt, run_model(folder, mesh, mask, prompt, exchange))
            for folder, prompt in models
            for mask in MASKS
            for exchange in (EXCHANGES if mesh.sp > 1 else EXCHANGES[:1])
        ]
        figures.append(f"{len(results)} runs of {len(models)} models under {len(MASKS)} masks")
        figures.append(f"{sum(result.num_tokens for result in results):,} greedy tokens as in one process")
        figures.append(f"logits differ by {max(result.worst for result in results):.0e} at most")
        figures.append("posted bytes are the counted ones on every rank")
