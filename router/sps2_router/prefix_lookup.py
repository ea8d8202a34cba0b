"""Asks the directory who holds the beginning of a prompt: a hint that may cost 20 ms, and does without after that."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2.internal.v1.placement_pb2 import AttentionLayout
from sps2.v1 import cluster_pb2
from sps2_layout.attention import Attention
from sps2_layout.block_hash import BLOCK_TOKENS
from sps2_layout.wire import unpack_attention
from sps2_router.prefix_reuse import HeldPrefix

MAX_KEYS = 64
"""Of one call; a longer chain is asked for in several at once."""

Holder = tuple[str, str, int, bytes]
"""Worker, its incarnation and epoch, the attention."""


class PrefixDirectory(Protocol):
    """What is needed of the directory client."""

    async def find_prefix(self, keys: Sequence[bytes]) -> list[pb.PrefixMatch]:
        """Who holds the beginning of a chain; nothing where it does not answer in time."""
        ...


class WorkersView(Protocol):
    """What is needed of the membership."""

    @property
    def workers(self) -> Mapping[str, cluster_pb2.WorkerInfo]:
        """Live workers by id."""
        ...


async def find_held(
    directory: PrefixDirectory, view: WorkersView, hashes: Sequence[bytes]
) -> list[HeldPrefix]:
    """What live groups hold of a chain of blocks.

    The windows of a long chain are asked for at once. Whoever holds a block holds all before it, so those of a holder
    add up as long as each is complete.
    """
    windows = [hashes[begin : begin + MAX_KEYS] for begin in range(0, len(hashes), MAX_KEYS)]
    found = await asyncio.gather(*(directory.find_prefix(window) for window in windows))
    totals: dict[Holder, int] = {}
    for index, matches in enumerate(found):
        for match in matches:
            holder = _key(match.holder)
            if totals.get(holder, 0) == index * MAX_KEYS:
                totals[holder] = index * MAX_KEYS + match.num_keys
    held = (_held(holder, num_keys * BLOCK_TOKENS, view) for holder, num_keys in totals.items())
    return [one for one in held if one is not None]


def _key(holder: pb.PrefixHolder) -> Holder:
    packed = holder.attention.SerializeToString(deterministic=True)
    return holder.worker_id, holder.process_incarnation, holder.epoch, packed


def _held(holder: Holder, num_tokens: int, view: WorkersView) -> HeldPrefix | None:
    """None for one that is not as the router knows it: its entry is about to go."""
    worker_id, incarnation, epoch, packed = holder
    worker = view.workers.get(worker_id)
    if worker is None or (worker.process_incarnation, worker.epoch) != (incarnation, epoch):
        return None
    message = AttentionLayout.FromString(packed)
    attention = Attention(1, 1) if message.HasField("exact") else unpack_attention(message)
    room = worker.capabilities.kv_blocks_total * BLOCK_TOKENS
    return HeldPrefix(worker.group, num_tokens, attention, room, worker.grpc_address)
