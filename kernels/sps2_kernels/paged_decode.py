"""Attention of single queries over paged KV: the kernel of decode.

Knows nothing of ranks or requests; a row is a query with a list of runs of cache slots.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from sps2_kernels.merge_states import merge_states
from sps2_kernels.segment_attention import UNMASKED, segment_attention_cpu

SlotRuns = Sequence[tuple[int, int]]
"""Runs [begin, end) of cache slots that hold a row's keys, in any order; empty runs are not allowed."""

PAGE_TOKENS = 64
"""Slots of a page of the Triton form's block table: the engine's KV block."""


@dataclass(frozen=True)
class PagedRows:
    """Where the keys of each row of a batch lie; made once for a step and used by all its layers.

    The CPU form reads the runs, as views; the Triton form reads `block_table` and `kv_len`, which are made from the
    runs on first use.
    """

    runs: tuple[SlotRuns, ...]
    """For each row the runs of slots that it sees; none is legal (kv_len 0)."""
    device: torch.device
    """Where the tables go."""

    def __len__(self) -> int:
        return len(self.runs)

    @cached_property
    def max_len(self) -> int:
        """Keys of the longest row."""
        return max((_num_slots(runs) for runs in self.runs), default=0)

    @cached_property
    def kv_len(self) -> Tensor:
        """Keys of each row, int32 [rows]."""
        return torch.tensor([_num_slots(runs) for runs in self.runs], dtype=torch.int32).to(self.device)

    @cached_property
    def block_table(self) -> Tensor:
        """Pages of each row in the order of its keys, int32 [rows, max pages]; 0 behind a row's last page.

        Raises:
            ValueError: a run does not begin on a page, or one but the last does not end on one.
        """
        pages = [torch.tensor(list(_pages(runs)), dtype=torch.int32) for runs in self.runs]
        if not pages:
            return torch.zeros(0, 1, dtype=torch.int32, device=self.device)
        return torch.nn.utils.rnn.pad_sequence(pages, batch_first=True).to(self.device)


def _num_slots(runs: SlotRuns) -> int:
    return sum(end - begin for begin, end in runs)


def _pages(runs: SlotRuns) -> Iterator[int]:
    if any(begin % PAGE_TOKENS for begin, _ in runs) or any(
        left[1] % PAGE_TOKENS for left, _ in pairwise(runs)
    ):
        raise ValueError(
            f"runs {runs} are not whole pages of {PAGE_TOKENS} slots, but for the last one's end"
        )
    for begin, end in runs:
        yield from range(begin // PAGE_TOKENS, -(-end // PAGE_TOKENS))


def paged_decode_partial(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PagedRows, scale: float
) -> tuple[Tensor, Tensor]:
    """Partial attention of each row's query over the keys that lie in this rank's cache.

    CUDA tensors go to the Triton form, all others to the CPU form.

    Args:
        q: [rows, q_heads, head_dim], contiguous.
        k_cache, v_cache: [slots, kv_heads, head_dim], one layer of the arena, contiguous.
        rows: what each row sees.
        scale: factor on the scores, > 0.

    Returns:
        o [rows, q_heads, head_dim] in q's dtype and lse [rows, q_heads] fp32; a row without keys has
        o = 0, lse = -inf.

    Raises:
        ValueError: there is not one entry of `rows` for each query, or (Triton form) runs are not whole pages.
    """
    if len(rows) != len(q):
        raise ValueError(f"{len(q)} queries, but slots of {len(rows)} rows")
    if q.is_cuda:
        from sps2_kernels.triton_forms import paged_decode as form  # noqa: PLC0415 - see there

        return form.paged_decode_partial(q, k_cache, v_cache, rows, scale)
    return paged_decode_partial_cpu(q, k_cache, v_cache, rows, scale)


def paged_decode_partial_cpu(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PagedRows, scale: float
) -> tuple[Tensor, Tensor]:
    """CPU form of `paged_decode_partial`: one call of the flash operator for each run of each row."""
    o = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    for row, runs in enumerate(rows.runs):
        if runs:
            o[row], lse[row] = _attend_row(q[row], k_cache, v_cache, runs, scale)
    return o, lse


def _attend_row(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, runs: SlotRuns, scale: float
) -> tuple[Tensor, Tensor]:
    """One query [q_heads, head_dim] over its runs.

    The query heads of a KV head are folded into rows, so that
    each key and value is read once for all of them, and a run is a view: nothing is gathered.
    """
    num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    folded = q.view(num_kv_heads, num_q_heads // num_kv_heads, head_dim).transpose(
        0, 1
    )  # [fold, kv_heads, d]
    parts = [
        segment_attention_cpu(folded, k_cache[begin:end], v_cache[begin:end], UNMASKED, scale)
        for begin, end in runs
    ]
    if len(parts) == 1:
        o, lse = parts[0]
    else:
        o, lse = merge_states(torch.stack([o for o, _ in parts]), torch.stack([lse for _, lse in parts]))
    return o.transpose(0, 1).reshape(num_q_heads, head_dim), lse.transpose(0, 1).reshape(num_q_heads)
