"""Which decodes are measured, and what they must cost. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from statistics import linear_regression, median, quantiles
from typing import Any, Literal

from sps2_engine.attention.decode_plan import DecodePlan, DecodeRow, place_tokens
from sps2_engine.kv_pool import BLOCK_TOKENS
from sps2_engine.mesh import TensorShare
from sps2_engine.models import ModelConfig
from sps2_engine.models.tensor_bytes import tensor_bytes

SPS2, TRANSFORMERS = "sps2", "transformers"
BASELINES = (TRANSFORMERS,)
MOVES = ("q", "kv")
CACHES = ("dynamic", "static")
KV_BYTES = 4
"""Of an element: KV stays in fp32 on a CPU, whatever the model computes in."""


@dataclass(frozen=True)
class Engine:
    """A program that decodes, kept alive for the whole run."""

    program: Literal["sps2", "transformers"]
    form: str
    """What travels ("q" or "kv"), or the cache of transformers ("dynamic" or "static")."""
    ranks: int
    """Ranks among which rows and their KV lie."""
    dtype: str
    """fp32 or bf16."""
    tensor: int = 1
    """Tensor ranks: the processes that split the layers of each of these."""

    @property
    def processes(self) -> int:
        """The cores are dealt evenly among them."""
        return self.ranks * self.tensor


@dataclass(frozen=True)
class Case:
    """One row of the result: a batch of equal contexts on an engine."""

    engine: Engine
    context: int
    """Tokens of each row before the first measured step (less the steps that warm up)."""
    batch: int


@dataclass(frozen=True)
class Sample:
    """What one run of a case gave."""

    step_s: tuple[float, ...]
    """Time between tokens, step by step."""
    bytes_per_token: float
    """Posted by all ranks for attention in the measured steps, for each token of each row."""
    token_ids: tuple[tuple[int, ...], ...]
    """Tokens of each row, warm-up included."""
    tensor_bytes_per_token: float = 0.0
    """What tensor ranks posted to sum and gather; not among `bytes_per_token`."""


def rows_of(
    context: int, batch: int, ranks: int
) -> tuple[tuple[DecodeRow, ...], tuple[tuple[int, int], ...]]:
    """How a batch lies on a group: its rows, and the tokens of each holder (the same for all rows).

    Each row lies on as many ranks as its blocks allow; the rows' homes take turns.
    """
    ranges = place_tokens(context, BLOCK_TOKENS, ranks, 1)
    holders = tuple(range(len(ranges)))
    return tuple(DecodeRow(row, row % len(ranges), holders) for row in range(batch)), ranges


def planned_bytes_per_token(case: Case, config: ModelConfig) -> float:
    """The closed form of what a token makes travel, all layers: of Q and back, or of KV to the home."""
    if case.engine.program == TRANSFORMERS:
        return 0.0
    ranks = case.engine.ranks
    rows, ranges = rows_of(case.context, case.batch, ranks)
    if case.engine.form == "q":
        plan = DecodePlan(rows, ranks, config.num_q_heads, config.head_dim, KV_BYTES)
        return sum(plan.row_bytes_per_layer(row) for row in rows) * config.num_layers / case.batch
    away = sum(case.context - (ranges[row.home][1] - ranges[row.home][0]) for row in rows)
    return away * kv_token_bytes(config) / case.batch


def planned_tensor_bytes_per_token(case: Case, config: ModelConfig) -> float:
    """The same of what tensor ranks sum and gather, for the rows of each home."""
    tensor = case.engine.tensor
    shares = [TensorShare(index, tensor) for index in range(tensor)]
    homes = Counter(row.home for row in rows_of(case.context, case.batch, case.engine.ranks)[0])
    posted = sum(tensor_bytes(config, share, count, count) for share in shares for count in homes.values())
    return posted / case.batch


def kv_token_bytes(config: ModelConfig) -> int:
    """Bytes of one token's KV, all layers."""
    return 2 * config.num_kv_heads * config.head_dim * KV_BYTES * config.num_layers


def read_bytes(case: Case, config: ModelConfig) -> int:
    """What a step reads at least: the weights (on each rank that is a home) and all KV."""
    num_homes = len({row.home for row in rows_of(case.context, case.batch, case.engine.ranks)[0]})
    element = 2 if case.engine.dtype == "bf16" else 4
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    weights = (config.num_parameters - embedding) * element
    return num_homes * weights + case.batch * case.context * kv_token_bytes(config)


def list_cases(
    contexts: Sequence[int],
    batches: Sequence[int],
    ranks: Sequence[int],
    dtypes: Sequence[str],
    moves: Sequence[str],
    baselines: Sequence[str],
    tensors: Sequence[int] = (1,),
) -> Iterator[Case]:
    """All cases, contexts and batches outermost, so that what is compared runs side by side in time.

    transformers runs in fp32 whatever `dtypes` says: it is the fixed point that ratios refer to.
    """
    engines = [Engine("transformers", form, 1, "fp32") for form in CACHES if TRANSFORMERS in baselines]
    for dtype in dtypes:
        for count, tensor in product(ranks, tensors):
            # One rank holds everything: nothing travels either way.
            forms = moves if count > 1 else moves[:1]
            engines.extend(Engine("sps2", form, count, dtype, tensor) for form in forms)
    for context in contexts:
        for batch in batches:
            for engine in engines:
                yield Case(engine, context, batch)


@dataclass(frozen=True)
class Row:
    """A case with its figures."""

    case: Case
    samples: tuple[Sample, ...]
    threads: int
    """Threads of each rank."""
    config: ModelConfig

    @property
    def tbt_p50_s(self) -> float:
        """Median time between tokens."""
        return median(self._steps)

    @property
    def tbt_p99_s(self) -> float:
        """Its 99th percentile."""
        return quantiles(self._steps, n=100, method="inclusive")[98]

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all rows over the time of all steps, median of the runs."""
        return median(self.case.batch * len(one.step_s) / sum(one.step_s) for one in self.samples)

    @property
    def _steps(self) -> list[float]:
        return [step for one in self.samples for step in one.step_s]

    def document(self, rows: Iterable["Row"]) -> dict[str, Any]:
        """The row for JSON, beside transformers on the same batch in the same run.

        `speedup` is over `generate` as it is, whose cache is the dynamic one.
        """
        peers = {
            row.case.engine.form: row
            for row in rows
            if row.same_batch(self) and row.case.engine.program == TRANSFORMERS
        }
        peer = peers.get("dynamic")
        engine, sample = self.case.engine, self.samples[0]
        floor_bytes = read_bytes(self.case, self.config)
        return {
            "program": engine.program,
            "form": engine.form,
            "context": self.case.context,
            "batch": self.case.batch,
            "ranks": engine.ranks,
            "tensor": engine.tensor,
            "threads": self.threads,
            "dtype": engine.dtype,
            "tokens_per_s": self.tokens_per_s,
            "tbt_p50_s": self.tbt_p50_s,
            "tbt_p99_s": self.tbt_p99_s,
            "num_steps": len(self._steps),
            "bytes_per_token": sample.bytes_per_token,
            "planned_bytes_per_token": planned_bytes_per_token(self.case, self.config),
            "tensor_bytes_per_token": sample.tensor_bytes_per_token,
            "planned_tensor_bytes_per_token": planned_tensor_bytes_per_token(self.case, self.config),
            "read_bytes": floor_bytes,
            "read_bytes_per_s": floor_bytes / self.tbt_p50_s,
            "speedup": self._over(peer),
            "speedup_static": self._over(peers.get("static")),
            "same_streams": self._same_streams(peer) if peer else None,
        }

    def same_batch(self, other: "Row") -> bool:
        """Whether the other decodes as many rows of the same context."""
        return (self.case.context, self.case.batch) == (other.case.context, other.case.batch)

    def _over(self, peer: "Row | None") -> float | None:
        return self.tokens_per_s / peer.tokens_per_s if peer else None

    def _same_streams(self, peer: "Row") -> int:
        """Rows whose tokens are the peer's, every one."""
        pairs = zip(self.samples[0].token_ids, peer.samples[0].token_ids, strict=True)
        return sum(ours == theirs for ours, theirs in pairs)


def slopes(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes of a generated token over tokens of context, least squares, where there are several contexts."""
    names = ("program", "form", "dtype", "ranks", "tensor", "batch")
    keyed = sorted(((tuple(row[name] for name in names), row) for row in rows), key=lambda pair: pair[0])
    found = []
    for key, group in groupby(keyed, key=lambda pair: pair[0]):
        points = [(row["context"], row["bytes_per_token"]) for _, row in group]
        if len({context for context, _ in points}) > 1 and key[0] == SPS2:
            slope = linear_regression(*zip(*points, strict=True)).slope
            found.append({**dict(zip(names, key, strict=True)), "bytes_per_token_and_context_token": slope})
    return found
