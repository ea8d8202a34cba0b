"""Qwen3 (dense): like Qwen2 with normalised q and k, heads of a size of their own, and no biases."""

from sps2_engine.models.family import Family, Traits
from sps2_engine.models.fields import Fields
from sps2_engine.models.qwen2 import QWEN_DEFAULTS, qwen_sliding_window


def _traits(fields: Fields) -> Traits:
    bias = fields.flag("attention_bias", default=False)
    return Traits(qkv_bias=bias, o_bias=bias, qk_norm=True, sliding_window=qwen_sliding_window(fields))


QWEN3 = Family(architecture="Qwen3ForCausalLM", traits=_traits, defaults={**QWEN_DEFAULTS, "head_dim": 128})
