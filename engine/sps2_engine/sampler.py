"""Draws next tokens from logits. Knows nothing about requests, stop rules or penalties.

A draw depends on the logits, the parameters and the counter (seed, choice, position) alone: the batch around
it, the rank and the number of earlier draws do not matter, so a failed-over request continues its text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class NonFiniteLogitsError(ArithmeticError):
    """The model produced NaN or infinity for this row; the request fails, its neighbours do not."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token."""

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy: the largest logit, nothing else considered."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens that reach this probability, in (0, 1]; 1 keeps all."""
    top_k: int = 0
    """Keep the tokens at least as likely as the k-th (ties included); 0 keeps all. Applied before top_p."""
    seed: int = 0
    """Key of the random numbers, unsigned 64-bit."""
    min_p: float = 0.0
    """Keep the tokens at least this fraction as likely as the most likely one, in [0, 1]; 0 keeps all. Applied
    after top_p."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and not negative, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, not {self.min_p}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits without a sign, not {self.seed}")


@torch.inference_mode()
def sample_rows(
    logits: Tensor, params: Sequence[SamplingParams], choices: Sequence[int], positions: Sequence[int]
) -> list[int | NonFiniteLogitsError]:
    """Draws one token per row, each exactly as it would be drawn alone.

    Args:
        logits: fp32 [rows, vocab]; ban a token with `torch.finfo(torch.float32).min`. For a row that is not
            finite the error stands in its place in the result, so that the caller fails that request alone.
        params: how to choose, for each row.
        choices: index of each row's choice within its request.
        positions: position of the token to be drawn in each row's text.
    """
    if not len(params) == len(choices) == len(positions) == len(logits):
        raise ValueError("params, choices and positions must have one entry per row of logits")
    if not params:
        return []
    # The extremes tell of every NaN and infinity, without a mask of the logits' size.
    smallest, largest = logits.aminmax(dim=-1)
    finite = smallest.isfinite() & largest.isfinite()
    tokens = logits.argmax(dim=-1)
    for candidates, rows in _groups(params).items():
        uniforms = [_uniform(params[row].seed, choices[row], positions[row]) for row in rows]
        tokens[rows] = _draw(candidates, logits[rows], [params[row] for row in rows], uniforms)
    # One transfer from the device: a failed row is marked by an id that no token has.
    return [
        token if token >= 0 else NonFiniteLogitsError(f"a logit of row {row} is NaN or infinite")
        for row, token in enumerate(tokens.where(finite, -1).tolist())
    ]


Candidates = Callable[[Tensor, Sequence[SamplingParams]], tuple[Tensor, Tensor]]
"""Logits [rows, vocab] -> scores and token ids [rows, n] of what may be drawn before top-p and min-p are applied:
in ascending order where a row uses one of them. Padding has the score -inf and comes first."""


def _groups(params: Sequence[SamplingParams]) -> dict[Candidates, list[int]]:
    """The rows that are not greedy, by the work they need."""
    groups: dict[Candidates, list[int]] = {}
    for row, p in enumerate(params):
        if p.temperature > 0:
            groups.setdefault(_candidates_of(p), []).append(row)
    return groups


def _candidates_of(p: SamplingParams) -> Candidates:
    if p.top_k:
        return _top_k
    if p.top_p < 1:
        return _ascending
    return _min_p if p.min_p else _everything


def _everything(logits: Tensor, _params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    return logits, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)


def _ascending(logits: Tensor, _params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    scores, token_ids = logits.sort(dim=-1, stable=True)
    return scores, token_ids


def _top_k(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    ranks = [min(p.top_k, logits.shape[-1]) for p in params]
    largest = logits.topk(max(ranks)).values
    kth = largest.gather(1, torch.tensor(ranks, device=logits.device)[:, None] - 1)
    return _sort_kept(logits, logits >= kth)


def _min_p(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    # p / p_max = exp((logit - max) / temperature)
    reach = torch.tensor([p.temperature * math.log(p.min_p) for p in params], device=logits.device)
    return _sort_kept(logits, logits >= logits.amax(dim=-1, keepdim=True) + reach[:, None])


def _sort_kept(logits: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Only the survivors are sorted: they are few, the vocabulary is not."""
    num_kept = max(1, int(kept.sum(dim=-1).max()))  # a row of NaN keeps none
    scores, token_ids = logits.masked_fill(~kept, -math.inf).topk(num_kept)
    # topk leaves the order of ties open; equal scores must be drawn alike in every batch.
    token_ids, order = token_ids.sort(dim=-1)
    scores, ascending = scores.gather(1, order).sort(dim=-1, stable=True)
    return scores, token_ids.gather(1, ascending)


def _draw(
    candidates: Candidates, logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> Tensor:
    """Inverts each row's distribution function, cut off below at top-p and min-p: logits [rows, vocab] -> [rows].

    Sums run in fp64 from the first candidate up, so that neither padding nor neighbours change a rounding.
    """
    scores, token_ids = candidates(logits, params)
    scores = scores.double()
    settings = [(p.temperature, p.top_p, p.min_p, u) for p, u in zip(params, uniforms, strict=True)]
    columns = torch.tensor(settings, dtype=torch.float64, device=logits.device)
    temperature, top_p, min_p, uniform = torch.split(columns, 1, dim=1)  # [rows, 1] each
    weights = ((scores - scores.amax(dim=-1, keepdim=True)) / temperature).exp_()  # the largest is 1
    mass = weights.cumsum(dim=-1)
    total = mass[:, -1:]
    dropped = (mass <= (1 - top_p) * total) | (weights < min_p)
    dropped[:, -1] = False  # the most likely token always stays
    floor = (mass * dropped).amax(dim=-1, keepdim=True)
    index = torch.searchsorted(mass, floor + uniform * (total - floor), right=True)
    return token_ids.gather(1, index.clamp_(max=mass.shape[-1] - 1)).squeeze(1)


def _uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) from a counter-based generator (Philox 4x64), 53 bits of it."""
    key = np.array([seed, choice], dtype=np.uint64)
    counter = np.array([position, 0, 0, 0], dtype=np.uint64)
    return float(int(np.random.Philox(key=key, counter=counter).random_raw()) >> 11) * 2.0**-53
