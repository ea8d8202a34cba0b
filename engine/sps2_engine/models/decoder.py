"""The generic decoder: every served family is this one, with or without biases and norms on q and k.

Knows nothing about batches, requests or caches: rows are tokens, and what a token attends to is the caller's
(`Attend`). Row-wise work on long prompts runs in chunks, so that besides the hidden states only q, k, v and
the output of attention ever exist for all tokens at once.

A tensor rank holds its heads, its columns of the feed-forward blocks and its rows of the vocabulary; hidden states
are whole on every rank, summed twice in each layer. A rank alone holds everything and sums nothing.
"""

from typing import Protocol

import torch
from torch import Tensor

from sps2_engine.layers.embedding import Vocabulary
from sps2_engine.layers.linear import Linear
from sps2_engine.layers.mlp import SwiGLU
from sps2_engine.layers.rms_norm import RMSNorm
from sps2_engine.layers.rope import RotaryEmbedding, Rotation
from sps2_engine.layers.rows import BYTE_FLOPS, RowWalk, row_chunks
from sps2_engine.layers.tensor_ranks import ALONE, TensorRanks
from sps2_engine.mesh import WHOLE_MODEL, Part, TensorShare
from sps2_engine.models.config import ModelConfig
from sps2_engine.weights import WeightSource


class Attend(Protocol):
    """Attention as the workers provide it. Called once per layer and forward, in the order of layers."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Takes q [tokens, num_q_heads, head_dim], k and v [tokens, num_kv_heads, head_dim]: the rank's heads.

        q and k are rotated. All three are in the dtype of the weights, contiguous, fresh for each layer and
        the callee's to keep or change: the decoder drops them when this returns. Returns
        o [tokens, num_q_heads, head_dim], in their dtype or a wider one.
        """
        ...


class SelfAttention:
    """x += o_proj(attend(rope(q), rope(k), v)), with q, k, v projected from norm(x)."""

    def __init__(self, config: ModelConfig, layer: int, source: WeightSource, share: TensorShare) -> None:
        self.layer = layer
        q_heads, kv_heads = share.q_heads(config.num_q_heads), share.kv_heads(config.num_kv_heads)
        self.num_heads = [len(q_heads), len(kv_heads), len(kv_heads)]
        self.head_dim = config.head_dim
        name, eps = f"model.layers.{layer}", config.rms_norm_eps
        hidden, q_size, kv_size = (
            Part.all(config.hidden_size),
            q_heads.times(config.head_dim),
            kv_heads.times(config.head_dim),
        )
        qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        qkv = {f"{name}.self_attn.{part}": size for part, size in qkv.items()}
        self.norm = RMSNorm(source, f"{name}.input_layernorm", config.hidden_size, eps)
        self.qkv = Linear.load(source, qkv, hidden, bias=config.qkv_bias)
        self.qk_norms: tuple[RMSNorm, RMSNorm] | None = None
        if config.qk_norm:
            self.qk_norms = (
                RMSNorm(source, f"{name}.self_attn.q_norm", config.head_dim, eps),
                RMSNorm(source, f"{name}.self_attn.k_norm", config.head_dim, eps),
            )
        o_proj = {f"{name}.self_attn.o_proj": hidden}
        self.output = Linear.load(source, o_proj, q_size, bias=config.o_bias)

    def add_to(
        self, x: Tensor, rotation: Rotation, attend: Attend, walk: RowWalk, ranks: TensorRanks
    ) -> None:
        """Adds the block's output to the hidden states `x` [tokens, hidden], in place."""
        q, k, v = self._project(x, rotation, walk)
        o = attend(self.layer, q, k, v)
        del q, k, v
        o = o.flatten(1)  # [tokens, num_q_heads * head_dim]
        for rows in walk(len(x), self.output.flops_per_row):
            self.output.add_to(x[rows], o[rows], ranks)

    @property
    def flops_per_row(self) -> int:
        """FLOPs of one row's products, attention itself left out."""
        return self.qkv.flops_per_row + self.output.flops_per_row

    def pack(self) -> None:
        """See `Decoder.pack`."""
        self.qkv.pack()
        self.output.pack()

    def _project(self, x: Tensor, rotation: Rotation, walk: RowWalk) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.qkv.weight.dtype
        q, k, v = (x.new_empty(len(x), heads, self.head_dim, dtype=dtype) for heads in self.num_heads)
        for rows in walk(len(x), self.qkv.flops_per_row):
            qkv = self.qkv(self.norm(x[rows]))
            if self.qk_norms is None:
                rotation.split(qkv, rows, q[rows], k[rows], v[rows])
                continue
            # [chunk, q + k + v heads, head_dim]
            new_q, new_k, new_v = torch.split(qkv.view(len(qkv), -1, self.head_dim), self.num_heads, dim=1)
            q_norm, k_norm = self.qk_norms
            rotation.write(q_norm(new_q), rows, out=q[rows])
            rotation.write(k_norm(new_k), rows, out=k[rows])
            v[rows] = new_v
        return q, k, v


class FeedForward:
    """x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, source: WeightSource, share: TensorShare) -> None:
        name = f"model.layers.{layer}"
        norm = f"{name}.post_attention_layernorm"
        self.norm = RMSNorm(source, norm, config.hidden_size, config.rms_norm_eps)
        columns = share.columns(config.intermediate_size)
        self.mlp = SwiGLU(source, f"{name}.mlp", config.hidden_size, columns, bias=config.mlp_bias)

    def add_to(self, x: Tensor, walk: RowWalk, ranks: TensorRanks) -> None:
        """Adds the block's output to the hidden states `x` [tokens, hidden], in place."""
        for rows in walk(len(x), self.mlp.flops_per_row):
            self.mlp.add_to(x[rows], self.norm(x[rows]), ranks)

    def pack(self) -> None:
        """See `Decoder.pack`."""
        self.mlp.pack()


class Decoder:
    """Token ids in, hidden states and logits out. Every rank of a group holds one.

    Results are inference tensors: outside `torch.inference_mode` they can be read, not changed in place.

    Args:
        config: the model's shape.
        source: where its tensors come from; also fixes dtype and device.
        share: what a tensor rank holds of it.

    Raises:
        CheckpointError: if the source lacks a tensor or has it in another shape.
        ValueError: the model cannot be split so.
    """

    def __init__(self, config: ModelConfig, source: WeightSource, share: TensorShare = WHOLE_MODEL) -> None:
        self.config = config
        self.share = share
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, source.dtype, source.device)
        self._vocabulary = Vocabulary(
            source, config.vocab_size, config.hidden_size, share, tied=config.tie_embeddings
        )
        self._layers = [
            (SelfAttention(config, layer, source, share), FeedForward(config, layer, source, share))
            for layer in range(config.num_layers)
        ]
        self._norm = RMSNorm(source, "model.norm", config.hidden_size, config.rms_norm_eps)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        walk: RowWalk = row_chunks,
        ranks: TensorRanks = ALONE,
    ) -> Tensor:
        """Runs all layers.

        Args:
            token_ids: [tokens] int64, below vocab_size; may be empty, `attend` is called all the same.
            positions: [tokens] int64, each token's place in its own text.
            attend: attention of these tokens, of the heads that are held.
            walk: how row-wise work is cut, alike on all tensor ranks; what it raises between two chunks ends the
                forward.
            ranks: those among whom the model is split; they take the same tokens.

        Returns:
            Hidden states [tokens, hidden] in fp32 or wider, the final norm applied.

        Raises:
            GroupError: a tensor rank died.
        """
        self._check(ranks)
        x = torch.empty(
            len(token_ids), self.config.hidden_size, dtype=self._norm.weight.dtype, device=token_ids.device
        )
        row_flops = BYTE_FLOPS * self.config.hidden_size * x.element_size()
        for rows in walk(len(x), row_flops):
            x[rows] = self._vocabulary.embed(token_ids[rows], ranks)
        rotation = self._rotary(positions)
        for attention, feed_forward in self._layers:
            attention.add_to(x, rotation, attend, walk, ranks)
            feed_forward.add_to(x, walk, ranks)
        for rows in walk(len(x), row_flops):
            x[rows] = self._norm(x[rows])
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor, ranks: TensorRanks = ALONE) -> Tensor:
        """Hidden states [n, hidden] of `forward` -> fp32 [n, vocab], on every tensor rank; meant for few rows.

        Raises:
            GroupError: a tensor rank died.
        """
        self._check(ranks)
        return self._vocabulary.logits(hidden, ranks)

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one token's products in all layers, of what is held; attention itself and the logits left out."""
        return sum(attention.flops_per_row + forward.mlp.flops_per_row for attention, forward in self._layers)

    def pack(self) -> None:
        """Makes the weights' form for few rows besides their own (`few_rows`): for a rank that decodes."""
        for attention, feed_forward in self._layers:
            attention.pack()
            feed_forward.pack()
        self._vocabulary.head.pack()

    def _check(self, ranks: TensorRanks) -> None:
        if ranks.size != self.share.tp:
            raise ValueError(f"a model split {self.share.tp} ways was given {ranks.size} tensor ranks")
