"""Attention of texts that go on from one computed prompt: its last tokens, then generated or given ones.

Many texts share the prompt's KV. A text's first tokens belong to the prompt and see what the layout lets them
see; those after the prompt are dense queries over everything, as in decode.
"""

import torch
from torch import Tensor

from sps2_bench.csa import Layout
from sps2_kernels.merge_states import merge_pair
from sps2_kernels.segment_attention import UNMASKED, segment_attention

KvLayers = list[tuple[Tensor, Tensor]]
"""k and v [tokens, kv_heads, head_dim] of each layer."""


def visible_keys(layout: Layout, layer: int, kv_head: int, queries: Tensor, keys: Tensor) -> Tensor:
    """The mask of `attention.md` for some queries and keys: bool [queries, keys].

    Args:
        layout: of the prompt.
        layer: index of the layer.
        kv_head: the KV head; its query heads see alike.
        queries: [queries] int64 positions.
        keys: [keys] int64 positions.
    """
    i, j = queries[:, None], keys[None, :]
    shard_i, shard_j = i // layout.shard_tokens, j // layout.shard_tokens
    mask = (shard_i == shard_j) | (j < layout.sinks) | (i >= layout.num_tokens - layout.tail)
    for index in range(1, len(layout.levels)):
        level, lower = layout.levels[index], layout.levels[index - 1]
        offset = layout.offset(index, kv_head, layer)
        at_level = (shard_i // level.group == shard_j // level.group) & (
            shard_i // lower.group != shard_j // lower.group
        )
        sampled = j % level.stride == offset
        if not layout.dense_queries:
            sampled = sampled & (i % level.stride == offset)
        mask |= at_level & sampled
    return mask & (j <= i)


class SuffixAttention:
    """Attention (`sps2_engine.models.Attend`) of several texts of one length, one after another.

    Args:
        layout: of the whole prompt, S tokens.
        kv: of its first tokens, all but the last `prompt_rows`, which must lie in its last shard with others.
        prompt_rows: tokens of each text that belong to the prompt.
        num_texts: texts, each of the same number of tokens.

    Raises:
        ValueError: the prompt's part of the texts is a whole shard or more.
    """

    def __init__(self, layout: Layout, kv: KvLayers, prompt_rows: int, num_texts: int) -> None:
        first = layout.num_tokens - prompt_rows
        if first % layout.shard_tokens == 0 or first // layout.shard_tokens != (
            (layout.num_tokens - 1) // layout.shard_tokens
        ):
            raise ValueError(f"the last {prompt_rows} of {layout.num_tokens} tokens fill a shard")
        self._layout = layout
        self._kv = kv
        self._prompt_rows = prompt_rows
        self._num_texts = num_texts
        self._queries = torch.arange(first, layout.num_tokens)
        self._keys = torch.arange(first)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`; q [texts * tokens, q_heads, head_dim]."""
        scale = q.shape[-1] ** -0.5
        keys, values = self._kv[layer]
        texts = q.view(self._num_texts, -1, *q.shape[1:])  # [texts, tokens, q_heads, head_dim]
        inside, beyond = texts[:, : self._prompt_rows], texts[:, self._prompt_rows :]
        o_inside, lse_inside = self._masked(layer, inside, keys, values, scale)
        flat = beyond.reshape(-1, *q.shape[1:])
        o_beyond, lse_beyond = segment_attention(flat, keys, values, UNMASKED, scale)
        o = torch.cat([o_inside, o_beyond.view(beyond.shape)], dim=1)
        lse = torch.cat([lse_inside, lse_beyond.view(beyond.shape[:3])], dim=1)
        own = [
            segment_attention(q_one, k_one, v_one, 0, scale)
            for q_one, k_one, v_one in zip(*(x.chunk(self._num_texts) for x in (q, k, v)), strict=True)
        ]
        own_o, own_lse = (torch.cat(parts) for parts in zip(*own, strict=True))
        return merge_pair(o.view(q.shape), lse.view(q.shape[:2]), own_o, own_lse)[0]

    def _masked(
        self, layer: int, q: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Softmax over what the layout shows: o [texts, rows, q_heads, head_dim], lse [texts, rows, q_heads].

        A few rows, so whole score matrices are cheap; no row is blind, for each sees its own shard's begin.
        """
        fold = q.shape[2] // keys.shape[1]
        outputs, lses = [], []
        for kv_head in range(keys.shape[1]):
            mask = visible_keys(self._layout, layer, kv_head, self._queries, self._keys)  # [rows, keys]
            heads = q[:, :, kv_head * fold : (kv_head + 1) * fold]
            scores = torch.einsum("trhd,kd->trhk", heads, keys[:, kv_head]) * scale
            scores.masked_fill_(~mask[None, :, None], float("-inf"))
            lses.append(scores.logsumexp(dim=-1))
            outputs.append(torch.einsum("trhk,kd->trhd", scores.softmax(dim=-1), values[:, kv_head]))
        return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)
