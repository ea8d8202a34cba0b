"""Who is who in a mesh, and what of a model each tensor rank holds."""

import pytest

from sps2_engine.attention.cost_model import AttentionShape
from sps2_engine.mesh import Mesh, Part, TensorShare
from sps2_layout.layout import Span


@pytest.mark.parametrize(("sp", "tp"), [(1, 1), (4, 1), (2, 2), (1, 4), (3, 2)])
def test_every_rank_is_in_one_group_each_way(sp: int, tp: int) -> None:
    mesh = Mesh.of(sp * tp, tp)
    assert (mesh.sp, mesh.tp, mesh.size) == (sp, tp, sp * tp)
    for rank in range(mesh.size):
        sequence, tensor = mesh.sequence_ranks(rank), mesh.tensor_ranks(rank)
        assert sequence[mesh.sequence_index(rank)] == tensor[mesh.tensor_index(rank)] == rank
        assert len(sequence) == sp
        assert list(tensor) == list(range(tensor[0], tensor[0] + tp)), "tensor ranks are neighbours"


def test_a_group_that_cannot_be_cut_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"group of 6 ranks.*make its size a multiple of 4, or change --tp"):
        Mesh.of(6, 4)
    with pytest.raises(ValueError, match="at least one rank"):
        Mesh(0, 1)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(8, 2), (8, 8), (28, 4), (16, 1), (64, 8)])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_query_heads_stay_with_their_kv_head(num_q_heads: int, num_kv_heads: int, tp: int) -> None:
    fold = num_q_heads // num_kv_heads
    seen: list[int] = []
    for index in range(tp):
        share = TensorShare(index, tp)
        q_heads, kv_heads = share.q_heads(num_q_heads), share.kv_heads(num_kv_heads)
        seen += range(q_heads.span.begin, q_heads.span.end)
        assert len(kv_heads) == max(1, num_kv_heads // tp)
        read = {head // fold for head in range(q_heads.span.begin, q_heads.span.end)}
        assert read == set(range(kv_heads.span.begin, kv_heads.span.end))
        shape = AttentionShape(num_q_heads, num_kv_heads, 64, 2).of_share(share)
        assert (shape.num_q_heads, shape.num_kv_heads) == (len(q_heads), len(kv_heads))
        assert shape.first_kv_head == kv_heads.span.begin
    assert seen == list(range(num_q_heads))


@pytest.mark.parametrize("vocab_size", [4, 258, 151_936])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_the_vocabulary_is_split_without_padding(vocab_size: int, tp: int) -> None:
    parts = [TensorShare(index, tp).vocabulary(vocab_size) for index in range(tp)]
    assert [part.span.begin for part in parts] == [0, *(part.span.end for part in parts[:-1])]
    assert parts[-1].span.end == vocab_size
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_a_model_that_cannot_be_split_says_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"14 query heads cannot be split 4 ways: take a --tp that divides 14"
    ):
        TensorShare(0, 4).q_heads(14)
    with pytest.raises(ValueError, match=r"intermediate_size\) cannot be split 4 ways"):
        TensorShare(0, 4).columns(1410)
    with pytest.raises(ValueError, match=r"6 KV heads.*take a --tp that divides 6, or a multiple of it"):
        TensorShare(0, 4).kv_heads(6)
    with pytest.raises(ValueError, match=r"3 token ids are too few for 4 tensor ranks"):
        TensorShare(0, 4).vocabulary(3)
    with pytest.raises(ValueError, match="outside"):
        TensorShare(2, 2)


def test_parts() -> None:
    part = Part(Span(2, 4), 8)
    assert part.times(16) == Part(Span(32, 64), 128)
    assert not part.is_all
    assert Part.all(8).is_all
    with pytest.raises(ValueError, match="no part"):
        Part(Span(2, 9), 8)
