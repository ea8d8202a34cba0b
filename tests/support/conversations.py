"""A long conversation about one document: the same text with and without reuse, and what each costs and finds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp
from pathlib import Path
from statistics import mean

from sps2_bench.accuracy.prompts import Recipe
from sps2_bench.accuracy.worker import prompt_maker
from sps2_client import Client, Generation
from support.identity import GENERATE_TIMEOUT_S

BLOCK_TOKENS = 64
ANSWER_TOKENS = 8
FORCE = 100.0
"""Bias that makes a token be drawn; log probabilities are told as they are without it."""


@dataclass(frozen=True)
class Turn:
    """What a user adds."""

    question: tuple[int, ...]
    """Asks for a fact planted in the document."""
    answer: int
    more: tuple[int, ...]
    """How the document goes on: not said, but scored behind what of it was scored before."""


@dataclass(frozen=True)
class Conversation:
    """The document and the turns."""

    document: tuple[int, ...]
    turns: tuple[Turn, ...]

    @classmethod
    def of(cls, model: Path, num_tokens: int, num_turns: int, num_more: int) -> "Conversation":
        """About a page of the demo model's book with facts in it, each asked for once."""
        recipe = Recipe((num_tokens,), 8, num_turns * num_more, num_turns, 1, 64, 0)
        prompt = prompt_maker(model, model / "prompt.txt", recipe, 0).make(0)
        more = prompt.continuation.tolist()
        asked = [one for one in prompt.questions if one.hops == 1]
        turns = (
            Turn(one.tokens, one.answer[0], tuple(more[index * num_more : (index + 1) * num_more]))
            for index, one in enumerate(asked)
        )
        return cls(tuple(prompt.tokens.tolist()), tuple(turns))


@dataclass
class Told:
    """One way through a conversation."""

    answers: list[Generation] = field(default_factory=list)
    found: list[bool] = field(default_factory=list)
    """Whether each fact was."""
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of each token with which the document goes on."""

    @property
    def perplexity(self) -> float:
        """Of how the document goes on."""
        return exp(-mean(self.logprobs))

    @property
    def later_ttft_s(self) -> float:
        """Mean time to first token from the second turn on."""
        return mean(one.usage.timings.ttft for one in self.answers[1:])

    def check_only_new_is_computed(self) -> None:
        """From the second turn on, fewer tokens than were added and a block are computed."""
        for before, prompt, answer in zip(self.prompts, self.prompts[1:], self.answers[1:], strict=False):
            usage, num_new = answer.usage, len(prompt) - len(before)
            num_computed = usage.prompt_tokens - usage.cached_tokens
            assert num_computed < num_new + BLOCK_TOKENS, f"{num_computed} computed, {num_new} are new"


def tell(client: Client, conversation: Conversation, profile: str, reuse: str) -> Told:
    """Goes through a conversation, turn by turn; the text is the same whatever the answers are."""
    told, text, read = Told(), list(conversation.document), list(conversation.document)
    for turn in conversation.turns:
        text += turn.question
        answer = _ask(client, text, profile, reuse)
        told.prompts.append(tuple(text))
        told.answers.append(answer)
        told.found.append(answer.token_ids[0] == turn.answer)
        text.append(turn.answer)
        for token in turn.more:
            told.logprobs.append(_score(client, read, token, profile, reuse))
            read.append(token)
    return told


def _ask(client: Client, text: Sequence[int], profile: str, reuse: str) -> Generation:
    return client.generate(
        token_ids=text,
        max_tokens=ANSWER_TOKENS,
        ignore_eos=True,
        attention_profile=profile,
        prefix_reuse=reuse,
        timeout=GENERATE_TIMEOUT_S,
    )


def _score(client: Client, text: Sequence[int], token: int, profile: str, reuse: str) -> float:
    """How likely the next token is to be this one."""
    answer = client.generate(
        token_ids=text,
        max_tokens=1,
        ignore_eos=True,
        logprobs=0,
        logit_bias={token: FORCE},
        attention_profile=profile,
        prefix_reuse=reuse,
        timeout=GENERATE_TIMEOUT_S,
    )
    assert answer.token_ids == (token,)
    return answer.logprobs[0].logprob
