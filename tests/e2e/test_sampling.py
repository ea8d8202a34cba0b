"""Sampling through a whole deployment: choices, seeds, stop strings, log probabilities, penalties, characters."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from sps2_client import Client, Generation, GenerationOptions, TextDelta
from support.deployment import DEMO_MODEL, LocalDeployment, deployment
from support.identity import GENERATE_TIMEOUT_S, Prompt, book_ids, reference
from support.oracle import compare, oracle_model
from support.streams import wait_for_free_kv

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

SAMPLED: GenerationOptions = {
    "max_tokens": 24,
    "ignore_eos": True,
    "temperature": 1.1,
    "top_p": 0.95,
    "min_p": 0.01,
    "presence_penalty": 0.5,
    "seed": 2**63 + 11,
}


def generate(client: Client, prompt: Prompt, **options: Any) -> Generation:
    return client.generate(token_ids=prompt, timeout=GENERATE_TIMEOUT_S, **options)


@pytest.mark.parametrize("length", [300, 512])
def test_choices_are_those_of_single_requests(demo: LocalDeployment, length: int) -> None:
    """Prompts that end inside of a block and on its border."""
    prompt = book_ids()[:length]
    with demo.client() as client:
        several = generate(client, prompt, n=3, **SAMPLED)
        alone = [generate(client, prompt, first_choice=index, **SAMPLED) for index in range(3)]
        assert [choice.token_ids for choice in several.choices] == [one.token_ids for one in alone]
        assert len({choice.token_ids for choice in several.choices}) == 3
        assert several.usage.output_tokens == 3 * 24
        assert several.usage.bytes_moved.kv_transfer == alone[0].usage.bytes_moved.kv_transfer
        wait_for_free_kv(client)


def test_greedy_choices_are_transformers_own(demo: LocalDeployment) -> None:
    """Each reads the shared prompt and its own copy of the block that it ends in."""
    prompt = book_ids()[:330]
    expected, gaps = reference(DEMO_MODEL, prompt, 24)
    with demo.client() as client:
        answer = generate(client, prompt, n=4, max_tokens=24, ignore_eos=True)
        assert len(answer.choices) == 4
        for choice in answer.choices:
            compare(choice.token_ids, expected, gaps)
        wait_for_free_kv(client)


def test_choices_that_end_at_different_times_free_their_blocks(demo: LocalDeployment) -> None:
    """A stop token that some draw at once: a choice may end with its first token while others go on."""
    prompt = book_ids()[:200]
    hot: GenerationOptions = {**SAMPLED, "temperature": 1.5, "max_tokens": 40, "n": 8}
    with demo.client() as client:
        free = generate(client, prompt, **hot)
        stop = free.choices[3].token_ids[0]
        stopped = generate(client, prompt, stop_token_ids=[stop], **hot)
        for whole, cut in zip(free.choices, stopped.choices, strict=True):
            end = whole.token_ids.index(stop) + 1 if stop in whole.token_ids else len(whole.token_ids)
            assert cut.token_ids == whole.token_ids[:end]
        assert len(stopped.choices[3].token_ids) == 1
        wait_for_free_kv(client)


def test_a_seed_gives_the_same_tokens_on_one_rank(demo: LocalDeployment) -> None:
    prompt = book_ids()[:700]
    with demo.client() as client:
        wide = generate(client, prompt, **SAMPLED)
    with deployment(prefill="1x1", decode="1x1") as running, running.client() as client:
        assert generate(client, prompt, **SAMPLED).token_ids == wide.token_ids


def test_a_stop_string_across_tokens(demo: LocalDeployment) -> None:
    prompt = book_ids()[:500]
    with demo.client() as client:
        whole = generate(client, prompt, max_tokens=40, ignore_eos=True)
        middle = len(whole.text) // 2
        stop = whole.text[middle : middle + 12]  # longer than any token
        cut = generate(client, prompt, max_tokens=40, ignore_eos=True, stop=["nowhere", stop])
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert (cut.finish_reason, cut.usage.output_tokens) == ("stop", len(cut.token_ids))
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert stop in client.detokenize(cut.token_ids)
        assert stop not in client.detokenize(cut.token_ids[:-1])
        both = generate(client, prompt, max_tokens=40, ignore_eos=True, stop=[stop], n=2)
        assert [choice.text for choice in both.choices] == [cut.text] * 2
        wait_for_free_kv(client)


def test_logprobs_are_transformers(demo: LocalDeployment) -> None:
    prompt = book_ids()[:150]
    with demo.client() as client:
        answer = generate(client, prompt, logprobs=20, repetition_penalty=1.3, **SAMPLED)
    assert len(answer.logprobs) == len(answer.token_ids)
    model: Any = oracle_model(DEMO_MODEL)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    for row, token_id, found in zip(expected, answer.token_ids, answer.logprobs, strict=True):
        assert found.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
        assert [value for _, value in found.top] == pytest.approx(row.topk(20).values.tolist(), abs=1e-3)
        assert [value for _, value in found.top] == pytest.approx(
            [float(row[i]) for i, _ in found.top], abs=1e-3
        )


def test_penalties_are_transformers(demo: LocalDeployment) -> None:
    prompt, eos = book_ids()[:260], 7
    model: Any = oracle_model(DEMO_MODEL)
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=32,
            min_new_tokens=32,
            repetition_penalty=1.4,
            sequence_bias={(11,): 3.0, (12,): -50.0},
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    tops = [scores[0].topk(2).values for scores in generated.scores]
    gaps = [float(top[0] - top[1]) for top in tops]
    with demo.client() as client:
        answer = generate(
            client,
            prompt,
            max_tokens=32,
            min_tokens=32,
            ignore_eos=True,
            stop_token_ids=[eos],
            repetition_penalty=1.4,
            logit_bias={11: 3.0, 12: -50.0},
        )
    compare(answer.token_ids, generated.sequences[0, len(prompt) :].tolist(), gaps)


def test_text_never_has_half_characters(demo: LocalDeployment) -> None:
    """The bytes of an emoji in any order: the pieces are the text of all tokens, whole characters at a time."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    ids = [tokenizer.token_to_id(one) for one in "ðŁİī"]  # byte-level BPE for f0 9f 8e 89
    bytes_of_emoji = [one for one in ids if one is not None]
    assert len(bytes_of_emoji) == 4
    with (
        demo.client() as client,
        client.stream(
            token_ids=book_ids()[:20],
            timeout=GENERATE_TIMEOUT_S,
            max_tokens=60,
            temperature=100.0,
            top_k=4,
            seed=3,
            logit_bias=dict.fromkeys(bytes_of_emoji, 100.0),
            ignore_eos=True,
        ) as stream,
    ):
        pieces = [event.text for event in stream if isinstance(event, TextDelta)]
        answer = stream.final()
        assert set(answer.token_ids) == set(bytes_of_emoji)
        byte_of = dict(zip(bytes_of_emoji, "🎉".encode(), strict=True))
        raw = bytes(byte_of[one] for one in answer.token_ids)
        assert "".join(pieces) == raw.decode(errors="replace") == client.detokenize(answer.token_ids)
