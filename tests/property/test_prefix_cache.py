"""The leader's book of cached KV, beside a rank that obeys it: blocks add up, what is read stays, and is the text's."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sps2.internal.v1 import engine_pb2
from sps2_engine.kv_pool import BLOCK_TOKENS, BlockPool
from sps2_engine.kv_transfer.rows import Rows, UsedRows
from sps2_layout.attention import Attention
from sps2_layout.layout import Span, exact_layout
from sps2_layout.profiles import Ladder, Profile
from sps2_prefill_worker.kept_runs import KeptRuns
from sps2_prefill_worker.prefix_cache import NO_MATCH, Admitted, PrefixCache, Prompt

NUM_RANKS = 2
BLOCKS = 24
SPARSE = Ladder("sparse", (Profile(2, ((1, 1), (2, 2)), tail=8),), 1)
WORDS = [b"a", b"b"]


@dataclass
class UnderWay:
    """An attempt that the ranks compute or deliver."""

    admitted: Admitted
    blocks: list[list[int]]
    """Its own, on each rank."""
    read: list[list[UsedRows]]


def spans_of(first: int, end: int) -> list[list[Span]]:
    layout = exact_layout(end - first, NUM_RANKS)
    tokens = [layout.rank_tokens(rank, NUM_RANKS) for rank in range(NUM_RANKS)]
    return [[Span(one.begin + first, one.end + first)] if len(one) else [] for one in tokens]


class Book(RuleBasedStateMachine):
    """Prompts over a tiny alphabet, so that many begin alike."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache([BLOCKS] * NUM_RANKS)
        self.pools = [BlockPool(BLOCKS) for _ in range(NUM_RANKS)]
        self.kept = [KeptRuns(pool) for pool in self.pools]
        self.under_way: dict[int, UnderWay] = {}
        self.number = 0
        self.told: set[tuple[Attention, bytes]] = set()
        self.written = [[b""] * (BLOCKS * BLOCK_TOKENS) for _ in range(NUM_RANKS)]
        """Of each slot, the text up to its token, as far as it is in blocks."""

    @rule(
        words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=20),
        rest=st.integers(0, BLOCK_TOKENS - 1),
        sparse=st.booleans(),
        adopts=st.booleans(),
    )
    def begin(self, words: list[bytes], rest: int, sparse: bool, adopts: bool) -> None:
        keys = tuple(b"".join(words[: index + 1]) for index in range(len(words)))
        num_tokens = len(words) * BLOCK_TOKENS + rest
        attention = Attention.admit(SPARSE, num_tokens) if sparse else Attention(num_tokens, num_tokens)
        if sparse and adopts and len(words) > 1:
            longer = Attention.admit(SPARSE, (len(words) - 1) * BLOCK_TOKENS)
            attention = longer.adopting(BLOCK_TOKENS * (len(words) // 2))
        prompt = Prompt(attention, keys, num_tokens)
        match = self.cache.find(prompt)
        assert match.num_tokens < num_tokens
        spans = spans_of(match.num_tokens, num_tokens)
        if self.cache.most_blocks(match, spans) > BLOCKS:
            assert match.num_tokens, "a prompt by itself always has room in the end"
            match, spans = NO_MATCH, spans_of(0, num_tokens)
        taken = [-(-sum(map(len, own)) // BLOCK_TOKENS) for own in spans]
        in_use = [sum(len(one.blocks[rank]) for one in self.under_way.values()) for rank in range(NUM_RANKS)]
        readers = {run for one in self.under_way.values() for run, _ in one.admitted.match.parts}
        self.number += 1
        is_idle = self.cache.has_idle_room(match, spans)
        to_be_kept = sum(one.admitted.run is not None for one in self.under_way.values())
        admitted = self.cache.admit(self.number, prompt, match, spans)
        path = {run.number for run, _ in match.parts}
        assert not path & set(admitted.evicted), "nothing goes that the prompt itself reads"
        assert (
            admitted.match.tokens_by_rank() == [] or sum(admitted.match.tokens_by_rank()) == match.num_tokens
        )
        read_before = {run.number for run in readers}
        if read_before & set(admitted.evicted):
            kept = readers | {run for run, _ in match.parts}
            held = [sum(run.num_blocks[rank] for run in kept) for rank in range(NUM_RANKS)]
            assert any(h + u + t > BLOCKS for h, u, t in zip(held, in_use, taken, strict=True)), (
                "what is read goes only where nothing else would do"
            )
        if is_idle:
            assert not read_before & set(admitted.evicted), "nobody notices"
            assert to_be_kept == sum(one.admitted.run is not None for one in self.under_way.values())
            assert min(self.cache.num_free) >= 0
        self._evict(admitted.evicted)
        parts = [
            engine_pb2.CachedPart(run=run.number, token_begin=span.begin, token_end=span.end)
            for run, span in match.parts
        ]
        read = [kept.find(parts) for kept in self.kept]
        for rank, cached in enumerate(read):
            assert sum(len(span) for one in cached for span in one.spans) == (
                admitted.match.tokens_by_rank()[rank] if match.num_tokens else 0
            )
            for one in cached:
                self.pools[rank].share(one.rows.blocks)
        while any(pool.num_free < wanted for pool, wanted in zip(self.pools, taken, strict=True)):
            # A rank waits here: what is under way must be enough, without another word of the leader.
            assert self.under_way, "a rank would wait for ever"
            self._deliver(next(iter(self.under_way)))
        blocks = [pool.allocate(wanted) for pool, wanted in zip(self.pools, taken, strict=True)]
        self.under_way[self.number] = UnderWay(admitted, blocks, read)
        self._compute(keys, rest, spans, self.under_way[self.number])

    def _compute(self, keys: tuple[bytes, ...], rest: int, spans: list[list[Span]], one: UnderWay) -> None:
        """Fills the attempt's own blocks, and looks at what its transfers would read."""
        labels = [key for key in keys for _ in range(BLOCK_TOKENS)] + [b"%d" % self.number] * rest
        own = [Rows(own_spans, blocks) for own_spans, blocks in zip(spans, one.blocks, strict=True)]
        for rank, rows in enumerate(own):
            for span in rows.spans:
                self._write(rank, rows.slots(span), labels[span.begin : span.end])
        sources = [[*read, UsedRows.of_all(rows)] for read, rows in zip(one.read, own, strict=True)]
        self._check_sources(sources, labels)

    def _write(self, rank: int, slots: list[tuple[int, int]], labels: list[bytes]) -> None:
        for begin, end in slots:
            self.written[rank][begin:end], labels = labels[: end - begin], labels[end - begin :]
        assert not labels

    def _check_sources(self, sources: list[list[UsedRows]], labels: list[bytes]) -> None:
        """Each token of the text is held once, and what is held is that text's. The first and last of each block."""
        first = range(0, len(labels), BLOCK_TOKENS)
        for token in sorted({*first, *(one - 1 for one in first[1:]), len(labels) - 1}):
            (found,) = [
                self.written[rank][used.rows.slots(Span(token, token + 1))[0][0]]
                for rank, held in enumerate(sources)
                for used in held
                if used.hold(Span(token, token + 1))
            ]
            assert found == labels[token]

    @precondition(lambda self: self.under_way)
    @rule(choose=st.integers(0, 9))
    def deliver(self, choose: int) -> None:
        self._deliver(list(self.under_way)[choose % len(self.under_way)])

    @precondition(lambda self: self.under_way)
    @rule(choose=st.integers(0, 9))
    def cancel(self, choose: int) -> None:
        number = list(self.under_way)[choose % len(self.under_way)]
        one = self.under_way.pop(number)
        for rank, blocks in enumerate(one.blocks):
            self._free(rank, one, blocks)
        self._evict(self.cache.abandon(number))
        self.cache.forget(number)

    def _deliver(self, number: int) -> None:
        one = self.under_way.pop(number)
        run = one.admitted.run
        for rank, blocks in enumerate(one.blocks):
            self._free(rank, one, [] if run else blocks)
            if run is not None:
                self.kept[rank].keep(run.number, Rows(run.spans[rank], blocks), run.end)
        self._evict(self.cache.delivered(number))

    def _free(self, rank: int, one: UnderWay, blocks: list[int]) -> None:
        self.pools[rank].free(blocks)
        for part in one.read[rank]:
            self.pools[rank].free(part.rows.blocks)

    def _evict(self, numbers: list[int]) -> None:
        for kept in self.kept:
            for number in numbers:
                kept.evict(number)
        changes = self.cache.take_changes()
        assert not set(changes.recorded) & self.told
        self.told = self.told - set(changes.evicted) | set(changes.recorded)

    @invariant()
    def blocks_add_up(self) -> None:
        for rank, pool in enumerate(self.pools):
            pool.check()
            kept = {block for rows in self.kept[rank]._runs.values() for block in rows.blocks}
            own = {block for one in self.under_way.values() for block in one.blocks[rank]}
            read = {b for one in self.under_way.values() for part in one.read[rank] for b in part.rows.blocks}
            assert len(kept | own | read) + pool.num_free == BLOCKS
            assert not own & (kept | read)
            assert len(kept) == self.cache.num_cached[rank]

    @invariant()
    def what_is_told_is_held(self) -> None:
        """Every key that others were told of is found here, with all before it."""
        runs = self.cache._runs.values()
        assert self.told == {(run.attention, key) for run in runs for key in run.keys}
        for run in runs:
            assert all(one.number in self.cache._runs for one in run.path()), "a chain loses its tail first"

    def teardown(self) -> None:
        for number in list(self.under_way):
            self._deliver(number)
        assert all(f + c == BLOCKS for f, c in zip(self.cache.num_free, self.cache.num_cached, strict=True))
        for kept, pool in zip(self.kept, self.pools, strict=True):
            kept.clear()
            assert pool.num_free == BLOCKS


Book.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBook = Book.TestCase
