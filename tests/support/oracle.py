"""transformers `generate` as the oracle of greedy tokens, and what "identical" means (decode.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

NEAR_TIE = 1e-3
"""A first difference counts as rounding only where the reference's top-2 logits are closer than this."""


@dataclass(frozen=True)
class Comparison:
    """How a token sequence compares with the oracle's."""

    num_compared: int
    flipped: bool
    """It differs first at a near-tie; what follows cannot be compared."""


@cache
def oracle_model(folder: Path) -> Any:
    """The model in transformers, fp32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def oracle_tokens(folder: Path, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens, end tokens ignored, and at each the gap between the two largest logits."""
    model = oracle_model(folder)
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    gaps = [float(top[0] - top[1]) for top in (logits[0].topk(2).values for logits in generated.logits)]
    return generated.sequences[0, len(prompt) :].tolist(), gaps


def compare(actual: Sequence[int], expected: Sequence[int], gaps: Sequence[float]) -> Comparison:
    """Compares token for token.

    Raises:
        AssertionError: they differ, and not first at a near-tie.
    """
    for index, (token, reference, gap) in enumerate(zip(actual, expected, gaps, strict=True)):
        if token != reference:
            assert gap < NEAR_TIE, f"token {index} is {token}, not {reference} (top-2 gap {gap:.4f})"
            return Comparison(index + 1, flipped=True)
    return Comparison(len(actual), flipped=False)
