"""A whole model on the ranks of a mesh, held against the same model in one process."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sps2_engine.attention.cost_model import AttentionShape, Exchange, make_plan
from sps2_engine.attention.csa_schedule import KIND, CsaSchedule
from sps2_engine.collectives import LeadingRanks
from sps2_engine.layers.tensor_ranks import KIND as SUM_KIND
from sps2_engine.mesh import Mesh, TensorShare
from sps2_engine.models import load_decoder
from sps2_engine.models.tensor_bytes import tensor_bytes
from sps2_engine.rank_groups import RankGroups
from sps2_engine.slices import Slicer
from sps2_layout.attention import Attention
from sps2_layout.profiles import EXACT, Ladder, Profile
from support.oracle import NEAR_TIE
from support.ranks import run_mesh

MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama 8/2": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_attention_heads": 8}),
    "one KV head": ("mistral", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
    "qwen2": ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 4}),
}
"""Checkpoints that are split; family, and what differs from the tiny one of the family."""
EXCHANGES: tuple[Exchange, ...] = ("heads", "kv")
CPU = torch.device("cpu")
ELEMENT_BYTES = 4
LOGIT_TOLERANCE = 2e-4
"""fp32: about what transformers' own logits differ from ours by."""
MESHES = (Mesh(4, 1), Mesh(2, 2), Mesh(1, 4), Mesh(1, 2))
CSA = Ladder("csa", (Profile(8, ((1, 1), (2, 2), (8, 4)), sinks=3, tail=5),), 1)
DENSE_QUERIES = Ladder("dense queries", (Profile(8, ((1, 1), (8, 4)), dense_queries=True, tail=2),), 1)
MASKS = {ladder.name: ladder for ladder in (EXACT, CSA, DENSE_QUERIES)}


@dataclass(frozen=True)
class RankRun:
    """What one rank made of its tokens."""

    tokens: Tensor
    """Their places in the prompt."""
    logits: Tensor
    """[own tokens, vocab]."""
    num_slices: int
    """How often the mesh agreed to go on."""
    exchanged: int
    """Bytes posted by attention, and below what the plan says."""
    planned: int
    summed: int
    """Bytes posted to tensor ranks, and below what they are by hand."""
    counted: int


@dataclass(frozen=True)
class MeshComparison:
    """A prompt on a mesh against the same in one process."""

    num_tokens: int
    worst: float
    """Largest difference of a logit."""


@cache
def reference_logits(folder: Path, mask: str, prompt: tuple[int, ...]) -> Tensor:
    """Logits [tokens, vocab] of one process."""
    (run,) = run_model(folder, Mesh(), mask, prompt)
    return run.logits


def run_model(
    folder: Path, mesh: Mesh, mask: str, prompt: tuple[int, ...], exchange: Exchange = "heads"
) -> list[RankRun]:
    """Prefills a prompt on every rank of a mesh, thread by thread over Gloo."""
    attention = Attention.admit(MASKS[mask], len(prompt))
    return run_mesh(mesh, lambda groups: _run_rank(folder, mesh, groups, attention, prompt, exchange))


def check_mesh(
    folder: Path, mesh: Mesh, mask: str, prompt: tuple[int, ...], runs: list[RankRun]
) -> MeshComparison:
    """Logits and greedy tokens at every place, posted bytes on every rank, and that all ranks stay in step.

    Raises:
        AssertionError: something differs; tokens may where the two best are nearly tied.
    """
    expected, actual = reference_logits(folder, mask, prompt), assembled(runs, mesh)
    torch.testing.assert_close(actual, expected, rtol=0, atol=LOGIT_TOLERANCE)
    top = expected.topk(2).values
    clear = top[:, 0] - top[:, 1] > NEAR_TIE
    assert torch.equal(actual.argmax(1)[clear], expected.argmax(1)[clear])
    assert int(clear.sum()) > 0.9 * len(prompt)
    for run in runs:
        assert run.exchanged == run.planned
        assert run.summed == run.counted
    assert len({run.num_slices for run in runs}) == 1
    return MeshComparison(len(prompt), float((actual - expected).abs().max()))


def assembled(runs: list[RankRun], mesh: Mesh) -> Tensor:
    """Logits of the whole prompt; those of tensor ranks with the same tokens are equal to the bit."""
    num_tokens = max(int(run.tokens.max()) for run in runs if len(run.tokens)) + 1
    logits = runs[0].logits.new_full((num_tokens, runs[0].logits.shape[1]), torch.nan)
    for rank, run in enumerate(runs):
        first = runs[mesh.tensor_ranks(rank)[0]]
        assert torch.equal(run.logits, first.logits)
        logits[run.tokens] = run.logits
    return logits


def _run_rank(
    folder: Path,
    mesh: Mesh,
    groups: RankGroups,
    attention: Attention,
    prompt: tuple[int, ...],
    exchange: Exchange,
) -> RankRun:
    rank, ranks = groups.everyone.rank, groups.sequence
    share = TensorShare(mesh.tensor_index(rank), mesh.tp)
    decoder = load_decoder(folder, torch.float32, CPU, share=share)
    config = decoder.config
    shape = AttentionShape(config.num_q_heads, config.num_kv_heads, config.head_dim, ELEMENT_BYTES)
    layout, num_ranks = attention.sliced(mesh.sp), attention.num_ranks(mesh.sp)
    plan = make_plan(exchange, layout, num_ranks, shape.of_share(share))
    assert ranks.rank == mesh.sequence_index(rank)
    num_slices = 0

    def end_slice() -> None:
        nonlocal num_slices
        num_slices += 1
        assert not groups.everyone.agree(False)

    slicer = Slicer(max(1_000_000, 50 * len(prompt) ** 2), end_slice)  # some slices in prompts of any length
    schedule = CsaSchedule(plan, LeadingRanks(ranks, num_ranks), config.head_dim**-0.5, slicer)
    tokens = torch.tensor([token for span in plan.spans(ranks.rank) for token in range(span.begin, span.end)])

    def walk(num_rows: int, flops_per_row: int) -> Iterator[slice]:
        return slicer.rows(plan.most_tokens, num_rows, flops_per_row)

    own = torch.tensor(prompt)[tokens.long()]
    hidden = decoder.forward(own, tokens.long(), schedule.attend, walk, groups.tensor)
    logits = decoder.logits(hidden, groups.tensor)
    posted = groups.everyone.bytes_posted
    planned = sum(
        plan.sent_bytes(ranks.rank, layer) if ranks.rank < num_ranks else 0
        for layer in range(config.num_layers)
    )
    counted = tensor_bytes(config, share, len(tokens), len(tokens))
    return RankRun(tokens.long(), logits, num_slices, posted[KIND], planned, posted[SUM_KIND], counted)
