"""A prompt behind what is cached, on real ranks under a real book: the same KV and token as computed whole."""

import random
from collections.abc import Sequence

import pytest
import torch

from sps2.internal.v1 import engine_pb2
from sps2_engine.attention.cost_model import Choice
from sps2_engine.mesh import Mesh
from sps2_layout.attention import Attention
from sps2_layout.block_hash import BLOCK_TOKENS, block_hashes
from sps2_layout.profiles import Ladder, Profile
from sps2_layout.wire import pack_attention
from sps2_prefill_worker.prefix_cache import Prompt
from sps2_prefill_worker.prefix_index import NO_INDEX, fill_cached
from sps2_prefill_worker.reuse import PrefixReuse
from support.checkpoints import VOCAB_SIZE, make_tiny_checkpoint
from support.prefill_ranks import PrefillRanks, cancel, prefill

pytestmark = pytest.mark.timeout(120)

DRAW = random.Random(7)
FIRST = DRAW.choices(range(VOCAB_SIZE), k=500)
SECOND = FIRST[:470] + DRAW.choices(range(VOCAB_SIZE), k=200)
THIRD = SECOND + DRAW.choices(range(VOCAB_SIZE), k=3 * BLOCK_TOKENS)
BRANCH = FIRST[:200] + DRAW.choices(range(VOCAB_SIZE), k=90)
SPARSE = Ladder("sparse", (Profile(4, ((1, 1), (4, 4)), tail=16),), 1)


@pytest.fixture(
    scope="module",
    params=[Mesh(1, 1), Mesh(2, 1), Mesh(3, 1), Mesh(2, 2)],
    ids=lambda mesh: f"{mesh.sp}x{mesh.tp}",
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PrefillRanks:
    model = make_tiny_checkpoint(tmp_path_factory.mktemp("reuse") / "tiny", "llama")
    return PrefillRanks(model, request.param)


class Leader:
    """Tells ranks of prompts, which the decode group holds already: nothing is sent, so that each is delivered."""

    def __init__(self, ranks: PrefillRanks, choice: Choice = "heads") -> None:
        self.ranks = ranks
        self.reuse = PrefixReuse(NO_INDEX)
        self.reuse.begin_epoch(ranks.planner(choice))
        self.number = 0
        self.gone: list[int] = []

    def prefill(
        self, ids: Sequence[int], attention: Attention, *, salt: bytes = b""
    ) -> tuple[list[engine_pb2.EngineCommand], int]:
        """What each rank is told of a text, and how much of it is cached."""
        prompt = Prompt(attention, tuple(block_hashes(ids, "model", salt)), len(ids))
        self.number += 1
        key = (str(self.number), 1)
        taken = self.reuse.begin(key, prompt, self.reuse.plan(prompt), None)
        assert taken is not None
        runs = []
        for rank in range(self.ranks.mesh.size):
            run = engine_pb2.RunPrefill(
                num_prompt_tokens=len(ids),
                attention=pack_attention(attention),
                slice_flops=1 << 40,
                number=self.number,
            )
            run.attempt.request_id, run.attempt.number = key
            run.placement.held.add(rank=0, token_begin=0, token_end=len(ids))
            run.choice.sampling.top_p = 1.0
            taken.wish.planned.assign(rank, run, ids)
            run.interlude_flops = 0
            fill_cached(run, taken.admitted, taken.evicted)
            runs.append(run)
        self.gone += self.reuse.delivered(key)
        return prefill(runs), taken.wish.match.num_tokens

    def serve(
        self, texts: Sequence[tuple[Sequence[int], Attention]]
    ) -> tuple[list[int], list[int], list[torch.Tensor]]:
        """First tokens, cached tokens and the KV of texts that come one after another, in an epoch of their own."""
        told = [self.prefill(ids, attention) for ids, attention in texts]
        self.ranks.execute([commands for commands, _ in told], told=len(told))
        assert self.ranks.errors == [None] * self.ranks.mesh.size
        tokens = [self.ranks.first_token(str(number)) for number in range(1, self.number + 1)]
        kv = [self.kv_of(commands) for commands, _ in told]
        for role in self.ranks.roles:
            role.reset()
        assert self.ranks.blocks_used == [0] * self.ranks.mesh.size
        return tokens, [cached for _, cached in told], kv

    def kv_of(self, commands: Sequence[engine_pb2.EngineCommand]) -> torch.Tensor:
        """KV of the full blocks of a text, by token: [tokens, 2, layers, kv_heads, head_dim]."""
        end = commands[0].run_prefill.num_prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
        parts: dict[int, dict[int, torch.Tensor]] = {}
        for rank, command in enumerate(commands):
            role, run = self.ranks.roles[rank], command.run_prefill
            arena = role._model.arena
            read = list(run.cached.parts)
            if run.HasField("keep"):
                read.append(engine_pb2.CachedPart(run=run.keep.run, token_begin=0, token_end=end))
            for one in role._loaded_publisher._kept.find(read):
                for span in one.spans:
                    slots = [s for begin, stop in one.rows.slots(span) for s in range(begin, stop)]
                    both = torch.stack([arena.k[:, slots], arena.v[:, slots]]).permute(2, 0, 1, 3, 4)
                    for token, kv in zip(range(span.begin, span.end), both, strict=True):
                        parts.setdefault(token, {})[rank % self.ranks.mesh.tp] = kv
        assert sorted(parts) == list(range(end))
        return torch.stack(
            [torch.cat([one[t] for t in sorted(one)], dim=-2) for _, one in sorted(parts.items())]
        )


def exact(ids: Sequence[int]) -> tuple[Sequence[int], Attention]:
    return ids, Attention(len(ids), len(ids))


@pytest.mark.parametrize("choice", ["heads", "kv"])
def test_exact_kv_behind_cached_kv_is_that_of_the_whole_text(ranks: PrefillRanks, choice: Choice) -> None:
    """A turn behind a turn behind a document, and a branch from its middle: each as if computed by itself."""
    texts = [exact(ids) for ids in (FIRST, SECOND, THIRD, BRANCH, FIRST)]
    tokens, cached, kv = Leader(ranks, choice).serve(texts)
    assert cached == [0, 448, 640, 192, 448]
    for text, token, seen in zip(texts, tokens, kv, strict=True):
        (alone,), _, (expected,) = Leader(ranks, choice).serve([text])
        assert token == alone
        torch.testing.assert_close(seen, expected, atol=2e-5, rtol=2e-4)


def test_an_adopted_layout_gives_the_same_kv_cached_or_not(ranks: PrefillRanks) -> None:
    """C tokens under the mask of the first text and dense queries behind: also where the first was never computed."""
    first = Attention.admit(SPARSE, len(FIRST))
    adopting = first.adopting(448)
    again = adopting.adopting(640)
    assert again == adopting, "a third turn keeps the C of the second"
    texts = [(FIRST, first), (SECOND, adopting), (THIRD, again)]
    tokens, cached, kv = Leader(ranks).serve(texts)
    assert cached == [0, 448, 640]
    for text, token, seen in zip(texts, tokens, kv, strict=True):
        (alone,), _, (expected,) = Leader(ranks).serve([text])
        assert token == alone
        torch.testing.assert_close(seen, expected, atol=2e-5, rtol=2e-4)
    _, _, (dense,) = Leader(ranks).serve([exact(SECOND)])
    assert not torch.allclose(kv[1], dense, atol=1e-3)


def test_kv_of_another_layout_is_not_mixed_in(ranks: PrefillRanks) -> None:
    first = Attention.admit(SPARSE, len(FIRST))
    texts = [(FIRST, first), exact(SECOND), (SECOND, Attention.admit(SPARSE, len(SECOND)))]
    _, cached, _ = Leader(ranks).serve(texts)
    assert cached == [0, 0, 0]


def test_a_prompt_given_up_leaves_nothing_to_be_found(ranks: PrefillRanks) -> None:
    """Its blocks are free on every rank, those of what it read are cached as before."""
    leader = Leader(ranks)
    before, _ = leader.prefill(*exact(FIRST))
    ranks.execute([before])
    cached = [role.kv_blocks_cached for role in ranks.roles]
    prompt = Prompt(exact(SECOND)[1], tuple(block_hashes(SECOND, "model", b"")), len(SECOND))
    key = ("given up", 1)
    taken = leader.reuse.begin(key, prompt, leader.reuse.plan(prompt), None)
    assert taken is not None
    assert taken.wish.match.num_tokens == 448
    runs = []
    for rank in range(ranks.mesh.size):
        run = engine_pb2.RunPrefill(
            num_prompt_tokens=len(SECOND),
            attention=pack_attention(prompt.attention),
            slice_flops=1 << 40,
            number=2,
        )
        run.attempt.request_id, run.attempt.number = key
        run.placement.shards.add(rank=0, token_begin=0, token_end=len(SECOND))
        run.choice.sampling.top_p = 1.0
        taken.wish.planned.assign(rank, run, SECOND)
        fill_cached(run, taken.admitted, taken.evicted)
        runs.append(run)
    evicted = engine_pb2.EngineCommand()
    evicted.evict_prefixes.runs.extend(leader.reuse.abandon(key))
    given_up = cancel("given up", ranks.mesh.size)
    ranks.execute([prefill(runs), given_up, [evicted] * ranks.mesh.size], told=2)
    leader.reuse.forget(key)
    assert ranks.blocks_used == [0] * ranks.mesh.size
    assert [role.kv_blocks_cached for role in ranks.roles] == cached
    assert leader.reuse.plan(prompt).match.num_tokens == 448
    for role in ranks.roles:
        role.reset()


def test_tenants_do_not_share(ranks: PrefillRanks) -> None:
    leader = Leader(ranks)
    assert [leader.prefill(*exact(FIRST), salt=salt)[1] for salt in (b"one", b"other", b"one")] == [0, 0, 448]
