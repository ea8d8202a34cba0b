"""Mistral. Its first release limits every layer to a sliding window; the later ones do not."""

from sps2_engine.models.family import Family, Traits
from sps2_engine.models.fields import Fields


def _traits(fields: Fields) -> Traits:
    return Traits(sliding_window=fields.optional_whole("sliding_window"))


MISTRAL = Family(
    architecture="MistralForCausalLM",
    traits=_traits,
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
