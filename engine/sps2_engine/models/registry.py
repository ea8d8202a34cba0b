"""The model families that can be served, by the name a checkpoint gives its architecture."""

from sps2_engine.models.family import Family
from sps2_engine.models.fields import Fields
from sps2_engine.models.llama import LLAMA
from sps2_engine.models.mistral import MISTRAL
from sps2_engine.models.qwen2 import QWEN2
from sps2_engine.models.qwen3 import QWEN3

FAMILIES = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def find_family(fields: Fields) -> Family:
    """The family that config.json names.

    Raises:
        CheckpointError: if it names none, or one that is not served.
    """
    names = fields.values.get("architectures")
    known = [FAMILIES[name] for name in names if name in FAMILIES] if isinstance(names, list) else []
    if not known:
        served = ", ".join(sorted(FAMILIES))
        raise fields.error(f"architecture {names!r} is not supported; these are: {served}")
    return known[0]
