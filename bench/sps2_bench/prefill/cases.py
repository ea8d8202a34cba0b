"""Which prefills are measured, and what they must cost. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal, cast

from sps2_bench.csa import Choice, ProfileName, attention_cost, make_plan, named_layout
from sps2_bench.options import DTYPES
from sps2_engine.models import ModelConfig

SPS2, TRANSFORMERS = "sps2", "transformers"
PROFILES: tuple[ProfileName, ...] = ("exact", "paper", "default", "local")
BASELINES = (TRANSFORMERS,)
EXCHANGES: tuple[Choice, ...] = ("auto", "heads", "kv")


@dataclass(frozen=True)
class Engine:
    """A program that computes prefills, kept alive for the whole run."""

    program: Literal["sps2", "transformers"]
    ranks: int
    """Processes that share a prompt, the cores dealt evenly among them."""
    dtype: str
    """fp32 or bf16."""


PEER = Engine("transformers", 1, "fp32")


@dataclass(frozen=True)
class Case:
    """One row: a prompt length on an engine by a profile."""

    engine: Engine
    length: int
    profile: ProfileName
    exchange: Choice = "heads"
    """What its ranks exchange."""


@dataclass(frozen=True)
class Sample:
    """What one run of a case gave."""

    seconds: float
    """From the last rank's readiness to the first token."""
    token_id: int
    exposed_s: float
    """Longest wait of a rank with nothing left to compute."""
    posted_bytes: int
    """Collectives of all ranks."""
    rss_before: int
    """Of the fattest rank, bytes."""
    peak_rss: int
    """Of the fattest rank, bytes."""


@dataclass(frozen=True)
class Rates:
    """What an engine computes with nothing in its way, all ranks together."""

    attention_flops_per_s: float
    linear_flops_per_s: float


@dataclass(frozen=True)
class Cost:
    """What the plan counts for a case, all ranks and layers together."""

    attention_flops: int
    linear_flops: int
    bytes: int

    @property
    def flops(self) -> int:
        """All of them."""
        return self.attention_flops + self.linear_flops

    def floor_s(self, rates: Rates) -> float:
        """No prefill takes less: its FLOPs at the rates at which attention and matrices are computed."""
        linear_s = self.linear_flops / rates.linear_flops_per_s
        return self.attention_flops / rates.attention_flops_per_s + linear_s


def linear_flops(config: ModelConfig, num_tokens: int) -> int:
    """2 per weight and token, the output matrix for the last token alone."""
    head = config.vocab_size * config.hidden_size
    matrices = config.num_parameters - head * (1 if config.tie_embeddings else 2)
    return 2 * (matrices * num_tokens + head)


def cost_of(case: Case, config: ModelConfig, shard_tokens: int, threads: int = 1) -> Cost:
    """The cost of a case, where a rank has `threads` threads.

    Raises:
        ValueError: its ranks do not divide the shards of its layout.
    """
    ranks = case.engine.ranks
    layout = named_layout(case.profile, case.length, ranks, shard_tokens)
    plan = make_plan(layout, ranks, config, DTYPES[case.engine.dtype], case.exchange, threads)
    flops, moved = attention_cost(plan, config.num_layers)
    return Cost(flops, linear_flops(config, case.length), moved)


def list_cases(
    lengths: Sequence[int],
    profiles: Sequence[str],
    ranks: Sequence[int],
    dtypes: Sequence[str],
    baselines: Sequence[str],
    exchange: Choice = "heads",
) -> Iterator[Case]:
    """All cases, lengths outermost, so that what is compared runs side by side in time.

    transformers runs in fp32 whatever `dtypes` says: it is the fixed point that ratios refer to.
    """
    for length in lengths:
        if TRANSFORMERS in baselines:
            yield Case(PEER, length, "exact")
        for dtype in dtypes:
            for count in ranks:
                for profile in profiles:
                    yield Case(Engine("sps2", count, dtype), length, cast("ProfileName", profile), exchange)


@dataclass(frozen=True)
class Row:
    """A case with its medians."""

    case: Case
    cost: Cost
    samples: tuple[Sample, ...]
    threads: int
    """Threads of each rank."""
    rates: Rates | None
    """Of the engine; None for one that does not tell."""

    @property
    def ttft_s(self) -> float:
        """Median time to first token."""
        return median(sample.seconds for sample in self.samples)

    def document(self, rows: Iterable["Row"]) -> dict[str, object]:
        """The row for JSON; speed-ups are against exact attention on the same engine in the same run.

        `floor_speedup` is what FLOPs allow at the measured rates, `flops_speedup` at one rate for all of them.
        """
        engine, cost, ttft_s, length = self.case.engine, self.cost, self.ttft_s, self.case.length
        by_case = {row.case: row for row in rows}
        rates = self.rates
        exact, peer = (
            by_case.get(replace(self.case, profile="exact")),
            by_case.get(Case(PEER, length, "exact")),
        )
        return {
            "program": engine.program,
            "length": length,
            "profile": self.case.profile,
            "exchange": self.case.exchange,
            "ranks": engine.ranks,
            "threads": self.threads,
            "dtype": engine.dtype,
            "ttft_s": ttft_s,
            "ttft_all_s": [sample.seconds for sample in self.samples],
            "flops": cost.flops,
            "attention_flops": cost.attention_flops,
            "bytes": self.samples[0].posted_bytes,
            "planned_bytes": cost.bytes,
            "exposed_s": median(sample.exposed_s for sample in self.samples),
            "rss_before": max(sample.rss_before for sample in self.samples),
            "peak_rss": max(sample.peak_rss for sample in self.samples),
            "token_id": self.samples[0].token_id,
            "speedup": exact.ttft_s / ttft_s if exact else None,
            "floor_speedup": exact.cost.floor_s(rates) / cost.floor_s(rates) if exact and rates else None,
            "flops_speedup": exact.cost.flops / cost.flops if exact else None,
            "over_transformers": peer.ttft_s / ttft_s if peer else None,
            "attention_flops_per_s": rates.attention_flops_per_s if rates else None,
            "linear_flops_per_s": rates.linear_flops_per_s if rates else None,
        }
