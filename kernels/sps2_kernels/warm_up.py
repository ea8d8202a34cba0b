"""Runs every kernel that a model's shape needs once, on tiny tensors, so that no request pays for its compilation.

A rank calls it before it reports ready. On a GPU this compiles (or loads from triton's cache) each key that
`triton_forms.keys.model_keys` lists; on a CPU it touches the operators that initialise themselves lazily.
"""

import torch
from torch import Tensor

from sps2_kernels.csa_pack import csa_pack, csa_unpack
from sps2_kernels.merge_states import SampledState, merge_sampled, merge_states
from sps2_kernels.paged_decode import PAGE_TOKENS, PagedRows, paged_decode_partial
from sps2_kernels.rope_append import rope_append
from sps2_kernels.segment_attention import UNMASKED, segment_attention
from sps2_kernels.shape import KernelShape

LONG_ROW_PAGES = 1024 // PAGE_TOKENS
"""Pages of a row that is long enough to be cut into splits, whose outputs are fp32."""


def warm_up(shape: KernelShape, device: torch.device) -> None:
    """Calls each family as the engine does.

    Args:
        shape: the model's, on this rank.
        device: where the engine computes; a GPU is waited for.

    Raises:
        KeyError: no kernel configuration for the shape (GPU).
    """
    _prefill(shape, device)
    _decode(shape, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _zeros(shape: KernelShape, device: torch.device, rows: int, heads: int) -> Tensor:
    return torch.zeros(rows, heads, shape.head_dim, dtype=shape.dtype, device=device)


def _prefill(shape: KernelShape, device: torch.device) -> None:
    """Rotation, exchange and merge of a few tokens."""
    q = _zeros(shape, device, 4, shape.num_q_heads)
    k, v = (_zeros(shape, device, 4, shape.num_kv_heads) for _ in range(2))
    k_cache, v_cache = (_zeros(shape, device, PAGE_TOKENS, shape.num_kv_heads) for _ in range(2))
    angles = torch.zeros(4, shape.head_dim // 2, dtype=shape.dtype, device=device)
    q = rope_append(q, k, v, angles, angles, k_cache, v_cache, torch.arange(4, device=device))
    planes = [q[::2], k[::2], v[::2]]
    packed = torch.empty(sum(plane.numel() for plane in planes), dtype=shape.dtype, device=device)
    csa_pack(planes, packed)
    csa_unpack(packed, planes)
    o, lse = segment_attention(q, k, v, 0, 1.0)
    sampled = SampledState(*segment_attention(q[::2], k[::2], v[::2], UNMASKED, 1.0), 0, 2, 0)
    merge_sampled(o, lse, [sampled])
    merge_states(torch.stack([o, o]), torch.stack([lse, lse]))


def _decode(shape: KernelShape, device: torch.device) -> None:
    """A short row, whose output is final at once, and a long one, whose splits are merged."""
    q = _zeros(shape, device, 1, shape.num_q_heads)
    for num_pages in (1, LONG_ROW_PAGES):
        k_cache, v_cache = (
            _zeros(shape, device, num_pages * PAGE_TOKENS, shape.num_kv_heads) for _ in range(2)
        )
        rows = PagedRows((((0, num_pages * PAGE_TOKENS),),), device)
        paged_decode_partial(q, k_cache, v_cache, rows, 1.0)
