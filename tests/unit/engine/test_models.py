"""The generic decoder against transformers, on tiny checkpoints of every family."""

import weakref
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from sps2_engine.layers import rows
from sps2_engine.models import (
    Decoder,
    ModelConfig,
    load_decoder,
    random_decoder,
)
from support.checkpoints import BOS_ID, EOS_ID, FAMILIES, VOCAB_SIZE, make_tiny_checkpoint

CPU = torch.device("cpu")
NUM_TOKENS = 48


class DenseCausal:
    """Plain causal attention with a cache: the twin of what the workers do."""

    def __init__(self) -> None:
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.is_contiguous()
        assert k.is_contiguous()
        assert v.is_contiguous()
        if layer in self.cache:
            old_k, old_v = self.cache[layer]
            k, v = torch.cat((old_k, k)), torch.cat((old_v, v))
        self.cache[layer] = (k, v)
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        o = functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, enable_gqa=True
        )
        return o[0].transpose(0, 1)


def tokens(count: int = NUM_TOKENS) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(1))


def logits_of(decoder: Decoder, ids: Tensor) -> Tensor:
    return decoder.logits(decoder.forward(ids, torch.arange(len(ids)), DenseCausal()))


def theirs(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(ids[None]).logits[0]
    return logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500_000.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}


@pytest.mark.parametrize("checkpoint_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(
    family: str, tied: bool, checkpoint_dtype: torch.dtype, tmp_path: Path
) -> None:
    make_tiny_checkpoint(tmp_path, family, dtype=checkpoint_dtype, tie_word_embeddings=tied)
    ours = logits_of(load_decoder(tmp_path, torch.float32, CPU), tokens())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs(tmp_path, tokens()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": LINEAR}),
        ("mistral", {"head_dim": 32}),
        ("qwen2", {"hidden_size": 112, "head_dim": 8, "num_attention_heads": 14}),
        ("qwen2", {"rope_parameters": YARN}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 1, "head_dim": 64}),
    ],
)
def test_variants_equal_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, family, **overrides)
    ours = logits_of(load_decoder(tmp_path, torch.float32, CPU), tokens())
    torch.testing.assert_close(ours, theirs(tmp_path, tokens()), rtol=0, atol=1e-4)


def test_bf16_stays_close_to_fp32(llama: Path) -> None:
    exact = logits_of(load_decoder(llama, torch.float32, CPU), tokens())
    rounded = logits_of(load_decoder(llama, torch.bfloat16, CPU), tokens())
    assert (exact - rounded).abs().mean() < 0.1 * exact.std()


def test_prefill_in_parts_then_decode_equals_one_prefill(llama: Path) -> None:
    decoder = load_decoder(llama, torch.float32, CPU)
    ids, attend = tokens(), DenseCausal()
    parts = [
        decoder.forward(ids[start:end], torch.arange(start, end), attend)
        for start, end in [(0, 20), (20, 40), *((i, i + 1) for i in range(40, NUM_TOKENS))]
    ]
    torch.testing.assert_close(decoder.logits(torch.cat(parts)), logits_of(decoder, ids), rtol=0, atol=1e-4)


def test_row_chunks_do_not_change_the_result(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(llama, torch.float32, CPU)
    whole = logits_of(decoder, tokens())
    monkeypatch.setattr(rows, "ROW_CHUNK", 7)
    torch.testing.assert_close(logits_of(decoder, tokens()), whole, rtol=0, atol=1e-4)


def test_row_chunks_cover_all_rows() -> None:
    assert list(rows.row_chunks(0)) == []
    assert list(rows.row_chunks(5000)) == [slice(0, 2048), slice(2048, 4096), slice(4096, 5000)]


def test_all_that_is_done_row_by_row_is_walked(llama: Path) -> None:
    """Embedding and last norm included: a long prompt can be given up in them too."""
    decoder, done = load_decoder(llama, torch.float32, CPU), list[str]()

    def walk(num_rows: int, flops_per_row: int) -> Iterator[slice]:
        assert flops_per_row > 0
        done.append("rows")
        yield from rows.row_chunks(num_rows)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        done.append("attend")
        return q

    decoder.forward(tokens(), torch.arange(NUM_TOKENS), attend, walk)
    layers = [["rows", "attend", "rows", "rows"]] * decoder.config.num_layers
    assert done == ["rows", *chain.from_iterable(layers), "rows"]


def test_nothing_holds_q_k_v_after_attend(llama: Path) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert all(tensor() is None for tensor in seen), f"held in layer {layer}"
        seen.extend(weakref.ref(tensor) for tensor in (q, k, v))
        return torch.zeros_like(q)

    load_decoder(llama, torch.float32, CPU).forward(tokens(), torch.arange(NUM_TOKENS), attend)
    assert all(tensor() is None for tensor in seen)


def test_a_rank_without_tokens_still_attends(llama: Path) -> None:
    decoder, layers = load_decoder(llama, torch.float32, CPU), []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert (q.shape, k.shape, v.shape) == ((0, 4, 16), (0, 2, 16), (0, 2, 16))
        layers.append(layer)
        return q

    hidden = decoder.forward(tokens(0), tokens(0), attend)
    assert layers == [0, 1]
    assert decoder.logits(hidden).shape == (0, VOCAB_SIZE)


def test_random_decoder_is_reproducible_and_sane() -> None:
    config = ModelConfig(
        hidden_size=64, intermediate_size=96, num_layers=3, num_q_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=VOCAB_SIZE, max_position=4096, qkv_bias=True, qk_norm=True,
    )  # fmt: skip
    first = logits_of(random_decoder(config, 7, torch.float32, CPU), tokens())
    assert torch.equal(first, logits_of(random_decoder(config, 7, torch.float32, CPU), tokens()))
    assert not torch.equal(first, logits_of(random_decoder(config, 8, torch.float32, CPU), tokens()))
    assert 0.1 < first.std() < 10


def test_byte_tokenizer_keeps_every_text(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    text = "Grüße, 世界!\n\t\x00 <b>" + "".join(map(chr, range(256)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS_ID, EOS_ID)
