"""Rotary position embeddings: the published frequency schedules, and their application to q and k.

Angles are formed in fp32 exactly as transformers forms them, since a checkpoint was trained or tuned with
those roundings. Knows nothing about config files (`models/rope_config.py` reads them).
Source: Su et al., "RoFormer", 2021, in the half-split layout of the published checkpoints.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sps2_engine.weights import wide_dtype
from sps2_kernels.row_ops import rotate, split_rotated


class RopeSpec(Protocol):
    """A frequency schedule. `frequencies` is called once, when a model is built."""

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied with."""
        ...

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians per position of each rotated pair, fp32 [head_dim / 2]."""
        ...


@dataclass(frozen=True)
class DefaultRope:
    """theta^(-2i/d)."""

    theta: float = 10_000.0
    """Base of the geometric series of wavelengths."""
    attention_factor = 1.0

    def frequencies(self, head_dim: int) -> Tensor:
        """See `RopeSpec.frequencies`."""
        return 1.0 / _periods(self.theta, head_dim)


@dataclass(frozen=True)
class LinearRope:
    """Positions divided by a factor. Source: Chen et al., "Position Interpolation", 2023."""

    theta: float
    """Base of the geometric series of wavelengths."""
    factor: float
    """How many times longer the context is than the one trained first."""
    attention_factor = 1.0

    def frequencies(self, head_dim: int) -> Tensor:
        """See `RopeSpec.frequencies`."""
        return 1.0 / _periods(self.theta, head_dim) / self.factor


@dataclass(frozen=True)
class Llama3Rope:
    """Long wavelengths slowed by a factor, short ones kept, those between blended. Source: Llama 3.1."""

    theta: float
    """Base of the geometric series of wavelengths."""
    factor: float
    """How much the long wavelengths are stretched."""
    low_freq_factor: float
    """Wavelengths above original_max_position / low_freq_factor are long."""
    high_freq_factor: float
    """Wavelengths below original_max_position / high_freq_factor are short."""
    original_max_position: int
    """Context length, in tokens, of the first training."""
    attention_factor = 1.0

    def frequencies(self, head_dim: int) -> Tensor:
        """See `RopeSpec.frequencies`."""
        plain = 1.0 / _periods(self.theta, head_dim)
        turns = self.original_max_position / (2 * math.pi / plain)  # turns within the original context
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - blend) * plain / self.factor + blend * plain
        slowed = torch.where(turns < self.low_freq_factor, plain / self.factor, blended)
        return torch.where(turns > self.high_freq_factor, plain, slowed)


@dataclass(frozen=True)
class YarnRope:
    """Interpolated at low frequencies, untouched at high ones. Source: Peng et al., "YaRN", 2023."""

    theta: float
    """Base of the geometric series of wavelengths."""
    factor: float
    """How many times longer the context is than the original one."""
    original_max_position: int
    """Context length, in tokens, of the first training."""
    attention_factor: float
    """What cos and sin are multiplied with; `yarn_attention_factor` unless the checkpoint says otherwise."""
    beta_fast: float = 32.0
    """Pairs that turn more often than this in the original context are left alone."""
    beta_slow: float = 1.0
    """Pairs that turn less often than this are interpolated."""
    truncate: bool = True
    """Whether the border pairs are rounded outward to whole pairs."""

    def frequencies(self, head_dim: int) -> Tensor:
        """See `RopeSpec.frequencies`."""
        periods = _periods(self.theta, head_dim)
        low, high = self._ramp(head_dim)
        pairs = torch.arange(head_dim // 2, dtype=torch.float32)
        kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
        return 1.0 / (self.factor * periods) * (1 - kept) + 1.0 / periods * kept

    def _ramp(self, head_dim: int) -> tuple[float, float]:
        """The pairs between which keeping turns into interpolating."""
        low, high = self._pair(self.beta_fast, head_dim), self._pair(self.beta_slow, head_dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high + 0.001 if low == high else high  # never a step of zero width

    def _pair(self, num_turns: float, head_dim: int) -> float:
        """The pair, as a real number, that turns `num_turns` times within the original context."""
        ratio = self.original_max_position / (num_turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(self.theta))


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """The default multiplier of cos and sin: 0.1 ln(factor) + 1, or the quotient of two scaled by mscale."""

    def scaled(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return scaled(mscale) / scaled(mscale_all_dim)
    return scaled(1.0)


@dataclass(frozen=True)
class Rotation:
    """The turn of each token, made once per forward and used by every layer."""

    cos: Tensor  # [tokens, 1, head_dim], the two halves equal
    sin: Tensor  # [tokens, 1, head_dim / 2]

    def write(self, x: Tensor, rows: slice, out: Tensor) -> None:
        """Writes `x` [chunk, heads, head_dim], tokens `rows` of the forward, rotated into `out`.

        (a, b) -> (a cos - b sin, b cos + a sin), with a and b the first and second half of a head.
        """
        rotate(x, self.cos[rows], self.sin[rows], out)

    def split(self, qkv: Tensor, rows: slice, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Takes the projections of tokens `rows` apart into q and k, rotated, and v; see `split_rotated`."""
        split_rotated(qkv, self.cos[rows], self.sin[rows], q, k, v)


class RotaryEmbedding:
    """Turns positions into rotations; no table grows with the longest context."""

    def __init__(self, spec: RopeSpec, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = spec.frequencies(head_dim).to(device)
        self._attention_factor = spec.attention_factor
        self._dtype = wide_dtype(dtype)

    def __call__(self, positions: Tensor) -> Rotation:
        """Positions [tokens] int64, below 2^24 (exact in fp32) -> their rotation, in fp32 or wider."""
        angles = positions[:, None, None].float() * self._frequencies  # [tokens, 1, head_dim / 2]
        cos = (angles.cos() * self._attention_factor).to(self._dtype)
        sin = (angles.sin_() * self._attention_factor).to(self._dtype)
        return Rotation(torch.cat((cos, cos), dim=-1), sin)


def _periods(theta: float, head_dim: int) -> Tensor:
    """theta^(2i/d), fp32 [head_dim / 2]."""
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
