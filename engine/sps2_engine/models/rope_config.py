"""Reads the rotary embedding of a config.json, in the old spelling and in that of transformers 5.

Old: `rope_theta` and `rope_scaling` (with `type` or `rope_type`); new: `rope_parameters` for everything.
"""

from collections.abc import Callable
from dataclasses import replace

from sps2_engine.layers.rope import (
    DefaultRope,
    LinearRope,
    Llama3Rope,
    RopeSpec,
    YarnRope,
    yarn_attention_factor,
)
from sps2_engine.models.fields import Fields


def read_rope(fields: Fields) -> tuple[RopeSpec, int]:
    """The rotary embedding, and the longest context in tokens that it reaches.

    Raises:
        CheckpointError: if the kind is not known, or a key of it is missing or of the wrong type.
    """
    rope = _rope_fields(fields)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _READERS:
        raise rope.error(f"RoPE type {kind!r} is not supported; use one of {', '.join(sorted(_READERS))}")
    if rope.positive("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("heads that are rotated in part are not supported; use another checkpoint")
    return _READERS[kind](rope)


def _rope_fields(fields: Fields) -> Fields:
    """The rotary keys in one place, with what stands outside their dictionary filled in."""
    given = fields.values.get("rope_scaling") or fields.values.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise fields.error(f"rotary embeddings must be one set for all layers, not {given!r}")
    outside = {"rope_theta": 10_000.0} | {
        key: fields.values[key]
        for key in ("rope_theta", "partial_rotary_factor", "max_position_embeddings")
        if fields.values.get(key) is not None
    }
    rope = replace(fields, origin=f"{fields.origin} (RoPE)", values=outside | given)
    # A top-level original length wins over one in the dictionary, as transformers has it.
    original = fields.optional_whole("original_max_position_embeddings")
    if original is None:
        return rope
    return replace(rope, values={**rope.values, "original_max_position_embeddings": original})


def _default(rope: Fields) -> tuple[RopeSpec, int]:
    return DefaultRope(rope.positive("rope_theta")), rope.whole("max_position_embeddings")


def _linear(rope: Fields) -> tuple[RopeSpec, int]:
    # By convention the config keeps the length before stretching.
    spec = LinearRope(rope.positive("rope_theta"), rope.positive("factor"))
    return spec, int(rope.whole("max_position_embeddings") * spec.factor)


def _llama3(rope: Fields) -> tuple[RopeSpec, int]:
    max_position = rope.whole("max_position_embeddings")
    spec = Llama3Rope(
        theta=rope.positive("rope_theta"),
        factor=rope.positive("factor"),
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
        original_max_position=rope.whole("original_max_position_embeddings", max_position),
    )
    return spec, max_position


def _yarn(rope: Fields) -> tuple[RopeSpec, int]:
    max_position = rope.whole("max_position_embeddings")
    original = rope.whole("original_max_position_embeddings", max_position)
    factor = rope.positive("factor", max_position / original)
    mscale, mscale_all_dim = rope.optional_positive("mscale"), rope.optional_positive("mscale_all_dim")
    spec = YarnRope(
        theta=rope.positive("rope_theta"),
        factor=factor,
        original_max_position=original,
        attention_factor=rope.positive(
            "attention_factor", yarn_attention_factor(factor, mscale, mscale_all_dim)
        ),
        beta_fast=rope.optional_positive("beta_fast") or 32.0,
        beta_slow=rope.optional_positive("beta_slow") or 1.0,
        truncate=rope.flag("truncate", default=True),
    )
    # Some publish the stretched length, some (Qwen2.5) the original one and a factor.
    return spec, max(max_position, int(original * factor))


_READERS: dict[str, Callable[[Fields], tuple[RopeSpec, int]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
