"""Bytes between ranks: what the plans say, what the ranks posted, what a request was told."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sps2_client import BytesMoved, Client
from sps2_decode_worker.__main__ import DecodeWorkerConfig
from sps2_engine.attention.cost_model import AttentionShape, Exchange, make_plan
from sps2_engine.attention.decode_plan import DecodePlan, DecodeRow, place_tokens
from sps2_engine.kv_pool import BLOCK_TOKENS
from sps2_layout.layout import exact_layout
from support.identity import GENERATE_TIMEOUT_S, Prompt
from support.waiting import wait_until

ELEMENT_BYTES = 4
"""fp32."""
NOTHING = BytesMoved(0, 0, 0)
SETTLE_TIMEOUT_S = 15.0
"""Counters travel with heartbeats, lease renewals and the router's watch."""
KV_SLACK = 1.05


@dataclass(frozen=True)
class Shape:
    """What of a model decides how many bytes move."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, folder: Path) -> Self:
        """That of a checkpoint folder."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        q_heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // q_heads
        return cls(config["num_hidden_layers"], q_heads, config["num_key_value_heads"], head_dim)

    def planned(
        self, num_ranks: tuple[int, int], num_prompt: int, num_output: int, exchange: Exchange
    ) -> BytesMoved:
        """What a request of so many tokens moves on (prefill, decode) ranks, by the plans.

        The first output token is prefill's, so there is one decode step less than there are tokens.
        """
        heads = AttentionShape(self.num_q_heads, self.num_kv_heads, self.head_dim, ELEMENT_BYTES)
        prefill = make_plan(exchange, exact_layout(num_prompt, num_ranks[0]), num_ranks[0], heads)
        shards = place_tokens(
            num_prompt, BLOCK_TOKENS, num_ranks[1], min_tokens=DecodeWorkerConfig.min_holder_tokens
        )
        row = DecodeRow(1, 0, tuple(range(len(shards))))
        step = DecodePlan((row,), num_ranks[1], self.num_q_heads, self.head_dim, ELEMENT_BYTES)
        return BytesMoved(
            collective=prefill.bytes_per_layer() * self.num_layers,
            q_exchange=step.row_bytes_per_layer(row) * self.num_layers * (num_output - 1),
            kv_transfer=self.least_kv(num_prompt),
        )

    def least_kv(self, num_prompt: int) -> int:
        """Bytes of the keys and values of a prompt: less cannot be transferred."""
        return 2 * num_prompt * self.num_kv_heads * self.head_dim * ELEMENT_BYTES * self.num_layers


def plus(one: BytesMoved, other: BytesMoved) -> BytesMoved:
    """The sum, kind by kind."""
    return BytesMoved(
        one.collective + other.collective,
        one.q_exchange + other.q_exchange,
        one.kv_transfer + other.kv_transfer,
    )


def posted(client: Client) -> BytesMoved:
    """What all ranks together have posted since they started, as they last reported."""
    counters = [worker.bytes_posted for worker in client.cluster_state().workers]
    all_to_all, q_exchange, kv_transfer = (
        sum(counter.get(kind, 0) for counter in counters)
        for kind in ("all_to_all", "q_exchange", "kv_transfer")
    )
    return BytesMoved(all_to_all, q_exchange, kv_transfer)


def settled(client: Client, expected: BytesMoved) -> BytesMoved:
    """What the ranks have posted, once it is as expected or does not become so."""
    try:
        wait_until(lambda: posted(client) == expected, SETTLE_TIMEOUT_S, interval=0.1)
    except TimeoutError:
        return posted(client)
    return expected


def check_bytes(
    client: Client,
    folder: Path,
    num_ranks: tuple[int, int],
    prompts: Sequence[Prompt],
    num_tokens: int,
    exchange: Exchange,
) -> BytesMoved:
    """One request after the other: plan, counters of the ranks and the request's usage agree to the byte.

    For a fresh deployment that serves nothing else, with `--exchange` as given. Counters are compared as totals
    since its beginning, so what a request posts too late to be seen with it is seen with the next.

    Returns:
        The totals.
    """
    shape, total = Shape.of(folder), NOTHING
    assert posted(client) == total, "the deployment is not fresh"
    for prompt in prompts:
        answer = client.generate(
            token_ids=prompt,
            max_tokens=num_tokens,
            ignore_eos=True,
            prefix_reuse="off",
            timeout=GENERATE_TIMEOUT_S,
        )
        plan = shape.planned(num_ranks, len(prompt), num_tokens, exchange)
        where = f"prompt of {len(prompt)} tokens on (R, D) = {num_ranks}"
        told = answer.usage.bytes_moved
        assert told == plan, f"{where}: told {told}, planned {plan}"
        least = shape.least_kv(len(prompt))
        assert least <= told.kv_transfer <= KV_SLACK * least, f"{where}: {told}, at least {least}"
        total = plus(total, plan)
        counted = settled(client, total)
        assert counted == total, f"{where}: posted {counted} so far, planned {total}"
    return total
