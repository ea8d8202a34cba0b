"""What SPS2 does not do, to price it: each step and layer every holder sends its KV to the row's home.

Has the face of `QExchange`; for benchmarks only.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sps2_engine.attention.decode_plan import DecodePlan, DecodeRow
from sps2_engine.attention.q_exchange import LayerCache
from sps2_engine.collectives import Communicator
from sps2_kernels.merge_states import merge_into
from sps2_kernels.paged_decode import PagedRows, SlotRuns, paged_decode_partial

KIND = "kv_move"
"""Name of the byte counter."""


class KvMover:
    """Attention of a fixed set of rows on one rank, all keys brought home."""

    def __init__(
        self,
        plan: DecodePlan,
        communicator: Communicator,
        scale: float,
        cache: LayerCache,
        runs: Mapping[int, SlotRuns],
        num_held: Sequence[int],
    ) -> None:
        """See `QExchange`; `num_held` has the tokens of each row on each rank before the first step."""
        self._communicator = communicator
        self._scale = scale
        rank, ranks = communicator.rank, range(plan.num_ranks)
        self.home_rows = plan.at_home(rank)
        self._home_kv = PagedRows([runs[row.row_id] for row in self.home_rows], cache.k.device)
        self._new_slots = torch.zeros(len(self.home_rows), dtype=torch.int64)
        slots = [
            slot for peer in ranks for row in plan.guests(peer, rank) for slot in _slots(runs[row.row_id])
        ]
        self._sent_slots = torch.tensor(slots, dtype=torch.int64)
        token = cache.k[0].numel() * cache.k.element_size()
        self._sent = [2 * token * num_held[rank] * len(plan.guests(peer, rank)) for peer in ranks]
        self._received = [2 * token * num_held[peer] * len(plan.guests(rank, peer)) for peer in ranks]
        self._arrivals = [_Arrival(self.home_rows, plan.guests(rank, peer), num_held[peer]) for peer in ranks]

    def begin_step(self, new_slots: Sequence[int]) -> None:
        """See `QExchange.begin_step`."""
        self._home_kv.append(new_slots)
        self._new_slots.copy_(torch.tensor(new_slots, dtype=torch.int64))

    def attend(self, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `QExchange.attend`."""
        cache.k.index_copy_(0, self._new_slots, k)
        cache.v.index_copy_(0, self._new_slots, v)
        # [tokens, k and v, kv_heads, head_dim]: each peer's part in one piece.
        packed = torch.stack((cache.k[self._sent_slots], cache.v[self._sent_slots]), dim=1)
        raw = packed.view(-1).view(torch.uint8)
        pending = self._communicator.all_to_all(raw, self._sent, self._received, KIND)
        o, lse = paged_decode_partial(q, cache.k, cache.v, self._home_kv, self._scale)
        received = pending.wait().view(cache.k.dtype).view(-1, 2, *cache.k.shape[1:])
        first = 0
        for arrival in self._arrivals:
            for row in arrival.places:
                part = received[first : first + arrival.num_tokens]
                first += arrival.num_tokens
                part_k, part_v = part[:, 0].contiguous(), part[:, 1].contiguous()
                keys = PagedRows([[(0, len(part))]], part.device)
                part_o, part_lse = paged_decode_partial(q[row : row + 1], part_k, part_v, keys, self._scale)
                merge_into(o[row : row + 1], lse[row : row + 1], part_o, part_lse)
        return o


class _Arrival:
    """What one peer sends: the keys of which home rows, and how many of each."""

    def __init__(self, home_rows: Sequence[DecodeRow], rows: Sequence[DecodeRow], num_tokens: int) -> None:
        self.places = [home_rows.index(row) for row in rows]
        self.num_tokens = num_tokens


def _slots(runs: SlotRuns) -> list[int]:
    return [slot for begin, end in runs for slot in range(begin, end)]
