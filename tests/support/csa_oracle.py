"""What CSA serving must answer: the same model, mask and schedule in one process on one rank, without blocks."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sps2_client import Client
from sps2_engine.attention.csa_plan import CsaPlan
from sps2_engine.attention.csa_schedule import CsaSchedule
from sps2_engine.collectives import SoloCommunicator
from sps2_engine.models import Decoder
from sps2_engine.models.load import load_decoder
from sps2_kernels.segment_attention import UNMASKED, segment_attention
from sps2_layout.attention import Attention
from sps2_layout.profiles import Ladder
from support.identity import GENERATE_TIMEOUT_S, Prompt, Tally, book_ids
from support.oracle import compare

ELEMENT_BYTES = 4
"""fp32."""


@cache
def csa_tokens(
    folder: Path, ladder: Ladder, prompt: Prompt, num_tokens: int
) -> tuple[list[int], list[float]]:
    """Greedy tokens, end tokens ignored, and at each the gap between the two largest logits.

    The prompt is prefilled under the ladder's mask, every later token attends densely to all keys before it.
    """
    decoder = _decoder(folder)
    attention = Attention.admit(ladder, len(prompt))
    cache = _OnePass(decoder, attention)
    tokens: list[int] = []
    gaps: list[float] = []
    new, position = list(prompt), 0
    while True:
        positions = torch.arange(position, position + len(new))
        hidden = decoder.forward(torch.tensor(new), positions, cache.attend)
        top = decoder.logits(hidden[-1:])[0].topk(2)
        tokens.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
        if len(tokens) == num_tokens:
            return tokens, gaps
        position, new = position + len(new), tokens[-1:]


def csa_logprobs(folder: Path, attention: Attention, text: Sequence[int], num_scored: int) -> list[float]:
    """Log probabilities of a text's last tokens, each given all before it.

    Args:
        folder: of the model.
        attention: of the text's beginning; what is behind its mask is dense queries.
        text: token ids.
        num_scored: how many of the last.
    """
    decoder = _decoder(folder)
    first = len(text) - num_scored
    tokens = torch.tensor(text[:-1])
    attend = _OnePass(decoder, attention, len(tokens)).attend
    hidden = decoder.forward(tokens, torch.arange(len(tokens)), attend)
    logprobs = decoder.logits(hidden[first - 1 :]).log_softmax(dim=-1)
    return logprobs.gather(1, torch.tensor(text[first:])[:, None])[:, 0].tolist()


def long_prompts(lengths: Sequence[int]) -> list[Prompt]:
    """Prompts for the demo model: the beginning of its book, which starts again where it is too short."""
    book = book_ids()
    return [(book * (-(-length // len(book))))[:length] for length in lengths]


class _OnePass:
    """Attention of one request: CSA for the prompt, then dense over the keys and values kept."""

    def __init__(self, decoder: Decoder, attention: Attention, num_tokens: int | None = None) -> None:
        """`num_tokens`: of the first pass, see `Attention.sliced`."""
        config = decoder.config
        heads = (config.num_q_heads, config.num_kv_heads, config.head_dim)
        plan = CsaPlan(attention.sliced(1, num_tokens), 1, *heads, ELEMENT_BYTES)
        self._scale = config.head_dim**-0.5
        self._prefill = CsaSchedule(plan, SoloCommunicator(), self._scale)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        if layer not in self._kept:
            self._kept[layer] = k, v
            return self._prefill.attend(layer, q, k, v)
        keys, values = (torch.cat(pair) for pair in zip(self._kept[layer], (k, v), strict=True))
        self._kept[layer] = keys, values
        return segment_attention(q, keys, values, UNMASKED, self._scale)[0]


@cache
def _decoder(folder: Path) -> Decoder:
    return load_decoder(folder, torch.float32, torch.device("cpu"))


def check_csa(
    client: Client, folder: Path, ladder: Ladder, prompts: Sequence[Prompt], num_tokens: int, tally: Tally
) -> list[str]:
    """Generates from each prompt and compares every token with those of one process for the same mask.

    Returns:
        What usage said of each prompt's attention.

    Raises:
        AssertionError: tokens differ, and not first at a near-tie.
    """
    said = []
    for prompt in prompts:
        answer = client.generate(
            token_ids=prompt,
            max_tokens=num_tokens,
            ignore_eos=True,
            prefix_reuse="off",  # the mask of its own, whatever came before
            timeout=GENERATE_TIMEOUT_S,
        )
        said.append(answer.usage.attention_profile)
        try:
            tally.add(compare(answer.token_ids, *csa_tokens(folder, ladder, prompt, num_tokens)))
        except AssertionError as error:
            error.add_note(f"prompt of {len(prompt)} tokens, {said[-1]}")
            raise
    return said
