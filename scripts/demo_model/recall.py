"""Initial weights in which two layers already recall: "name value ... name" is followed by "value".

Gradient descent alone did not form this circuit in the millions of tokens that two CPU cores afford. Written
down, it recalls half of the facts or more before the first step; training sharpens it, teaches what to ignore, and
learns the language around it.

Layer 0's first head attends to the previous token, through a constant channel of the embedding and phases
that peak at distance 1, and copies that token's code into a subspace of its own. In layer 1, one head of each
group looks for the positions whose previous token is the current one, in the half of RoPE's planes that
hardly turn over the context, and copies the token found there towards the output.
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from scripts.demo_model.model import Attention, Layer, Llama, Shape

CONSTANT = 4.0  # value of the embedding's channel 0, where other channels have a deviation of 1
PREVIOUS_SHARPNESS, PREVIOUS_GAIN = 2.0, 2.0
MATCH_SHARPNESS, COPY_GAIN = 2.4, 4.8


@torch.no_grad()
def write_recall(model: Llama) -> None:
    """Write the circuit over a freshly drawn model's layers 0 and 1."""
    shape = model.shape
    first, second = (cast("Layer", layer).self_attn for layer in list(model.layers)[:2])
    square, _ = torch.linalg.qr(torch.randn(shape.hidden - 1, shape.hidden - 1))
    basis = functional.pad(square, (1, 0))  # orthonormal rows that leave channel 0 alone
    previous, code, other = basis[: 3 * shape.head_dim].view(3, shape.head_dim, -1)
    model.embed_tokens.weight[:, 0] = CONSTANT
    _attend_to_previous(first, shape)
    first.v_proj.weight[: shape.head_dim] = code
    first.o_proj.weight[:, : shape.head_dim] = PREVIOUS_GAIN * previous.T
    for group, copied in enumerate((code, other)):
        _match_and_copy(second, shape, group, previous, code, copied)


def _attend_to_previous(attention: Attention, shape: Shape) -> None:
    """Head 0's score at distance n is a sum of cos(frequency * (n - 1)) over the faster half of planes."""
    half = shape.head_dim // 2
    frequency = shape.theta ** (-torch.arange(half) / half)
    fast = PREVIOUS_SHARPNESS * (torch.arange(half) < half // 2)
    attention.k_proj.weight[: shape.head_dim] = 0
    attention.k_proj.weight[:half, 0] = fast
    attention.q_proj.weight[: shape.head_dim] = 0
    attention.q_proj.weight[:half, 0] = fast * frequency.cos()
    attention.q_proj.weight[half : shape.head_dim, 0] = -fast * frequency.sin()


def _match_and_copy(
    attention: Attention, shape: Shape, group: int, previous: Tensor, code: Tensor, copied: Tensor
) -> None:
    """The group's first head matches one half of the code, each group another, and copies a subspace."""
    half = shape.head_dim // 2
    part = slice(group * half, (group + 1) * half)
    slow = torch.cat((torch.arange(half // 2, half), torch.arange(half + half // 2, shape.head_dim)))
    key = group * shape.head_dim
    head = key * (shape.heads // shape.kv_heads)
    attention.k_proj.weight[key : key + shape.head_dim] = 0
    attention.k_proj.weight[key + slow] = MATCH_SHARPNESS * previous[part]
    attention.q_proj.weight[head : head + shape.head_dim] = 0
    attention.q_proj.weight[head + slow] = MATCH_SHARPNESS * code[part]
    attention.v_proj.weight[key : key + shape.head_dim] = copied
    attention.o_proj.weight[:, head : head + shape.head_dim] = COPY_GAIN * copied.T
