"""How a group's prompts use its cache: what is planned, what is taken when one begins, what becomes of it. No network.

Between the leader's coordinator, which knows attempts and ranks, and the book, which knows neither plans nor heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from sps2_engine.kv_pool import BLOCK_TOKENS
from sps2_layout.layout import Span
from sps2_prefill_worker.planning import PlannedPrompt, PromptPlanner
from sps2_prefill_worker.prefix_cache import NO_MATCH, Admitted, Match, PrefixCache, Prompt
from sps2_prefill_worker.prefix_index import PrefixIndex
from sps2_prefill_worker.scheduler import AttemptKey


@dataclass(frozen=True)
class Wish:
    """How a prompt is computed while the cache is as it is."""

    planned: PlannedPrompt
    match: Match
    """What of its beginning is not computed."""
    num_blocks: int
    """KV blocks that it takes or reads on one rank, at most; also if nothing is cached any more when it begins."""


@dataclass(frozen=True)
class Taken:
    """What a prompt that begins now has of the cache."""

    wish: Wish
    admitted: Admitted
    evicted: Sequence[int]
    """Runs that ranks give up before it begins, those included that they were told of and may not know yet."""


@dataclass(frozen=True)
class Fetch:
    """A part of a prompt's beginning that another group has cached, as it is to lie here."""

    run: int
    """What it will be."""
    tokens: Span
    """All of it, behind what is cached here."""
    spans: Sequence[Span]
    """Of each sequence rank; maybe none."""
    evicted: Sequence[int]
    """Runs that ranks give up before, those included that they were told of and may not know yet."""


class PrefixReuse:
    """The cache of one group, epoch by epoch."""

    def __init__(self, index: PrefixIndex) -> None:
        """`index` is told what is found here."""
        self._index = index
        self._planner: PromptPlanner | None = None
        self._cache = PrefixCache(())
        self._evicted: list[int] = []
        """Since a prompt began: short ones overtake other commands, and may need the room."""
        self.num_prompt_tokens = 0
        """Of prompts begun, in the life of this process."""
        self.num_cached_tokens = 0
        """Of them, those that were not computed."""

    def begin_epoch(self, planner: PromptPlanner) -> None:
        """A group has formed; it holds nothing."""
        self._planner = planner
        self._cache = PrefixCache([planner.costs.kv_blocks] * planner.mesh.sp)
        self._evicted = []

    def end_epoch(self) -> None:
        """Its ranks have forgotten everything."""
        self._cache = PrefixCache(())
        self._index.drop_all()

    def plan(self, prompt: Prompt) -> Wish:
        """How a prompt would be computed now."""
        planner, match = self._of_group, self._cache.find(prompt)
        whole = -(-planner.most_kept(prompt.attention, prompt.num_tokens) // BLOCK_TOKENS)
        if match.num_tokens:
            planned = planner.plan(prompt.attention, prompt.num_tokens, match.tokens_by_rank())
            most = self._cache.most_blocks(match, self._spans(planned))
            if most <= planner.costs.kv_blocks:
                return Wish(planned, match, max(most, whole))
        return Wish(planner.plan(prompt.attention, prompt.num_tokens), NO_MATCH, whole)

    def begin(self, key: AttemptKey, prompt: Prompt, wish: Wish, alone_on: int | None) -> Taken | None:
        """Takes what is cached of a prompt, and makes room for the rest.

        Args:
            key: of the attempt.
            prompt: its text.
            wish: as it stood in line.
            alone_on: the sequence rank that computes it by itself.

        Returns:
            None where less of it is cached than it stood in line for.
        """
        if not wish.planned.alone and self._cache.find(prompt) != wish.match:
            now = self.plan(prompt)
            if now.match.num_tokens < wish.match.num_tokens:
                return None
            # What was long keeps its turn among the long ones.
            is_short = bool(wish.planned.interlude_flops)
            wish = now if is_short else replace(now, planned=replace(now.planned, interlude_flops=0))
        admitted = self._cache.admit(key, prompt, wish.match, self._spans(wish.planned, alone_on))
        self._evicted += admitted.evicted
        evicted, self._evicted = self._evicted, []
        self._tell()
        self.num_prompt_tokens += prompt.num_tokens
        self.num_cached_tokens += wish.match.num_tokens
        return Taken(wish, admitted, evicted)

    def num_cached(self, prompt: Prompt) -> int:
        """Tokens of a prompt's beginning that are cached here."""
        return self._cache.find(prompt).num_tokens

    def begin_fetch(self, key: AttemptKey, prompt: Prompt, num_tokens: int) -> Fetch | None:
        """Makes room for what comes of a prompt's beginning, and keeps what is cached of it.

        To the book a fetch is an attempt that computes the beginning: `delivered` when it is complete, `abandon` and
        `forget` when it is not.

        Args:
            key: of the attempt that it is for.
            prompt: its text.
            num_tokens: of the beginning, whole blocks.

        Returns:
            None where it is cached here already, or others would have to wait for its room.
        """
        beginning = replace(prompt, keys=prompt.keys[: num_tokens // BLOCK_TOKENS], num_tokens=num_tokens + 1)
        match = self._cache.find(beginning)
        tokens = Span(match.num_tokens, num_tokens)
        spans = _shared_by_blocks(tokens, self._of_group.mesh.sp)
        by_rank = [[span] for span in spans]
        if not tokens or not self._cache.has_idle_room(match, by_rank):
            return None
        admitted = self._cache.admit(key, beginning, match, by_rank)
        self._gone(admitted.evicted)
        assert admitted.run is not None, "it ends behind what is cached"
        return Fetch(admitted.run.number, tokens, spans, list(self._evicted))

    def lend(self, key: AttemptKey, prompt: Prompt) -> Match | None:
        """Holds a whole beginning for another group to copy, until `forget`; None where it is not cached."""
        match = self._cache.find(prompt)
        if match.num_tokens < len(prompt.keys) * BLOCK_TOKENS:
            return None
        self._cache.admit(key, prompt, match, [[] for _ in range(self._of_group.mesh.sp)])
        return match

    def delivered(self, key: AttemptKey) -> Sequence[int]:
        """See `PrefixCache.delivered`."""
        return self._gone(self._cache.delivered(key))

    def abandon(self, key: AttemptKey) -> Sequence[int]:
        """See `PrefixCache.abandon`."""
        return self._gone(self._cache.abandon(key))

    def forget(self, key: AttemptKey) -> None:
        """See `PrefixCache.forget`."""
        self._cache.forget(key)

    @property
    def _of_group(self) -> PromptPlanner:
        assert self._planner is not None, "prompts come to a group that is formed"
        return self._planner

    def _spans(self, planned: PlannedPrompt, alone_on: int | None = None) -> list[list[Span]]:
        mesh = self._of_group.mesh
        return [planned.spans(rank, alone_on) for rank in range(0, mesh.size, mesh.tp)]

    def _gone(self, runs: list[int]) -> Sequence[int]:
        self._evicted += runs
        self._tell()
        return runs

    def _tell(self) -> None:
        self._index.tell(self._cache.take_changes())


def _shared_by_blocks(tokens: Span, num_ranks: int) -> list[Span]:
    """Whole blocks of these tokens, about as many for each rank."""
    num_blocks = len(tokens) // BLOCK_TOKENS
    ends = [tokens.begin + num_blocks * rank // num_ranks * BLOCK_TOKENS for rank in range(num_ranks + 1)]
    return [Span(begin, end) for begin, end in pairwise(ends)]
