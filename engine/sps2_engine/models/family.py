"""What makes one model family different from the next, as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sps2_engine.models.fields import Fields


@dataclass(frozen=True)
class Traits:
    """What the generic decoder must do for one checkpoint of a family."""

    qkv_bias: bool = False
    """Whether q, k and v projections have a bias."""
    o_bias: bool = False
    """Whether the output projection of attention has a bias."""
    qk_norm: bool = False
    """Whether each head of q and k is RMS-normalised before its rotation."""
    mlp_bias: bool = False
    """Whether the feed-forward projections have a bias."""
    sliding_window: int | None = None
    """Tokens that some layer's attention is limited to; None where every layer sees everything."""


@dataclass(frozen=True)
class Family:
    """One entry of the registry."""

    architecture: str
    """The name in `architectures` of config.json."""
    traits: Callable[[Fields], Traits]
    """Reads what sets a checkpoint of this family apart."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes for keys that config.json leaves out."""
