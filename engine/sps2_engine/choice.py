"""How the tokens of a choice are chosen and when it ends, read from the wire; shared by both workers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps2.internal.v1 import prefill_service_pb2
from sps2.v1 import generation_pb2
from sps2_engine.logit_edits import EditParams, LogitEdits
from sps2_engine.logprobs import TokenLogprobs, token_logprobs
from sps2_engine.sampler import NonFiniteLogitsError, SamplingParams, sample_rows


def sampling_params(choice: prefill_service_pb2.TokenChoice) -> SamplingParams:
    """The sampler's parameters; the router has set every field and checked its range."""
    sampling = choice.sampling
    return SamplingParams(
        sampling.temperature, sampling.top_p, max(0, sampling.top_k), sampling.seed, sampling.min_p
    )


def edit_params(choice: prefill_service_pb2.TokenChoice) -> EditParams:
    """What is done to the logits before that."""
    sampling = choice.sampling
    return EditParams(
        bias=dict(sampling.logit_bias),
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        banned_ids=tuple(choice.stop_token_ids),
        min_tokens=choice.min_tokens,
    )


def num_choices(choice: prefill_service_pb2.TokenChoice) -> int:
    """Choices that a request draws."""
    return max(1, choice.num_choices)


class ChoiceState:
    """One choice between its tokens."""

    def __init__(
        self,
        choice: prefill_service_pb2.TokenChoice,
        index: int,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        """Starts after the tokens that earlier attempts have generated.

        Args:
            choice: how tokens are chosen.
            index: the choice's within its request.
            num_tokens: of the text so far, prompt and what was generated before.
            device: of the logits.
        """
        self.sampling = sampling_params(choice)
        self.index = choice.sampling.first_choice + index
        """In the key of the random numbers."""
        self.num_logprobs = choice.num_logprobs if choice.HasField("num_logprobs") else None
        self.num_outputs = 0
        """Tokens so far."""
        self._choice = choice
        self._num_prompt_tokens = num_tokens - len(choice.generated_token_ids)
        edits = edit_params(choice)
        self.edits = (
            None if edits.idle else LogitEdits(edits, choice.prompt_token_ids, choice.max_tokens, device)
        )
        for token_id in choice.generated_token_ids:
            self.take(token_id)

    @property
    def position(self) -> int:
        """Position in the text of the next token."""
        return self._num_prompt_tokens + self.num_outputs

    def take(self, token_id: int) -> "generation_pb2.FinishReason.ValueType":
        """The next token has been drawn; why the choice ends with it, UNSPECIFIED when it goes on."""
        self.num_outputs += 1
        if self.edits is not None:
            self.edits.take(token_id)
        return finish_reason(self._choice, token_id, self.num_outputs)


@dataclass(frozen=True)
class Drawn:
    """A drawn token."""

    token_id: int
    logprobs: TokenLogprobs | None
    """None unless the request asked for them."""

    @property
    def wire_logprob(self) -> generation_pb2.TokenLogprob | None:
        """The same as a message."""
        if self.logprobs is None:
            return None
        return generation_pb2.TokenLogprob(
            logprob=self.logprobs.logprob,
            top_token_ids=self.logprobs.top_ids,
            top_logprobs=self.logprobs.top_logprobs,
        )


@torch.inference_mode()
def draw_tokens(logits: Tensor, choices: Sequence[ChoiceState]) -> list[Drawn | NonFiniteLogitsError]:
    """Draws the next token of each choice from its row of `logits`, fp32 [choices, vocab], which it may change.

    A row with a non-finite logit has the error in place of a token.
    """
    wanted = [row for row, choice in enumerate(choices) if choice.num_logprobs is not None]
    raw = logits[wanted] if wanted else logits[:0]  # a copy, made before the edits
    for row, choice in enumerate(choices):
        if choice.edits is not None:
            choice.edits.apply(logits[row])
    drawn = sample_rows(
        logits,
        [choice.sampling for choice in choices],
        [choice.index for choice in choices],
        [choice.position for choice in choices],
    )
    # A row that failed is asked about some token; its answer is not used.
    ids = [0 if isinstance(token := drawn[row], NonFiniteLogitsError) else token for row in wanted]
    logprobs = dict(zip(wanted, token_logprobs(raw, ids, _num_top(choices, wanted)), strict=True))
    return [
        token if isinstance(token, NonFiniteLogitsError) else Drawn(token, logprobs.get(row))
        for row, token in enumerate(drawn)
    ]


def _num_top(choices: Sequence[ChoiceState], rows: Iterable[int]) -> list[int]:
    return [choices[row].num_logprobs or 0 for row in rows]


def finish_reason(
    choice: prefill_service_pb2.TokenChoice, token_id: int, num_output_tokens: int
) -> "generation_pb2.FinishReason.ValueType":
    """Whether a choice ends with this token, its `num_output_tokens`-th; UNSPECIFIED when it goes on."""
    if token_id in choice.stop_token_ids:
        return generation_pb2.FINISH_REASON_STOP
    if num_output_tokens >= choice.max_tokens:
        return generation_pb2.FINISH_REASON_LENGTH
    return generation_pb2.FINISH_REASON_UNSPECIFIED
