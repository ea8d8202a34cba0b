"""`python -m sps2_bench.interference.sarathi_peer`: the same load on the baseline, all cores in one process."""

import time
from dataclasses import asdict
from pathlib import Path

import torch

from sps2_bench.interference.load import MAX_TOKENS, STEADY_TOKENS, Arrivals, Load
from sps2_bench.interference.window import Window
from sps2_bench.processes import Message, serve
from sps2_bench.sarathi.engine import SarathiEngine
from sps2_engine.models import Decoder, load_decoder

CPU = torch.device("cpu")


class SarathiPeer:
    """Answers {"chunk", "num_tokens"} with the fields of a `Window`; 0 tokens stand for the long prompt."""

    def __init__(self, settings: Message) -> None:
        torch.set_num_threads(len(settings["cpus"]))
        self._load = Load(**settings["load"])
        self._decoder = load_decoder(Path(settings["folder"]), torch.float32, CPU)
        self._decoder.pack()  # as a decode rank does: for the steps without a chunk

    def __call__(self, message: Message) -> Message:
        """Fresh decodes; then so many tokens of each, or the long prompt up to its first token."""
        running = _Running(self._decoder, self._load, message["chunk"])
        running.advance(STEADY_TOKENS)
        begin = time.perf_counter()
        if message["num_tokens"]:
            running.advance(message["num_tokens"])
        else:
            running.answer(self._load.long_prompt(self._decoder.config.vocab_size))
        end = time.perf_counter()
        running.advance(STEADY_TOKENS)
        ttft_s = None if message["num_tokens"] else end - begin
        return asdict(Window(running.arrivals.rows(), begin, end, ttft_s))


class _Running:
    """An engine with its decodes."""

    def __init__(self, decoder: Decoder, load: Load, chunk: int) -> None:
        vocab_size = decoder.config.vocab_size
        self._engine = SarathiEngine(decoder, load.kv_tokens, chunk)
        self._rows = {
            self._engine.submit(load.context_prompt(row, vocab_size), MAX_TOKENS): row
            for row in range(load.batch)
        }
        self.arrivals = Arrivals(load.batch)

    def advance(self, num_tokens: int) -> None:
        """Steps until every decode has so many tokens more than the slowest has now."""
        goal = self.arrivals.fewest + num_tokens
        while self.arrivals.fewest < goal:
            self._step()

    def answer(self, prompt: list[int]) -> None:
        """Steps until the first, and only, token of a prompt that comes now."""
        request_id = self._engine.submit(prompt, 1)
        while request_id not in self._step():
            pass

    def _step(self) -> set[int]:
        """Requests that got a token."""
        step, now = self._engine.step(), time.perf_counter()
        for token in step.tokens:
            if token.request_id in self._rows:
                self.arrivals.add(self._rows[token.request_id], now)
        return {token.request_id for token in step.tokens}


if __name__ == "__main__":
    serve(SarathiPeer)
