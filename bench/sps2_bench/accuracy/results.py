"""From scores of prompts to figures with intervals, and the default by its rule. Pure.

A prompt is the unit of the bootstrap, and every profile sees the same resamples: differences are paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sps2_bench.accuracy.candidates import EXACT, Candidate
from sps2_bench.statistics import Bootstrap, Estimate, Floats

MAX_PERPLEXITY_LOSS = 0.01
MAX_RETRIEVAL_LOSS = 0.02
DEPTH_BINS = 8

_NLL, _TOKENS, _KL, _PROMPTS, _REPEAT_NLL, _REPEATS, _RIGHT_1, _ASKED_1, _RIGHT_2, _ASKED_2 = range(10)
_FIELDS = 10

Answers = Sequence[Mapping[str, Any]]
"""What the workers say of each prompt, see `AccuracyWorker`."""


@dataclass(frozen=True)
class Cost:
    """Attention of one prompt, all layers and ranks."""

    flops: int
    bytes: int


@dataclass
class Cell:
    """Questions of one depth and prompt length."""

    right: int = 0
    asked: int = 0


@dataclass(frozen=True)
class ProfileResult:
    """One profile beside dense attention."""

    name: str
    is_local: bool
    local_name: str
    """The local-only profile with the same tail and sinks; "" for dense attention."""
    cost: Cost
    flops_saved: float
    """Share of dense attention's FLOPs, 0 to 1."""
    bytes_saved: float
    """Share of the bytes that exact attention on the same ranks exchanges."""
    perplexity: Estimate
    """Of the continuation."""
    perplexity_loss: Estimate
    """Of the continuation, relative to dense attention: 0.01 is 1%."""
    kl: Estimate
    """Of the next-token distribution at the prompt's end, nats, mean over prompts."""
    repeat_perplexity: Estimate
    """Of restated facts inside the prompt."""
    repeat_gain: Estimate
    """Nats per restated fact by which it beats its local-only profile."""
    one_hop: Estimate
    """Share of questions answered exactly."""
    two_hops: Estimate
    retrieval_loss: Estimate
    """Share of all questions lost against dense attention: 0.02 is 2 points."""
    heat: dict[str, dict[int, list[Cell]]] = field(default_factory=dict)
    """By hops ("one_hop", "two_hops") and prompt length: cells by depth."""

    @property
    def verdicts(self) -> dict[str, bool]:
        """The conditions on a default, each met or not."""
        return {
            "perplexity": self.perplexity_loss.value <= MAX_PERPLEXITY_LOSS,
            "retrieval": self.retrieval_loss.value <= MAX_RETRIEVAL_LOSS,
            "beats_local": self.repeat_gain.low > 0,
        }

    def document(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "verdicts": self.verdicts}


def choose_default(results: Sequence[ProfileResult]) -> str | None:
    """The cheapest profile, by FLOPs and then by bytes, that meets all conditions; None where none does.

    Dense attention and local-only profiles are what it is measured against, not candidates.
    """
    fit = [one for one in results if one.name != EXACT and not one.is_local and all(one.verdicts.values())]
    return min(fit, key=lambda one: (one.cost.flops, one.cost.bytes)).name if fit else None


def summarise(
    answers: Answers, candidates: Sequence[Candidate], costs: Mapping[str, Cost], seed: int = 0
) -> list[ProfileResult]:
    """Figures of every candidate.

    Args:
        answers: of the workers, one for each prompt.
        candidates: dense attention among them, and the local-only profile of each other one.
        costs: by name.
        seed: of the resampling.
    """
    bootstrap = Bootstrap(len(answers), seed)
    sums = {one.name: _sums(answers, one.name) for one in candidates}
    return [_result(one, candidates, answers, sums, costs, bootstrap) for one in candidates]


def _result(
    candidate: Candidate,
    candidates: Sequence[Candidate],
    answers: Answers,
    sums: Mapping[str, Floats],
    costs: Mapping[str, Cost],
    bootstrap: Bootstrap,
) -> ProfileResult:
    name, own = candidate.name, sums[candidate.name]
    local_name = next((one.name for one in candidates if one.name == candidate.local_name), "")
    beside_exact = np.concatenate([own, sums[EXACT]], axis=1)
    beside_local = np.concatenate([own, sums[local_name or name]], axis=1)
    cost, exact_cost = costs[name], costs[EXACT]
    return ProfileResult(
        name=name,
        is_local=candidate.is_local,
        local_name=local_name,
        cost=cost,
        flops_saved=1 - cost.flops / exact_cost.flops,
        bytes_saved=1 - cost.bytes / exact_cost.bytes if exact_cost.bytes else 0.0,
        perplexity=bootstrap.estimate(lambda s: np.exp(_ratio(s, _NLL, _TOKENS)), own),
        perplexity_loss=bootstrap.estimate(
            lambda s: np.expm1(_ratio(s, _NLL, _TOKENS) - _ratio(s, _FIELDS + _NLL, _TOKENS)), beside_exact
        ),
        kl=bootstrap.estimate(lambda s: _ratio(s, _KL, _PROMPTS), own),
        repeat_perplexity=bootstrap.estimate(lambda s: np.exp(_ratio(s, _REPEAT_NLL, _REPEATS)), own),
        repeat_gain=bootstrap.estimate(
            lambda s: _ratio(s, _FIELDS + _REPEAT_NLL, _REPEATS) - _ratio(s, _REPEAT_NLL, _REPEATS),
            beside_local,
        ),
        one_hop=bootstrap.estimate(lambda s: _ratio(s, _RIGHT_1, _ASKED_1), own),
        two_hops=bootstrap.estimate(lambda s: _ratio(s, _RIGHT_2, _ASKED_2), own),
        retrieval_loss=bootstrap.estimate(_retrieval_loss, beside_exact),
        heat=_heat(answers, name),
    )


def _ratio(sums: Floats, over: int, under: int) -> Floats:
    """Quotient of two fields of [..., fields]; not-a-number where nothing was counted."""
    counted = sums[..., under]
    quotient: Floats = np.where(counted > 0, sums[..., over] / np.maximum(counted, 1.0), np.nan)
    return quotient


def _retrieval_loss(sums: Floats) -> Floats:
    asked = sums[..., _ASKED_1] + sums[..., _ASKED_2]
    lost = sums[..., _FIELDS + _RIGHT_1] + sums[..., _FIELDS + _RIGHT_2]
    lost = lost - sums[..., _RIGHT_1] - sums[..., _RIGHT_2]
    loss: Floats = np.where(asked > 0, lost / np.maximum(asked, 1.0), np.nan)
    return loss


def _sums(answers: Answers, name: str) -> Floats:
    """[prompts, fields]."""
    sums = np.zeros((len(answers), _FIELDS))
    for row, answer in zip(sums, answers, strict=True):
        score = answer["scores"][name]
        row[_NLL], row[_TOKENS], row[_KL], row[_PROMPTS] = score["nll"], score["tokens"], score["kl"], 1
        row[_REPEAT_NLL], row[_REPEATS] = score["repeat_nll"], score["repeats"]
        for question, right in zip(answer["questions"], score["right"], strict=True):
            two = question["hops"] == 2
            row[_ASKED_2 if two else _ASKED_1] += 1
            row[_RIGHT_2 if two else _RIGHT_1] += right
    return sums


def _heat(answers: Answers, name: str) -> dict[str, dict[int, list[Cell]]]:
    heat: dict[str, dict[int, list[Cell]]] = {"one_hop": {}, "two_hops": {}}
    for answer in answers:
        for question, right in zip(answer["questions"], answer["scores"][name]["right"], strict=True):
            by_length = heat["two_hops" if question["hops"] == 2 else "one_hop"]
            cells = by_length.setdefault(answer["length"], [Cell() for _ in range(DEPTH_BINS)])
            cell = cells[min(DEPTH_BINS - 1, int(question["depth"] * DEPTH_BINS))]
            cell.asked += 1
            cell.right += right
    return heat
