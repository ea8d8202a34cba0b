"""bf16 prefill attention of a CPU without AMX: matrix products by oneDNN around one compiled softmax pass.

Where there is AMX torch's flash operator uses it: 290 to 330 GFLOP/s on a core (head size 64) where tiles do 160 and
the operator in fp32 105 to 118; it falls behind tiles only where it has no AMX.

Tiles of 512 rows, a row being one query of one head (the query heads of a KV head are folded into rows, so that
each key is read once for all of them), and 1,024 keys: the scores of a tile stay in cache. The softmax is the limit,
1.1 to 1.4 G elements/s on a core where the products do 450 to 900 GFLOP/s; with torch's own operators it takes eight
times as long. Hence it is compiled, for two fixed shapes, since another shape would stop for another compilation: full
tiles without a mask, and narrow ones along the diagonal and at the end of the keys with one. Knows nothing of ranks.

Scores and probabilities are rounded to bf16 on their way through the products; maxima, sums and outputs are kept in
fp32. On normal inputs the output differs from fp64 by 0.005 relative (norm of the error by norm of the output).
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from sps2_kernels.cpu_features import has_bf16_products, has_tile_products

ROWS = 512
"""Rows of a tile: 128 queries where four heads share a KV head."""
KEYS = 1024
"""Keys of a full tile. 512 x 1,024 does 160 to 170 GFLOP/s on a core (head size 64), half of it either way 100 to
140: what is fixed for each tile is spread over less; twice as much falls out of cache."""
EDGE_KEYS = 256
"""Keys of a masked tile: narrow, since half of what it computes along the diagonal is thrown away."""

_log = logging.getLogger(__name__)


def has_tiles(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tiles are a form for such inputs: bf16 on a CPU that multiplies it in hardware, but without AMX."""
    on_cpu = dtype == torch.bfloat16 and device.type == "cpu"
    return on_cpu and has_bf16_products() and not has_tile_products()


def use_tiles(q: Tensor, k: Tensor) -> bool:
    """Whether `tiled_attention` is the form for these inputs; the first time it matters it compiles (seconds)."""
    return (
        has_tiles(q.dtype, q.device)
        and len(q) * (q.shape[1] // k.shape[1]) >= ROWS
        and len(k) >= EDGE_KEYS
        and compiled_passes() is not None
    )


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Full attention, or causal with query 0 at key 0, of non-empty bf16 inputs on a CPU.

    Args:
        q: [queries, q_heads, head_dim], any strides.
        k, v: [keys, kv_heads, head_dim], any strides; causal: at least as many as queries, others are not seen.
        causal: whether query i sees keys up to i only.
        scale: factor on the scores.

    Returns:
        o [queries, q_heads, head_dim] bf16, lse [queries, q_heads] fp32, natural log.

    Raises:
        RuntimeError: the softmax pass cannot be compiled here (`compiled_passes` is None).
    """
    passes = compiled_passes()
    if passes is None:
        raise RuntimeError("tiled attention needs a C++ compiler")
    o = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    fold = q.shape[1] // k.shape[1]
    # The mode is part of what is compiled for: one and the same, whatever the caller's.
    with torch.inference_mode():
        tile = _Tile(passes, scale)
        for kv_head in range(k.shape[1]):
            heads = slice(kv_head * fold, (kv_head + 1) * fold)
            o[:, heads], lse[:, heads] = _attend_head(q[:, heads], k[:, kv_head], v[:, kv_head], causal, tile)
    return o, lse


def _attend_head(q: Tensor, k: Tensor, v: Tensor, causal: bool, tile: "_Tile") -> tuple[Tensor, Tensor]:
    """One KV head: q [queries, fold, head_dim], k and v [keys, head_dim] -> o as q, lse [queries, fold]."""
    num_queries, fold, head_dim = q.shape
    rows = _padded(q.reshape(num_queries * fold, head_dim), ROWS)
    keys, values = _padded(k, EDGE_KEYS), _padded(v, EDGE_KEYS)
    # The product reads a transposed tile a third faster than it transposes one, and each is read many times.
    full_keys = keys[: len(keys) // KEYS * KEYS].view(-1, KEYS, head_dim).transpose(1, 2).contiguous()
    o, lse = torch.empty_like(rows), torch.empty(len(rows))
    for begin in range(0, len(rows), ROWS):
        part = slice(begin, begin + ROWS)
        seen = (
            torch.arange(begin, begin + ROWS).div_(fold, rounding_mode="floor").add_(1)
        )  # keys that a row sees
        seen = seen.clamp_(max=len(k)) if causal else seen.fill_(len(k))
        num_shared, num_seen = int(seen[0]), int(seen[-1])
        if causal:
            num_seen = min(num_seen, num_queries)
        tile.begin(head_dim)
        for span, masked in _key_spans(num_shared, num_seen):
            if masked:
                tile.add(rows[part], keys[span].T, values[span], (seen - span.start).float())
            else:
                tile.add(rows[part], full_keys[span.start // KEYS], values[span], None)
        o[part], lse[part] = tile.end()
    num_rows = num_queries * fold
    return o[:num_rows].view(num_queries, fold, head_dim), lse[:num_rows].view(num_queries, fold)


def _key_spans(num_shared: int, num_seen: int) -> Iterator[tuple[slice, bool]]:
    """Full tiles of the keys that every row sees, then masked ones up to the last key that any row sees."""
    full = num_shared // KEYS * KEYS
    for begin in range(0, full, KEYS):
        yield slice(begin, begin + KEYS), False
    for begin in range(full, num_seen, EDGE_KEYS):
        yield slice(begin, begin + EDGE_KEYS), True


class _Tile:
    """The running softmax of 512 rows: m, their largest score, l, the sum of exp(score - m), and o·l."""

    def __init__(self, passes: "Passes", scale: float) -> None:
        self._passes = passes
        self._scale = torch.tensor([scale])
        # One pair of buffers for all tiles, so that they stay in cache. Weights in place of the scores would need
        # half of it, but inductor does not fuse a pass that writes what it reads: it takes four times as long.
        self._scores = {width: torch.empty(ROWS, width, dtype=torch.bfloat16) for width in (KEYS, EDGE_KEYS)}
        self._weights = {width: torch.empty_like(scores) for width, scores in self._scores.items()}
        self._top, self._total = torch.empty(ROWS), torch.empty(ROWS)

    def begin(self, head_dim: int) -> None:
        """New rows, that have seen nothing."""
        self._top.fill_(float("-inf"))
        self._total.zero_()
        self._acc = torch.zeros(ROWS, head_dim)

    def add(self, rows: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> None:
        """The rows [512, head_dim] see more keys, or the first few of them.

        Args:
            rows: [512, head_dim].
            keys: [head_dim, 1,024], or 256 where `visible` is given.
            values: [1,024 or 256, head_dim].
            visible: fp32 [512], the number of keys that each row sees, below 1: none; None: all. In its first
                tile a row sees at least one.
        """
        scores, weights = self._scores[len(values)], self._weights[len(values)]
        torch.mm(rows, keys, out=scores)
        if visible is None:
            faded = self._passes.full(scores, self._scale, self._top, self._total, weights)
        else:
            faded = self._passes.edge(scores, self._scale, self._top, self._total, weights, visible)
        self._acc.mul_(faded.unsqueeze(1)).add_(torch.mm(weights, values))

    def end(self) -> tuple[Tensor, Tensor]:
        """The rows' o [512, head_dim] fp32 and lse [512]."""
        return self._acc / self._total.unsqueeze(1), self._top + self._total.log()


@dataclass(frozen=True)
class Passes:
    """The compiled softmax passes."""

    full: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    edge: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@cache
def compiled_passes() -> Passes | None:
    """The softmax passes, compiled on the first call: seconds, less from inductor's cache.

    None, with a line in the log, where that is impossible: inductor needs a C++ compiler.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # noqa: PLC0415 - a second of imports that fp32 never needs

    full = torch.compile(_full_pass, dynamic=False, fullgraph=True)
    edge = torch.compile(_edge_pass, dynamic=False, fullgraph=True)
    passes = Passes(full, edge)
    rows = torch.zeros(ROWS, 1, dtype=torch.bfloat16)
    keys = torch.zeros(KEYS, 1, dtype=torch.bfloat16)
    try:
        with torch.inference_mode():
            tile = _Tile(passes, 1.0)
            tile.begin(1)
            tile.add(rows, keys.T, keys, None)
            tile.add(rows, keys[:EDGE_KEYS].T, keys[:EDGE_KEYS], torch.zeros(ROWS))
    except BackendCompilerFailed as error:
        _log.warning(
            "no tiled bf16 attention, torch's flash operator instead: %s", str(error).splitlines()[0]
        )
        return None
    return passes


def _full_pass(scores: Tensor, scale: Tensor, top: Tensor, total: Tensor, weights: Tensor) -> Tensor:
    """Scores [rows, keys] bf16, unscaled -> weights [rows, keys] bf16; `top` and `total` [rows] are updated.

    Returns the factor [rows] by which what was summed up before has faded.
    """
    return _update(scores.float() * scale, top, total, weights)


def _edge_pass(
    scores: Tensor, scale: Tensor, top: Tensor, total: Tensor, weights: Tensor, visible: Tensor
) -> Tensor:
    """`_full_pass` where row r sees its first visible[r] keys."""
    keys = torch.arange(scores.shape[1], dtype=torch.float32)
    hidden = keys.unsqueeze(0) >= visible.unsqueeze(1)
    return _update(torch.where(hidden, float("-inf"), scores.float() * scale), top, total, weights)


def _update(scaled: Tensor, top: Tensor, total: Tensor, weights: Tensor) -> Tensor:
    new_top = torch.maximum(top, scaled.amax(dim=1))
    exps = torch.exp(scaled - new_top.unsqueeze(1))
    faded = torch.exp(top - new_top)
    weights.copy_(exps)
    total.mul_(faded).add_(exps.sum(dim=1))
    top.copy_(new_top)
    return faded


def _padded(x: Tensor, multiple: int) -> Tensor:
    """`x` [n, head_dim] contiguous, with rows of zeros up to a multiple: their scores are finite."""
    return functional.pad(x, (0, 0, 0, -len(x) % multiple)).contiguous()
