"""A model folder for tests of the control plane: a byte-level tokenizer and just enough of a checkpoint.

Ids: 0 is <|bos|>, 1 is <|eos|>, 2 to 257 are the bytes 0 to 255, then a few merged ones.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS = 0, 1
FIRST_BYTE_ID = 2
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r")]
VOCABULARY_SIZE = FIRST_BYTE_ID + 256 + len(MERGES)
CONTEXT_LENGTH = 512


def byte_characters() -> list[str]:
    """The character that stands for each byte 0 to 255 in byte-level vocabularies (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def byte_ids(data: bytes) -> list[int]:
    """One id for each byte."""
    return [FIRST_BYTE_ID + byte for byte in data]


def tiny_tokenizer() -> Tokenizer:
    """A new byte-level BPE tokenizer that puts <|bos|> before a prompt."""
    vocabulary = {"<|bos|>": BOS, "<|eos|>": EOS}
    for piece in [*byte_characters(), *("".join(pair) for pair in MERGES)]:
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|bos|>", special=True), AddedToken("<|eos|>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
    )
    return tokenizer


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for one in messages %}"
    "{% if one.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ one.role }}]{{ one.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_tiny_model(folder: Path, chat_template: str | None = None) -> Path:
    """Writes tokenizer.json, config.json and an empty safetensors file into `folder`, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "max_position_embeddings": CONTEXT_LENGTH,
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if chat_template is not None:
        names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": chat_template}
        (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    header = b"{}"
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder
