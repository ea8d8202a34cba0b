"""Profiles: how a prompt's layout follows from its length alone. Pure.

It never depends on how many ranks serve a prompt: the same prompt has the same answer at every degree.
"""

from dataclasses import dataclass, replace

from sps2_layout.layout import Layout, Level

MIN_SHARD_TOKENS = 4096
"""A prompt is dense while a shard would fall under this."""
MAX_SHARDS = 1024
STRIDE = 8
"""One of so many tokens is sampled beyond a shard: the paper's, and what the accuracy rule chose."""
DEFAULT_TAIL = 64


@dataclass(frozen=True)
class Profile:
    """One form of CSA, before the prompt is known."""

    num_shards: int
    """N, a power of two."""
    levels: tuple[tuple[int, int], ...]
    """(group, stride) by level; groups are powers of two."""
    dense_queries: bool = False
    """Whether every query reads the sampled keys, or only the sampled queries."""
    sinks: int = 0
    """First tokens, which every query sees."""
    tail: int = 0
    """Last tokens, which see everything."""

    def __post_init__(self) -> None:
        for size in (self.num_shards, *(group for group, _ in self.levels)):
            if not 1 <= size <= MAX_SHARDS or size & (size - 1):
                raise ValueError(f"shards and groups must be powers of two up to {MAX_SHARDS}, not {size}")
        if any(stride < 1 for _, stride in self.levels):
            raise ValueError("strides must be at least 1")
        self.resolve(1)  # the layout checks how levels relate to each other

    def resolve(self, num_tokens: int) -> Layout:
        """The layout of a prompt: A = ceil(S / N), rounded up to whole strides of the last level."""
        stride = self.levels[-1][1] if self.levels else 1
        shard_tokens = -(-num_tokens // (self.num_shards * stride)) * stride
        levels = tuple(Level(group, stride) for group, stride in self.levels)
        return Layout(
            num_tokens, levels, self.num_shards, shard_tokens, self.dense_queries, self.sinks, self.tail
        )


@dataclass(frozen=True)
class Ladder:
    """Chooses a profile by the prompt's length: the one of most shards that are long enough; dense below."""

    name: str
    """What requests, flags and usage call it."""
    rungs: tuple[Profile, ...] = ()
    """By number of shards, ascending; none: always dense."""
    min_shard_tokens: int = MIN_SHARD_TOKENS
    """Shortest shard for which a rung is taken."""

    def __post_init__(self) -> None:
        counts = [rung.num_shards for rung in self.rungs]
        if self.min_shard_tokens < 1 or counts != sorted(set(counts)):
            raise ValueError("rungs must have ascending numbers of shards, and shards at least one token")

    def resolve(self, num_tokens: int) -> Layout | None:
        """The layout of a prompt of S tokens; None where it is dense."""
        fitting = [rung for rung in self.rungs if num_tokens // rung.num_shards >= self.min_shard_tokens]
        return fitting[-1].resolve(num_tokens) if fitting else None


def paper_profile(num_shards: int) -> Profile:
    """The paper's: levels [(1, 1), (N, 8)], sampled queries, no tail, no sinks."""
    return Profile(num_shards, ((1, 1), (num_shards, STRIDE)))


def default_profile(num_shards: int) -> Profile:
    """The paper's and a dense tail of 64 tokens, without which a question at the prompt's end sees an eighth of it.

    Chosen by the rule of `sps2 eval accuracy` (bench/results/accuracy): the cheapest of those that keep perplexity
    and retrieval and see more of the prompt than shards by themselves.
    """
    return replace(paper_profile(num_shards), tail=DEFAULT_TAIL)


RUNG_SHARDS = tuple(2**power for power in range(1, MAX_SHARDS.bit_length()))
EXACT = Ladder("exact")
PAPER = Ladder("paper", tuple(paper_profile(count) for count in RUNG_SHARDS))
DEFAULT = Ladder("default", tuple(default_profile(count) for count in RUNG_SHARDS))
NAMED = {ladder.name: ladder for ladder in (EXACT, PAPER, DEFAULT)}
"""The profiles that have a name."""
