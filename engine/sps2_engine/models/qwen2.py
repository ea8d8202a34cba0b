"""Qwen2 and Qwen2.5: biases on q, k and v, and a sliding window that is nearly always switched off."""

from sps2_engine.models.family import Family, Traits
from sps2_engine.models.fields import Fields

QWEN_DEFAULTS = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"


def qwen_sliding_window(fields: Fields) -> int | None:
    """The window of a Qwen checkpoint, or None if it is switched off or no layer uses it.

    Raises:
        CheckpointError: if a layer attends in a way that is neither full nor windowed.
    """
    layer_types = fields.values.get("layer_types") or _layer_types(fields)
    if not isinstance(layer_types, list):
        raise fields.error(f"'layer_types' must be a list of names, not {layer_types!r}")
    other = [name for name in layer_types if name not in (FULL_ATTENTION, SLIDING_ATTENTION)]
    if other:
        raise fields.error(f"layer type {other[0]!r} is not supported; use a checkpoint without it")
    if not fields.flag("use_sliding_window", default=False) or SLIDING_ATTENTION not in layer_types:
        return None
    return fields.optional_whole("sliding_window")


def _layer_types(fields: Fields) -> list[str]:
    num_layers = fields.whole("num_hidden_layers")
    num_full = min(fields.whole("max_window_layers"), num_layers)
    return [FULL_ATTENTION] * num_full + [SLIDING_ATTENTION] * (num_layers - num_full)


def _traits(fields: Fields) -> Traits:
    return Traits(qkv_bias=True, sliding_window=qwen_sliding_window(fields))


QWEN2 = Family(architecture="Qwen2ForCausalLM", traits=_traits, defaults=QWEN_DEFAULTS)
