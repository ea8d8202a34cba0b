"""Log probabilities of drawn tokens and of the most likely ones. Knows nothing about drawing or about requests."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one token; natural logarithms."""

    logprob: float
    """The token's own."""
    top_ids: tuple[int, ...]
    """The most likely tokens, in descending order; of equally likely ones the lower id first."""
    top_logprobs: tuple[float, ...]
    """Theirs."""


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log softmax of logits [rows, vocab] at one token of each row and at its `num_top` largest.

    The logits are the model's own: what is asked for is its opinion, not what the request made of it.
    """
    if not token_ids:
        return []
    logits = logits.float()
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, logits.new_tensor(token_ids).long()[:, None]) - log_total
    most = min(max(num_top), logits.shape[-1])
    values, ids = logits.topk(most, dim=-1)  # [rows, most]
    tops = ((values - log_total).tolist(), ids.tolist())
    return [
        _pack(value, probabilities[:count], top_ids[:count])
        for (value,), probabilities, top_ids, count in zip(own.tolist(), *tops, num_top, strict=True)
    ]


def _pack(value: float, probabilities: list[float], ids: list[int]) -> TokenLogprobs:
    # topk leaves the order of ties open.
    order = sorted(range(len(ids)), key=lambda place: (-probabilities[place], ids[place]))
    return TokenLogprobs(value, tuple(ids[i] for i in order), tuple(probabilities[i] for i in order))
