"""Which tokens a step of the baseline computes. Pure: no torch, no clock.

Source: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024,
algorithm 3: decodes never wait, and what they leave of the step's budget goes to prompts, first come first served.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Request:
    """One request: a text that grows, of which a beginning has been computed."""

    request_id: int
    """Unique in the engine."""
    token_ids: list[int]
    """The prompt, then what was generated."""
    num_prompt: int
    """Tokens of the prompt."""
    max_tokens: int
    """Tokens to generate."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""

    def __post_init__(self) -> None:
        if not self.token_ids or self.max_tokens < 1:
            raise ValueError("a request has a prompt and generates at least one token")

    @property
    def decodes(self) -> bool:
        """Whether only its newest token is left to compute."""
        return self.num_computed >= self.num_prompt

    @property
    def num_generated(self) -> int:
        """Tokens generated."""
        return len(self.token_ids) - self.num_prompt

    @property
    def most_tokens(self) -> int:
        """Of which a cache must have room for the keys and values: the last token's are never read."""
        return self.num_prompt + self.max_tokens - 1


@dataclass(frozen=True)
class Piece:
    """Tokens [begin, end) of a request's text, computed in one step."""

    request: Request
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def decodes(self) -> bool:
        """Whether it is a single token that was generated."""
        return self.begin >= self.request.num_prompt

    @property
    def samples(self) -> bool:
        """Whether the request's next token follows from it."""
        return self.end == len(self.request.token_ids)


def plan_step(requests: list[Request], chunk: int) -> list[Piece]:
    """The pieces of the next step: every decode, then chunks of prompts.

    Args:
        requests: those that have room in the cache, in the order in which they came.
        chunk: most tokens of a step; more decodes than that are computed all the same.
    """
    decodes = [_next_piece(one, 1) for one in requests if one.decodes]
    prompts = [one for one in requests if not one.decodes]
    return [*decodes, *_chunks(prompts, chunk - len(decodes))]


def _chunks(prompts: list[Request], budget: int) -> Iterator[Piece]:
    for request in prompts:
        if budget <= 0:
            return
        piece = _next_piece(request, budget)
        budget -= len(piece)
        yield piece


def _next_piece(request: Request, most: int) -> Piece:
    begin = request.num_computed
    return Piece(request, begin, min(begin + most, len(request.token_ids)))
