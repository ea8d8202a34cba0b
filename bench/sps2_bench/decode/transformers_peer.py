"""`python -m sps2_bench.decode.transformers_peer`: the same model, context and first tokens in transformers.

A step is what `generate` does greedily: one forward with SDPA over the cache, and an argmax.
"""

import time
from pathlib import Path
from typing import Any

import torch

from sps2_bench.decode.context import Context, first_token
from sps2_bench.options import DTYPES
from sps2_bench.processes import Message, serve
from sps2_engine.models import read_model_config


class TransformersPeer:
    """Answers as `DecodeRank` does."""

    def __init__(self, settings: Message) -> None:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds that a rank should not pay

        torch.set_num_threads(len(settings["cpus"]))
        model: Any = AutoModelForCausalLM.from_pretrained(
            settings["folder"], dtype=DTYPES[settings["dtype"]], attn_implementation="sdpa"
        )
        self._model = model.eval()
        self._config = read_model_config(Path(settings["folder"]))
        self._form: str = settings["form"]

    @torch.inference_mode()
    def __call__(self, message: Message) -> Message:
        """Decodes."""
        context, batch, warm_up = message["context"], message["batch"], message["warm_up"]
        num_steps = warm_up + message["steps"]
        cache = self._filled_cache(context, batch, num_steps)
        tokens = torch.tensor([first_token(row, self._config.vocab_size) for row in range(batch)])[:, None]
        taken, step_s = [tokens], []
        for step in range(num_steps):
            started = time.perf_counter()
            positions = torch.full((batch, 1), context + step)
            output = self._model(
                input_ids=taken[-1],
                past_key_values=cache,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
            )
            taken.append(output.logits[:, -1].argmax(dim=-1, keepdim=True))
            step_s.append(time.perf_counter() - started)
        streams = dict(enumerate(torch.cat(taken, dim=1).tolist()))
        return {"step_s": step_s[warm_up:], "posted_bytes": {}, "streams": streams}

    def _filled_cache(self, num_tokens: int, batch: int, num_steps: int) -> Any:
        from transformers import DynamicCache, StaticCache  # noqa: PLC0415

        if self._form == "static":
            cache: Any = StaticCache(config=self._model.config, max_cache_len=num_tokens + num_steps)
        else:
            cache = DynamicCache(config=self._model.config)
        context = Context(self._config, num_tokens, batch)
        for layer in range(self._config.num_layers):
            kv = torch.stack([context.kv(row, layer) for row in range(batch)], dim=1)
            k, v = kv.transpose(2, 3).contiguous()  # [batch, kv_heads, tokens, head_dim]
            cache.update(k, v, layer)
        return cache


if __name__ == "__main__":
    serve(TransformersPeer)
