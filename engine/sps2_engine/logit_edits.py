"""What a request changes about its logits before a token is drawn: bias, penalties, banned stop tokens.

One object for each choice, with counts that grow token by token, so that a step touches only the entries of tokens
that the prompt or the output has. Knows nothing about drawing or about the wire.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BANNED = torch.finfo(torch.float32).min
"""Logit of a token that must not be drawn: finite, as the sampler asks, and never likely."""


@dataclass(frozen=True)
class EditParams:
    """How logits are changed; each default changes nothing."""

    bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids."""
    repetition_penalty: float = 1.0
    """Above 0; positive logits of ids of prompt and output are divided by it, others multiplied."""
    presence_penalty: float = 0.0
    """Taken once from the logits of ids that the output has."""
    frequency_penalty: float = 0.0
    """Taken from the logits of ids of the output as often as it has them."""
    banned_ids: tuple[int, ...] = ()
    """Not drawn ..."""
    min_tokens: int = 0
    """... before the output has so many tokens."""

    @property
    def counts(self) -> bool:
        """Whether it matters which tokens there are."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def idle(self) -> bool:
        """Whether nothing is ever changed."""
        return not (self.bias or self.counts or (self.banned_ids and self.min_tokens))


class LogitEdits:
    """The edits of one choice, in the order bias, repetition, frequency, presence, ban.

    Bias and repetition go in transformers' order (SequenceBiasLogitsProcessor, RepetitionPenaltyLogitsProcessor);
    frequency and presence are OpenAI's: logit - count * frequency - (count > 0) * presence, over the output alone.
    """

    def __init__(
        self, params: EditParams, prompt_ids: Iterable[int], max_tokens: int, device: torch.device
    ) -> None:
        """Starts before the first token of the output.

        Args:
            params: what to change.
            prompt_ids: distinct ids of the prompt; needed only with a repetition penalty.
            max_tokens: most tokens of the output.
            device: of the logits.
        """
        self._params = params
        self._num_outputs = 0
        self._bias_ids = torch.tensor(list(params.bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(params.bias.values()), dtype=torch.float32, device=device)
        self._banned_ids = torch.tensor(params.banned_ids, dtype=torch.int64, device=device)
        prompt = list(prompt_ids) if params.repetition_penalty != 1 else []
        self._places = {token_id: place for place, token_id in enumerate(prompt)}
        capacity = len(prompt) + max_tokens if params.counts else 0
        self._seen_ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._seen_ids[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        self._counts = torch.zeros(capacity, dtype=torch.float32, device=device)
        """Of each seen id in the output; 0 for those of the prompt alone."""

    def take(self, token_id: int) -> None:
        """The output has one token more."""
        self._num_outputs += 1
        if not self._params.counts:
            return
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = len(self._places)
            self._seen_ids[place] = token_id
        self._counts[place] += 1

    def apply(self, logits: Tensor) -> None:
        """Changes the logits of the next token, fp32 [vocab], in place; what is not finite does not become so."""
        params = self._params
        if params.bias:
            logits.index_add_(0, self._bias_ids, self._bias)
        if self._places:
            self._penalize(logits)
        if params.banned_ids and self._num_outputs < params.min_tokens:
            # Times 0 keeps NaN and makes infinity NaN: a ban must not hide that the model is broken.
            logits[self._banned_ids] = logits[self._banned_ids].mul_(0).add_(BANNED)

    def _penalize(self, logits: Tensor) -> None:
        params, num_seen = self._params, len(self._places)
        ids, counts = self._seen_ids[:num_seen], self._counts[:num_seen]
        seen = logits[ids]
        if params.repetition_penalty != 1:
            factor = params.repetition_penalty
            seen = torch.where(seen > 0, seen / factor, seen * factor)
        if params.frequency_penalty:
            seen -= counts * params.frequency_penalty
        if params.presence_penalty:
            seen -= (counts > 0) * params.presence_penalty
        logits[ids] = seen
