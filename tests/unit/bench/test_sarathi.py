"""The sarathi baseline: its schedule, and its tokens against transformers' and against one request alone."""

import pytest
import torch

from sps2_bench.sarathi.engine import SarathiEngine
from sps2_bench.sarathi.scheduler import Request, plan_step
from sps2_engine.models import load_decoder
from support.deployment import DEMO_MODEL
from support.identity import Prompt, Tally, book_ids, reference
from support.oracle import compare

CPU = torch.device("cpu")
NUM_TOKENS = 10
LENGTHS = (300, 1, 129, 500)


def request(number: int, num_prompt: int, num_computed: int = 0) -> Request:
    return Request(number, [0] * max(num_prompt, num_computed + 1), num_prompt, 9, num_computed)


def pieces(requests: list[Request], chunk: int) -> list[tuple[int, int, int]]:
    return [(one.request.request_id, one.begin, one.end) for one in plan_step(requests, chunk)]


def test_decodes_go_first_and_prompts_take_what_is_left_in_their_order() -> None:
    long, short, decoding = request(0, 100, 30), request(1, 20), request(2, 5, 6)
    assert pieces([long, short, decoding], 16) == [(2, 6, 7), (0, 30, 45)]
    assert pieces([long, short, decoding], 91) == [(2, 6, 7), (0, 30, 100), (1, 0, 20)]
    assert pieces([long, short, decoding], 81) == [(2, 6, 7), (0, 30, 100), (1, 0, 10)]
    assert pieces([decoding, request(3, 1, 1), short], 1) == [(2, 6, 7), (3, 1, 2)], "decodes never wait"


def test_a_piece_samples_when_it_ends_its_text() -> None:
    first, last = plan_step([request(0, 40)], 32)[0], plan_step([request(0, 40, 32)], 32)[0]
    assert (first.samples, first.decodes) == (False, False)
    assert (last.samples, last.decodes) == (True, False)


def prompts() -> list[Prompt]:
    book = book_ids()
    return [book[11 * place : 11 * place + length] for place, length in enumerate(LENGTHS)]


def serve(engine: SarathiEngine, arrivals: dict[int, Prompt]) -> dict[Prompt, list[int]]:
    """Submits each prompt before the step it is numbered with; the tokens of each."""
    names: dict[int, Prompt] = {}
    tokens: dict[Prompt, list[int]] = {prompt: [] for prompt in arrivals.values()}
    number = 0
    while not engine.idle or number <= max(arrivals):
        if number in arrivals:
            names[engine.submit(list(arrivals[number]), NUM_TOKENS)] = arrivals[number]
        if not engine.idle:
            for token in engine.step().tokens:
                assert token.index == len(tokens[names[token.request_id]])
                tokens[names[token.request_id]].append(token.token_id)
                assert token.last == (token.index == NUM_TOKENS - 1)
        number += 1
    return tokens


@pytest.mark.parametrize(("chunk", "kv_tokens"), [(33, 2_048), (128, 640), (512, 2_048)])
def test_tokens_are_those_of_transformers_whatever_the_chunk(chunk: int, kv_tokens: int) -> None:
    engine = SarathiEngine(load_decoder(DEMO_MODEL, torch.float32, CPU), kv_tokens, chunk)
    tally = Tally()
    for prompt, tokens in serve(engine, dict(zip((0, 2, 3, 8), prompts(), strict=True))).items():
        tally.add(compare(tokens, *reference(DEMO_MODEL, prompt, NUM_TOKENS)))
    tally.check()
    assert engine.num_blocks_used == 0


def test_keys_in_several_runs_of_blocks() -> None:
    engine = SarathiEngine(load_decoder(DEMO_MODEL, torch.float32, CPU), 1_024, 100)
    others = [engine.submit([1] * 128, 2) for _ in range(8)]
    for _ in range(3):
        engine.step()
    for other in others[::2]:
        engine.cancel(other)
    prompt = prompts()[0]
    asked = engine.submit(list(prompt), NUM_TOKENS)
    tokens: list[int] = []
    while not engine.idle:
        tokens += [token.token_id for token in engine.step().tokens if token.request_id == asked]
    compare(tokens, *reference(DEMO_MODEL, prompt, NUM_TOKENS))
    assert len(tokens) == NUM_TOKENS


def test_what_cannot_be_served_is_refused() -> None:
    engine = SarathiEngine(load_decoder(DEMO_MODEL, torch.float32, CPU), 128, 32)
    with pytest.raises(ValueError, match="130 tokens do not fit into 128 slots"):
        engine.submit([1] * 128, 3)
    with pytest.raises(ValueError, match="at least one token"):
        engine.submit([], 3)
    with pytest.raises(ValueError, match="nothing to compute"):
        engine.step()
