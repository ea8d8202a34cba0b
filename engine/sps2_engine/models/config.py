"""The shape of a decoder model, and how it is read from a checkpoint folder."""

from dataclasses import dataclass
from pathlib import Path

from sps2_engine.layers.rope import DefaultRope, RopeSpec
from sps2_engine.models.family import Traits
from sps2_engine.models.fields import Fields, read_object
from sps2_engine.models.registry import find_family
from sps2_engine.models.rope_config import read_rope


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder with rotary positions, grouped-query attention and gated feed-forward blocks."""

    hidden_size: int
    """Values per token between layers."""
    intermediate_size: int
    """Values per token inside a feed-forward block."""
    num_layers: int
    """Decoder layers."""
    num_q_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; each serves num_q_heads / num_kv_heads query heads."""
    head_dim: int
    """Values per head; even."""
    vocab_size: int
    """Token ids the model knows."""
    max_position: int
    """Longest context in tokens, after RoPE scaling."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every norm."""
    rope: RopeSpec = DefaultRope()  # noqa: RUF009 - frozen
    """Rotary frequencies."""
    tie_embeddings: bool = False
    """Whether the output projection is the embedding matrix."""
    qkv_bias: bool = False
    """Whether q, k and v projections have a bias."""
    o_bias: bool = False
    """Whether the output projection of attention has a bias."""
    qk_norm: bool = False
    """Whether each head of q and k is RMS-normalised before its rotation."""
    mlp_bias: bool = False
    """Whether the feed-forward projections have a bias."""
    bos_id: int | None = None
    """The token a text begins with, if the model has one."""
    eos_ids: tuple[int, ...] = ()
    """The tokens that end a text."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_q_heads", "num_kv_heads", "head_dim",
                 "vocab_size", "max_position")  # fmt: skip
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_q_heads} query heads cannot share {self.num_kv_heads} key-value heads equally"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even to be rotated, not {self.head_dim}")

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors, tied embeddings counted once."""
        q_size, kv_size = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        matrices = 2 * self.hidden_size * (q_size + kv_size) + 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        biases = (q_size + 2 * kv_size) * self.qkv_bias + self.hidden_size * self.o_bias
        mlp_biases = (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.hidden_size + self.num_layers * (matrices + norms + biases + mlp_biases)


def read_model_config(folder: Path) -> ModelConfig:
    """Reads config.json (and the end tokens of generation_config.json) of a Hugging Face checkpoint.

    Raises:
        CheckpointError: if the folder is no checkpoint, or one this engine cannot compute exactly.
    """
    raw = Fields(str(folder / "config.json"), read_object(folder / "config.json"))
    family = find_family(raw)
    fields = Fields(raw.origin, {**family.defaults, **raw.values})
    try:
        return _model_config(fields, family.traits(fields), _generation_eos_ids(folder))
    except (ValueError, ArithmeticError) as error:
        raise fields.error(f"{error}; take it from the published checkpoint") from error


def _model_config(fields: Fields, traits: Traits, generation_eos_ids: tuple[int, ...]) -> ModelConfig:
    rope, max_position = read_rope(fields)
    _refuse_unsupported(fields, traits, max_position)
    hidden_size, num_q_heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    return ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=fields.whole("num_hidden_layers"),
        num_q_heads=num_q_heads,
        num_kv_heads=fields.whole("num_key_value_heads", num_q_heads),
        head_dim=fields.whole("head_dim", hidden_size // num_q_heads),
        vocab_size=fields.whole("vocab_size"),
        max_position=max_position,
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
        qkv_bias=traits.qkv_bias,
        o_bias=traits.o_bias,
        qk_norm=traits.qk_norm,
        mlp_bias=traits.mlp_bias,
        bos_id=next(iter(fields.ids("bos_token_id")), None),
        eos_ids=generation_eos_ids or fields.ids("eos_token_id"),
    )


def _refuse_unsupported(fields: Fields, traits: Traits, max_position: int) -> None:
    """What would silently change the model's output is refused."""
    window = traits.sliding_window
    if window is not None and window < max_position:
        raise fields.error(
            f"attention is limited to a sliding window of {window} tokens, which is not supported; use a "
            f"checkpoint without one, or set max_position_embeddings to {window} to serve shorter texts"
        )
    activation = fields.text("hidden_act", "silu")
    if activation not in {"silu", "swish"}:
        raise fields.error(f"activation {activation!r} is not supported; only 'silu' is")
    if fields.values.get("quantization_config"):
        raise fields.error("quantized weights are not supported; use the checkpoint in bf16, fp16 or fp32")


def _generation_eos_ids(folder: Path) -> tuple[int, ...]:
    """Chat models name all their end tokens only here."""
    path = folder / "generation_config.json"
    return Fields(str(path), read_object(path)).ids("eos_token_id") if path.is_file() else ()
