"""`python -m sps2_bench.prefill.rank`: one rank of a measured prefill group, or one process alone.

Computes what a prefill worker computes, KV into its arena included, without the service around it.
"""

import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from sps2_bench.csa import KIND, make_plan, make_schedule, named_layout
from sps2_bench.options import DTYPES
from sps2_bench.prefill.memory import forget_peak, peak_rss, rss
from sps2_bench.prefill.rates import measure_rates
from sps2_bench.processes import Message, serve
from sps2_bench.team import CPU, join_team
from sps2_engine.attention.trace import Event, Trace
from sps2_engine.kv_pool import BLOCK_TOKENS, KvArena
from sps2_engine.models import load_decoder
from sps2_engine.runtime.device import use_compile_cache
from sps2_kernels.segment_attention import warm_up_attention


def prompt_tokens(num_tokens: int, vocab_size: int) -> Tensor:
    """The same random prompt [num_tokens] int64 in every program."""
    return torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))


class PrefillRank:
    """Answers {"length", "profile", "exchange", "timeline"} with what the run gave on this rank, {} with its rates.

    Every rank of a group is asked the same at the same time.
    """

    def __init__(self, settings: Message) -> None:
        torch.set_num_threads(len(settings["cpus"]))
        use_compile_cache()
        self._dtype = DTYPES[settings["dtype"]]
        warm_up_attention(self._dtype, CPU)
        self._shard_tokens: int = settings["shard_tokens"]
        self._decoder = load_decoder(Path(settings["folder"]), self._dtype, CPU)
        self._communicator = join_team(settings)

    def __call__(self, message: Message) -> Message:
        """Runs one prefill, or measures the rates."""
        if message:
            return self._prefill(message)
        self._communicator.agree(False)  # all compute together, as in a prefill
        return asdict(measure_rates(self._decoder.config, self._dtype))

    def _prefill(self, message: Message) -> Message:
        config, rank = self._decoder.config, self._communicator.rank
        layout = named_layout(
            message["profile"], message["length"], self._communicator.size, self._shard_tokens
        )
        plan = make_plan(
            layout,
            self._communicator.size,
            config,
            self._dtype,
            message["exchange"],
            torch.get_num_threads(),
        )
        positions = torch.cat([torch.arange(span.begin, span.end) for span in plan.spans(rank)])
        tokens = prompt_tokens(message["length"], config.vocab_size)[positions]
        forget_peak()
        rss_before, posted_before = rss(), self._communicator.bytes_posted[KIND]
        # KV stays in fp32 on a CPU, whatever the model computes in.
        blocks = -(-len(tokens) // BLOCK_TOKENS)
        arena = KvArena(config.num_layers, blocks, config.num_kv_heads, config.head_dim)
        trace = Trace(rank)
        schedule = make_schedule(plan, self._communicator, trace if message["timeline"] else None)
        left_s = 0.0

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            arena.k[layer, : len(k)] = k
            arena.v[layer, : len(v)] = v
            nonlocal left_s
            trace.events.append(Event("linear", "linear layers", layer, left_s, time.perf_counter()))
            o = schedule.attend(layer, q, k, v)
            left_s = time.perf_counter()
            return o

        self._communicator.agree(False)  # all start together
        started = left_s = time.perf_counter()
        hidden = self._decoder.forward(tokens, positions, attend)
        token = None
        if rank == plan.last_rank:
            token = int(self._decoder.logits(hidden[-1:]).argmax())
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "token_id": token,
            "exposed_s": schedule.exposed_s,
            "posted_bytes": self._communicator.bytes_posted[KIND] - posted_before,
            "rss_before": rss_before,
            "peak_rss": peak_rss(),
            "events": [asdict(event) for event in trace.events] if message["timeline"] else [],
        }


if __name__ == "__main__":
    serve(PrefillRank)
