"""The generic decoder: every served family is this one, with or without biases and norms on q and k.

Knows nothing about batches, requests or caches: rows are tokens, and what a token attends to is the caller's
(`Attend`). Row-wise work on long prompts runs in chunks, so that besides the hidden states only q, k, v and
the output of attention ever exist for all tokens at once.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sps2_engine.layers.linear import Linear
from sps2_engine.layers.mlp import SwiGLU
from sps2_engine.layers.rms_norm import RMSNorm
from sps2_engine.layers.rope import RotaryEmbedding, Rotation
from sps2_engine.layers.rows import BYTE_FLOPS, RowWalk, row_chunks
from sps2_engine.models.config import ModelConfig
from sps2_engine.weights import WeightSource, table_dtype


class Attend(Protocol):
    """Attention as the workers provide it. Called once per layer and forward, in the order of layers."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Takes q [tokens, num_q_heads, head_dim], k and v [tokens, num_kv_heads, head_dim].

        q and k are rotated. All three are in the dtype of the weights, contiguous, fresh for each layer and
        the callee's to keep or change: the decoder drops them when this returns. Returns
        o [tokens, num_q_heads, head_dim], in their dtype or a wider one.
        """
        ...


class SelfAttention:
    """x += o_proj(attend(rope(q), rope(k), v)), with q, k, v projected from norm(x)."""

    def __init__(self, config: ModelConfig, layer: int, source: WeightSource) -> None:
        self.layer = layer
        self.num_heads = [config.num_q_heads, config.num_kv_heads, config.num_kv_heads]
        self.head_dim = config.head_dim
        name, eps = f"model.layers.{layer}", config.rms_norm_eps
        q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        qkv = {f"{name}.self_attn.{part}": size for part, size in qkv.items()}
        self.norm = RMSNorm(source, f"{name}.input_layernorm", config.hidden_size, eps)
        self.qkv = Linear.load(source, qkv, config.hidden_size, bias=config.qkv_bias)
        self.qk_norms: tuple[RMSNorm, RMSNorm] | None = None
        if config.qk_norm:
            self.qk_norms = (
                RMSNorm(source, f"{name}.self_attn.q_norm", config.head_dim, eps),
                RMSNorm(source, f"{name}.self_attn.k_norm", config.head_dim, eps),
            )
        o_proj = {f"{name}.self_attn.o_proj": config.hidden_size}
        self.output = Linear.load(source, o_proj, q_size, bias=config.o_bias)

    def add_to(self, x: Tensor, rotation: Rotation, attend: Attend, walk: RowWalk) -> None:
        """Adds the block's output to the hidden states `x` [tokens, hidden], in place."""
        q, k, v = self._project(x, rotation, walk)
        o = attend(self.layer, q, k, v)
        del q, k, v
        o = o.flatten(1)  # [tokens, num_q_heads * head_dim]
        for rows in walk(len(x), self.output.flops_per_row):
            self.output.add_to(x[rows], o[rows])

    def _project(self, x: Tensor, rotation: Rotation, walk: RowWalk) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.qkv.weight.dtype
        q, k, v = (x.new_empty(len(x), heads, self.head_dim, dtype=dtype) for heads in self.num_heads)
        for rows in walk(len(x), self.qkv.flops_per_row):
            qkv = self.qkv(self.norm(x[rows]))
            # [chunk, q + k + v heads, head_dim]
            new_q, new_k, new_v = torch.split(qkv.view(len(qkv), -1, self.head_dim), self.num_heads, dim=1)
            if self.qk_norms is not None:
                q_norm, k_norm = self.qk_norms
                new_q, new_k = q_norm(new_q), k_norm(new_k)
            rotation.write(new_q, rows, out=q[rows])
            rotation.write(new_k, rows, out=k[rows])
            v[rows] = new_v
        return q, k, v


class FeedForward:
    """x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, source: WeightSource) -> None:
        name = f"model.layers.{layer}"
        norm = f"{name}.post_attention_layernorm"
        self.norm = RMSNorm(source, norm, config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(
            source, f"{name}.mlp", config.hidden_size, config.intermediate_size, bias=config.mlp_bias
        )

    def add_to(self, x: Tensor, walk: RowWalk) -> None:
        """Adds the block's output to the hidden states `x` [tokens, hidden], in place."""
        for rows in walk(len(x), self.mlp.flops_per_row):
            self.mlp.add_to(x[rows], self.norm(x[rows]))


class Decoder:
    """Token ids in, hidden states and logits out. Every rank of a group holds one.

    Results are inference tensors: outside `torch.inference_mode` they can be read, not changed in place.

    Args:
        config: the model's shape.
        source: where its tensors come from; also fixes dtype and device.

    Raises:
        CheckpointError: if the source lacks a tensor or has it in another shape.
    """

    def __init__(self, config: ModelConfig, source: WeightSource) -> None:
        self.config = config
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, source.dtype, source.device)
        table = table_dtype(source.dtype, source.device)
        self._embedding = torch.empty(
            config.vocab_size, config.hidden_size, dtype=table, device=source.device
        )
        source.fill("model.embed_tokens.weight", self._embedding)
        self._layers = [
            (SelfAttention(config, layer, source), FeedForward(config, layer, source))
            for layer in range(config.num_layers)
        ]
        self._norm = RMSNorm(source, "model.norm", config.hidden_size, config.rms_norm_eps)
        self._head = self._read_head(source)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, walk: RowWalk = row_chunks
    ) -> Tensor:
        """Runs all layers.

        Args:
            token_ids: [tokens] int64, below vocab_size; may be empty, `attend` is called all the same.
            positions: [tokens] int64, each token's place in its own text.
            attend: attention of these tokens.
            walk: how row-wise work is cut; what it raises between two chunks ends the forward.

        Returns:
            Hidden states [tokens, hidden] in fp32 or wider, the final norm applied.
        """
        x = torch.empty(
            len(token_ids), self.config.hidden_size, dtype=self._norm.weight.dtype, device=token_ids.device
        )
        row_flops = BYTE_FLOPS * self.config.hidden_size * x.element_size()
        for rows in walk(len(x), row_flops):
            x[rows] = functional.embedding(token_ids[rows], self._embedding)
        rotation = self._rotary(positions)
        for attention, feed_forward in self._layers:
            attention.add_to(x, rotation, attend, walk)
            feed_forward.add_to(x, walk)
        for rows in walk(len(x), row_flops):
            x[rows] = self._norm(x[rows])
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, hidden] of `forward` -> fp32 [n, vocab]; meant for few rows."""
        return self._head(hidden).float()

    def _read_head(self, source: WeightSource) -> Linear:
        """The output matrix; one that the checkpoint holds is used even where the config says it is tied."""
        tied = Linear(self._embedding)
        if self.config.tie_embeddings and not source.has("lm_head.weight"):
            return tied
        shape, dtype = (self.config.vocab_size, self.config.hidden_size), self._embedding.dtype
        head = Linear(torch.empty(shape, dtype=dtype, device=self._embedding.device))
        source.fill("lm_head.weight", head.weight)
        return tied if self.config.tie_embeddings and torch.equal(head.weight, tied.weight) else head
