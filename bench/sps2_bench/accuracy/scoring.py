"""Scores one prompt under one profile: what comes out, as sums that can be added over prompts."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sps2_bench.accuracy.candidates import Candidate
from sps2_bench.accuracy.prompts import Prompt
from sps2_bench.accuracy.suffix import KvLayers, SuffixAttention
from sps2_bench.csa import Layout, make_plan, make_schedule, without_last
from sps2_engine.collectives import SoloCommunicator
from sps2_engine.models import Decoder


@dataclass(frozen=True)
class Score:
    """One prompt under one profile; logarithms are natural."""

    nll: float
    """Sum over the continuation."""
    tokens: int
    """Of the continuation."""
    kl: float
    """Of the next-token distribution at the prompt's end, from dense attention's to this one's."""
    repeat_nll: float
    """Sum over the values of restated facts, inside the prompt."""
    repeats: int
    right: tuple[bool, ...]
    """By question of the prompt: whether greedy decoding gives exactly the answer."""

    def document(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


class Scorer:
    """Scores prompts on one model, in fp32."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    @torch.inference_mode()
    def score(self, prompt: Prompt, candidates: list[Candidate]) -> dict[str, Score]:
        """Every candidate on the prompt; the first one is the reference of the divergence."""
        scores: dict[str, Score] = {}
        reference: Tensor | None = None
        for candidate in candidates:
            run = _Run(self._decoder, candidate.layout(len(prompt.tokens)), prompt)
            log_probs = run.continuation()
            reference = log_probs[0] if reference is None else reference
            following = torch.from_numpy(prompt.continuation)
            repeats = run.repeats()
            scores[candidate.name] = Score(
                nll=float(functional.nll_loss(log_probs, following, reduction="sum")),
                tokens=len(following),
                kl=float(functional.kl_div(log_probs[0], reference, reduction="sum", log_target=True)),
                repeat_nll=float(repeats.sum()),
                repeats=len(repeats),
                right=run.answers(),
            )
        return scores


class _Run:
    """One prompt computed under one layout, up to its suffix, and all that goes on from there."""

    def __init__(self, decoder: Decoder, layout: Layout, prompt: Prompt) -> None:
        self._decoder = decoder
        self._layout = layout
        self._prompt = prompt
        self._kv: KvLayers = []
        body = without_last(layout, prompt.suffix)
        schedule = make_schedule(make_plan(body, 1, decoder.config, torch.float32), SoloCommunicator())

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._kv.append((k, v))
            return schedule.attend(layer, q, k, v)

        tokens = torch.from_numpy(prompt.tokens[: -prompt.suffix])
        self._hidden = decoder.forward(tokens, torch.arange(len(tokens)), attend)

    def repeats(self) -> Tensor:
        """Negative log-likelihood of the value of each restated fact: [repeats]."""
        if not self._prompt.repeats:
            return torch.zeros(0)
        positions, answers = (torch.tensor(column) for column in zip(*self._prompt.repeats, strict=True))
        logits = self._decoder.logits(self._hidden[positions])
        return functional.cross_entropy(logits, answers, reduction="none")

    def continuation(self) -> Tensor:
        """Log-probabilities [tokens, vocab] over the continuation; row 0 is at the prompt's end."""
        suffix = self._prompt.suffix
        tokens = torch.cat(
            (torch.from_numpy(self._prompt.tokens[-suffix:]), torch.from_numpy(self._prompt.continuation))
        )
        hidden = self._go_on(tokens[None])[0]
        return self._decoder.logits(hidden[suffix - 1 : -1]).log_softmax(dim=-1)

    def answers(self) -> tuple[bool, ...]:
        """Whether each question's greedy answer is exactly right.

        The first token of each answer is given as its text goes on: where the model says another one, the
        answer is wrong already.
        """
        questions = self._prompt.questions
        if not questions:
            return ()
        tokens = torch.tensor([[*question.tokens, question.answer[0]] for question in questions])
        hidden = self._go_on(tokens)[:, -2:]  # [questions, hops at most, hidden]
        said = self._decoder.logits(hidden.flatten(0, 1)).argmax(dim=-1).view(len(questions), 2).tolist()
        return tuple(
            tuple(row[: question.hops]) == question.answer
            for row, question in zip(said, questions, strict=True)
        )

    def _go_on(self, tokens: Tensor) -> Tensor:
        """Hidden states [texts, tokens, hidden] of texts [texts, tokens] that begin with a suffix."""
        first = len(self._prompt.tokens) - self._prompt.suffix
        positions = torch.arange(first, first + tokens.shape[1]).repeat(len(tokens))
        attend = SuffixAttention(self._layout, self._kv, self._prompt.suffix, len(tokens))
        hidden = self._decoder.forward(tokens.flatten(), positions, attend)
        return hidden.view(*tokens.shape, -1)
