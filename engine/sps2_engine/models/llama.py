"""Llama, and what shares its architecture name (Yi, Vicuna, DeepSeek LLM, the demo model)."""

from sps2_engine.models.family import Family, Traits
from sps2_engine.models.fields import Fields


def _traits(fields: Fields) -> Traits:
    bias = fields.flag("attention_bias", default=False)
    return Traits(qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias", default=False))


LLAMA = Family(
    architecture="LlamaForCausalLM",
    traits=_traits,
    defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
)
