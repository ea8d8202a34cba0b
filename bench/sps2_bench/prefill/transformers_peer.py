"""`python -m sps2_bench.prefill.transformers_peer`: the same model and prompts in transformers, with SDPA."""

import time
from typing import Any

import torch

from sps2_bench.options import DTYPES
from sps2_bench.prefill.memory import forget_peak, peak_rss, rss
from sps2_bench.prefill.rank import prompt_tokens
from sps2_bench.processes import Message, serve


class TransformersPeer:
    """Answers as `PrefillRank` does."""

    def __init__(self, settings: Message) -> None:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds that a rank should not pay

        torch.set_num_threads(len(settings["cpus"]))
        model: Any = AutoModelForCausalLM.from_pretrained(
            settings["folder"], dtype=DTYPES[settings["dtype"]], attn_implementation="sdpa"
        )
        self._model = model.eval()

    @torch.inference_mode()
    def __call__(self, message: Message) -> Message:
        """Runs one prefill, its KV kept as `generate` keeps it."""
        tokens = prompt_tokens(message["length"], self._model.config.vocab_size)[None]
        forget_peak()
        rss_before = rss()
        started = time.perf_counter()
        output = self._model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        token = int(output.logits[0, -1].argmax())
        return {
            "seconds": time.perf_counter() - started,
            "token_id": token,
            "exposed_s": 0.0,
            "posted_bytes": 0,
            "rss_before": rss_before,
            "peak_rss": peak_rss(),
        }


if __name__ == "__main__":
    serve(TransformersPeer)
