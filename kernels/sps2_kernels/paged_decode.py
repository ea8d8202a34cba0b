"""Attention of single queries over paged KV: the kernel of decode.

Knows nothing of ranks or requests; a row is a query with a list of runs of cache slots.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from sps2_kernels.merge_states import merge_states
from sps2_kernels.segment_attention import UNMASKED, segment_attention_cpu

SlotRuns = Sequence[tuple[int, int]]
"""Runs [begin, end) of cache slots that hold a row's keys, in any order; empty runs are not allowed."""

PAGE_TOKENS = 64
"""Slots of a page of the Triton form's block table: the engine's KV block."""


class PagedRows:
    """Where the keys of each row of a batch lie; made when the batch changes, grown in place step by step.

    The CPU form reads the runs, as views; the Triton form reads `block_table` and `kv_len`, which are made from the
    runs on first use and kept up to date from then on.
    """

    def __init__(self, runs: Iterable[SlotRuns], device: torch.device) -> None:
        """Takes for each row the runs of slots that it sees; none is legal (kv_len 0). Tables go to `device`."""
        self.device = device
        self._runs = [list(one) for one in runs]
        self._lens = [sum(end - begin for begin, end in one) for one in self._runs]
        self._tables: _Tables | None = None

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def runs(self) -> Sequence[SlotRuns]:
        """For each row the runs of slots that it sees."""
        return self._runs

    @property
    def max_len(self) -> int:
        """Keys of the longest row."""
        return max(self._lens, default=0)

    @property
    def kv_len(self) -> Tensor:
        """Keys of each row, int32 [rows]; changed in place as rows grow."""
        return self._made_tables.kv_len

    @property
    def block_table(self) -> Tensor:
        """Pages of each row in the order of its keys, int32 [rows, max pages or more]; changed in place.

        What lies behind a row's last page is 0.

        Raises:
            ValueError: a run does not begin on a page, or one but the last does not end on one.
        """
        return self._made_tables.block_table

    def append(self, slots: Sequence[int]) -> None:
        """One more key for each row, in the slot given for it; a row whose last key is in that slot stays as it is.

        Raises:
            ValueError: there is not one slot for each row, or (once tables are made) a row's keys are not whole
                pages any more.
        """
        if len(slots) != len(self):
            raise ValueError(f"{len(slots)} slots for {len(self)} rows")
        grown = [row for row, slot in enumerate(slots) if self._grow(self._runs[row], slot)]
        for row in grown:
            self._lens[row] += 1
        if grown and self._tables is not None:
            self._tables = self._tables.grown(self._runs, self._lens, grown)

    @staticmethod
    def _grow(runs: list[tuple[int, int]], slot: int) -> bool:
        begin, end = runs[-1] if runs else (slot, slot)
        if slot == end - 1:
            return False
        if slot == end and runs:
            runs[-1] = (begin, slot + 1)
        else:
            runs.append((slot, slot + 1))
        return True

    @property
    def _made_tables(self) -> "_Tables":
        if self._tables is None:
            self._tables = _Tables.make(self._runs, self._lens, self.device)
        return self._tables


@dataclass(frozen=True)
class _Tables:
    """What the Triton form reads, on its device."""

    block_table: Tensor
    kv_len: Tensor

    @classmethod
    def make(cls, runs: Sequence[SlotRuns], lens: Sequence[int], device: torch.device) -> Self:
        pages = [list(_pages(one)) for one in runs]
        # Room for each row to grow by as much again: what is written in place needs no other table for long.
        table = torch.zeros(len(runs), 2 * max(map(len, pages), default=0) + 1, dtype=torch.int32)
        for row, numbers in enumerate(pages):
            table[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
        return cls(table.to(device), torch.tensor(lens, dtype=torch.int32).to(device))

    def grown(self, runs: Sequence[SlotRuns], lens: Sequence[int], rows: Sequence[int]) -> Self:
        """The tables once each of `rows` has one more key: these ones, changed, unless there is no room."""
        for row in rows:
            begin, end = runs[row][-1]
            if (end - 1) % PAGE_TOKENS and end - 1 > begin:
                continue  # the key lies on the page of the one before it
            pages = list(_pages(runs[row]))
            if len(pages) > self.block_table.shape[1]:
                return self.make(runs, lens, self.block_table.device)
            self.block_table[row, len(pages) - 1] = pages[-1]
        self.kv_len.copy_(torch.tensor(lens, dtype=torch.int32))
        return self


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
