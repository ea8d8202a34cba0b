"""How fast this rank computes with nothing in its way: the rates that a FLOP floor is counted at."""

import time
from collections.abc import Callable

import torch
from torch.nn import functional

from sps2_bench.prefill.cases import Rates
from sps2_engine.layers.rows import ROW_CHUNK
from sps2_engine.models import ModelConfig
from sps2_kernels.segment_attention import UNMASKED, segment_attention

QUERIES, KEYS = 1024, 8192
"""Long rectangles are what attention is fastest at, and what exact attention of a long prompt mostly is."""
BUDGET_S = 0.5


@torch.inference_mode()
def measure_rates(config: ModelConfig, dtype: torch.dtype) -> Rates:
    """Best rates of a rectangle of attention and of one layer's matrices, in the model's shapes.

    Every thread of this process takes part.
    """
    heads, kv_heads, head_dim = config.num_q_heads, config.num_kv_heads, config.head_dim
    q = torch.randn(QUERIES, heads, head_dim).to(dtype)
    k, v = torch.randn(2, KEYS, kv_heads, head_dim).to(dtype)
    attention_flops = 4 * head_dim * heads * QUERIES * KEYS
    attention_s = _best_s(lambda: segment_attention(q, k, v, UNMASKED, head_dim**-0.5))
    shapes = (
        ((heads + 2 * kv_heads) * head_dim, config.hidden_size),
        (config.hidden_size, heads * head_dim),
        *[(config.intermediate_size, config.hidden_size)] * 2,
        (config.hidden_size, config.intermediate_size),
    )
    pairs = [(torch.randn(ROW_CHUNK, n).to(dtype), torch.randn(m, n).to(dtype)) for m, n in shapes]
    linear_flops = 2 * ROW_CHUNK * sum(m * n for m, n in shapes)
    linear_s = _best_s(lambda: [functional.linear(rows, matrix) for rows, matrix in pairs])
    return Rates(attention_flops / attention_s, linear_flops / linear_s)


def _best_s(work: Callable[[], object]) -> float:
    """Shortest time of a run, of as many as the budget allows; the first one warms up."""
    work()
    best, deadline = float("inf"), time.perf_counter() + BUDGET_S
    while best == float("inf") or time.perf_counter() < deadline:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
