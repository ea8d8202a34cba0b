"""`python -m sps2_bench.decode.rank`: one rank of a measured decode group, or one process alone.

Computes what a decode worker computes in a step, sampling included, without the service around it.
"""

import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from sps2_bench.decode.batch import Batch
from sps2_bench.decode.cases import rows_of
from sps2_bench.decode.context import first_token
from sps2_bench.decode.kv_mover import KvMover
from sps2_bench.options import DTYPES
from sps2_bench.processes import Message, serve
from sps2_bench.team import CPU, join_mesh
from sps2_engine.attention.decode_plan import DecodePlan
from sps2_engine.attention.q_exchange import QExchange
from sps2_engine.mesh import TensorShare
from sps2_engine.models import load_decoder
from sps2_engine.runtime.device import use_huge_pages
from sps2_engine.sampler import NonFiniteLogitsError, SamplingParams, sample_rows

GREEDY = SamplingParams(temperature=0.0)


class DecodeRank:
    """Answers {"context", "batch", "warm_up", "steps"} with what the run gave on this rank."""

    def __init__(self, settings: Message) -> None:
        torch.set_num_threads(len(settings["cpus"]))
        share = TensorShare(settings["rank"] % settings["tensor"], settings["tensor"])
        self._decoder = load_decoder(Path(settings["folder"]), DTYPES[settings["dtype"]], CPU, share=share)
        self._decoder.pack()
        self._form: str = settings["form"]
        self._groups = join_mesh(settings, settings["tensor"], in_steps=True)

    @torch.inference_mode()
    def __call__(self, message: Message) -> Message:
        """Decodes; every rank of the group is asked the same at the same time."""
        warm_up, num_steps = message["warm_up"], message["warm_up"] + message["steps"]
        everyone, ranks, config = self._groups.everyone, self._groups.sequence, self._decoder.config
        context, batch = message["context"], message["batch"]
        kv = Batch(config, context, batch, num_steps, ranks.rank, ranks.size, self._decoder.share)
        exchange = self._exchange(kv, context)
        home = [row.row_id for row in exchange.home_rows]
        streams = {row: [first_token(row, config.vocab_size)] for row in home}
        step_s: list[float] = []
        posted = everyone.bytes_posted
        posted_before: Counter[str] = Counter()
        everyone.agree(False)  # all start together
        for step in range(num_steps):
            if step == warm_up:
                posted_before = posted.copy()
            started = time.perf_counter()
            exchange.begin_step([kv.new_slot(row, step) for row in home])
            self._step(exchange, kv, streams, context + step)
            step_s.append(time.perf_counter() - started)
        return {"step_s": step_s[warm_up:], "posted_bytes": posted - posted_before, "streams": streams}

    def _exchange(self, kv: Batch, context: int) -> QExchange | KvMover:
        config, communicator, cache = self._decoder.config, self._groups.sequence, kv.caches[0]
        scale = config.head_dim**-0.5
        num_heads = len(self._decoder.share.q_heads(config.num_q_heads))
        plan = DecodePlan(kv.rows, communicator.size, num_heads, config.head_dim, cache.k.element_size())
        if self._form == "q":
            return QExchange(plan, communicator, scale, cache, kv.runs())
        ranges = rows_of(context, len(kv.rows), communicator.size)[1]
        held = [end - begin for begin, end in ranges] + [0] * (communicator.size - len(ranges))
        return KvMover(plan, communicator, scale, cache, kv.runs(), held)

    def _step(
        self, exchange: QExchange | KvMover, kv: Batch, streams: dict[int, list[int]], position: int
    ) -> None:
        """One token more for each row at home."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = kv.caches[layer]
            q, k, v = (one.to(cache.k.dtype) for one in (q, k, v))
            return exchange.attend(cache, q, k, v)

        token_ids = [stream[-1] for stream in streams.values()]
        ids, positions = torch.tensor([token_ids, [position] * len(token_ids)], dtype=torch.int64)
        hidden = self._decoder.forward(ids, positions, attend, ranks=self._groups.tensor)
        if not token_ids:
            return
        count = len(token_ids)
        logits = self._decoder.logits(hidden, self._groups.tensor)
        drawn = sample_rows(logits, [GREEDY] * count, [0] * count, [position + 1] * count)
        for stream, token in zip(streams.values(), drawn, strict=True):
            if isinstance(token, NonFiniteLogitsError):
                raise token
            stream.append(token)


if __name__ == "__main__":
    use_huge_pages()
    serve(DecodeRank)
