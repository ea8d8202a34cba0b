"""What a tensor rank reads and holds, and that parallel layers add up to whole ones."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sps2_engine import weights
from sps2_engine.layers.linear import Linear
from sps2_engine.layers.mlp import SwiGLU
from sps2_engine.layers.tensor_ranks import ALONE, WithoutPeers
from sps2_engine.mesh import Part, TensorShare
from sps2_engine.models import Decoder, load_decoder
from sps2_engine.weights import CheckpointWeights, RandomWeights, WeightSource
from sps2_layout.layout import Span
from support.checkpoints import make_tiny_checkpoint

CPU = torch.device("cpu")
TP = 4
EMBEDDING, DOWN, BIAS = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.mlp.gate_proj.bias",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    return make_tiny_checkpoint(path, "llama", num_attention_heads=8, attention_bias=True, mlp_bias=True)


def sources(folder: Path) -> list[WeightSource]:
    checkpoint = CheckpointWeights(folder, torch.float32, CPU, 1, lambda _fraction: None)
    return [checkpoint, RandomWeights(0, torch.float32, CPU)]


@pytest.mark.parametrize(
    ("name", "shape", "dim"),
    [(EMBEDDING, (258, 64), 0), (DOWN, (64, 96), 1), (DOWN, (64, 96), 0), (BIAS, (96,), 0)],
)
def test_parts_equal_slices_of_the_whole(folder: Path, name: str, shape: tuple[int, ...], dim: int) -> None:
    for source in sources(folder):
        whole = torch.empty(shape)
        source.fill(name, whole)
        for span in (Span(0, shape[dim]), Span(0, 7), Span(5, shape[dim])):
            part = torch.full([len(span) if d == dim else n for d, n in enumerate(shape)], torch.nan)
            source.fill(name, part, Part(span, shape[dim]), dim)
            assert torch.equal(part, whole.narrow(dim, span.begin, len(span)))


def test_a_target_that_is_not_the_part_is_refused(folder: Path) -> None:
    for source in sources(folder):
        with pytest.raises(ValueError, match="cannot take"):
            source.fill(EMBEDDING, torch.empty(5, 64), Part(Span(0, 6), 258))
    with pytest.raises(weights.CheckpointError, match=r"\[258, 64\] where config.json asks for \[300, 64\]"):
        sources(folder)[0].fill(EMBEDDING, torch.empty(6, 64), Part(Span(0, 6), 300))


def matrices(decoder: Decoder) -> list[Tensor]:
    """Every weight matrix, once."""
    found = [decoder._vocabulary.embedding, decoder._vocabulary.head.weight]
    for attention, feed_forward in decoder._layers:
        found += [attention.qkv.weight, attention.output.weight]
        found += [feed_forward.mlp.gate_up.weight, feed_forward.mlp.down.weight]
    return found


def test_a_rank_holds_and_reads_its_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_decoder(folder, torch.float32, CPU)
    read_whole: set[str] = set()
    opened = weights._open

    class Spy:
        def __init__(self, path: Path) -> None:
            self._file = opened(path)
            self.keys, self.get_slice = self._file.keys, self._file.get_slice

        def get_tensor(self, name: str) -> Tensor:
            read_whole.add(name)
            return self._file.get_tensor(name)

    monkeypatch.setattr(weights, "_open", Spy)
    fractions: list[float] = []
    for index in range(TP):
        share = TensorShare(index, TP)
        decoder = load_decoder(folder, torch.float32, CPU, fractions.append, share)
        held = sum(matrix.numel() for matrix in matrices(decoder))
        # Two KV heads on four ranks: each is held twice, in k and v of two layers.
        replicated = 2 * 2 * 64 * (16 - 2 * 16 // TP)
        rows = 2 * 64 * (len(share.vocabulary(258)) - 258 / TP)
        assert held == sum(matrix.numel() for matrix in matrices(whole)) / TP + replicated + rows
        assert all(len(matrix.untyped_storage()) == matrix.nbytes for matrix in matrices(decoder))
    # Norms, and the biases that are added after a sum: what every rank needs whole.
    assert {name for name in read_whole if "norm" not in name} == {
        f"model.layers.{layer}.{name}.bias"
        for layer in (0, 1)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert fractions[-1] == 1.0


class Recorded:
    """A tensor rank whose peers say nothing; keeps its summands."""

    size = TP

    def __init__(self) -> None:
        self.summands: list[Tensor] = []

    def sum(self, x: Tensor) -> None:
        self.summands.append(x.clone())

    def gather_columns(self, columns: Tensor, widths: Sequence[int]) -> Tensor:
        raise AssertionError("nothing is gathered here")

    def close(self) -> None:
        """Holds nothing."""


def test_row_parallel_summands_add_up_and_the_bias_is_added_once(folder: Path) -> None:
    source, name, x, out = (
        sources(folder)[0],
        DOWN.removesuffix(".weight"),
        torch.randn(5, 96),
        torch.ones(5, 64),
    )
    whole = Linear.load(source, {name: Part.all(64)}, Part.all(96), bias=True)
    wanted = out.clone()
    whole.add_to(wanted, x)
    ranks = Recorded()
    for index in range(TP):
        columns = TensorShare(index, TP).columns(96)
        part = Linear.load(source, {name: Part.all(64)}, columns, bias=True)
        assert part.flops_per_row * TP == whole.flops_per_row
        part.add_to(out.clone(), x[:, columns.span.slice], ranks)
    assert whole.bias is not None
    torch.testing.assert_close(out + sum(ranks.summands) + whole.bias, wanted)


def test_a_feed_forward_block_in_parts_equals_the_whole(folder: Path) -> None:
    source, x = sources(folder)[0], torch.randn(5, 64)
    name, wanted, ranks = "model.layers.1.mlp", torch.zeros(5, 64), Recorded()
    whole = SwiGLU(source, name, 64, Part.all(96), bias=True)
    whole.add_to(wanted, x, ALONE)
    for index in range(TP):
        part = SwiGLU(source, name, 64, TensorShare(index, TP).columns(96), bias=True)
        part.add_to(torch.zeros(5, 64), x, ranks)
    assert whole.down.bias is not None
    torch.testing.assert_close(sum(ranks.summands) + whole.down.bias, wanted)


def test_a_split_decoder_refuses_to_run_alone(folder: Path) -> None:
    decoder = load_decoder(folder, torch.float32, CPU, share=TensorShare(1, TP))
    with pytest.raises(ValueError, match="split 4 ways was given 1 tensor ranks"):
        decoder.logits(torch.zeros(1, 64))
    assert decoder.logits(torch.zeros(1, 64), WithoutPeers(TP)).shape == (1, 258)
