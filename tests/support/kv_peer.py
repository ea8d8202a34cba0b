"""One engine's half of KV transfer as a process of its own: a source or a target, commanded over a socket.

Started by `support.kv_cluster`, which speaks JSON lines: {"op": ..., ...} in, {"ok": ..., ...} out, one
answer per command, in order. Run with the control port and a JSON configuration.
"""

import hashlib
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sps2.internal.v1.kv_transfer_service_pb2 import KvFormat, SlabAck, SlabVerdict
from sps2.internal.v1.placement_pb2 import Attempt, Fence, Placement, ShardPlacement
from sps2_engine.kv_pool import KvArena, slot_runs
from sps2_engine.kv_transfer.base import RingOptions, TransferError
from sps2_engine.kv_transfer.receiver import KvReceiver
from sps2_engine.kv_transfer.rows import Rows, UsedRows
from sps2_engine.kv_transfer.sender import KvSender
from sps2_layout.layout import Span

Spans = list[list[int]]
"""Tokens [begin, end)."""
DTYPES = {"fp32": (torch.float32, torch.int32), "bf16": (torch.bfloat16, torch.int16)}


class Half:
    """What both halves have: an arena, and a pattern by which each element tells where it comes from."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.dtype, self.bits = DTYPES[config["dtype"]]
        self.num_kv_heads = config["num_kv_heads"]
        first_head, end_head = config["heads"] or (0, self.num_kv_heads)
        self.arena = KvArena(
            config["num_layers"],
            config["num_blocks"],
            end_head - first_head,
            config["head_dim"],
            self.dtype,
            first_head=first_head,
        )
        self.format = KvFormat(
            model_hash=config.get("model_hash", "test"),
            dtype=config["dtype"],
            layout_version=1,
            num_layers=config["num_layers"],
            num_kv_heads=self.num_kv_heads,
            head_dim=config["head_dim"],
        )

    def pattern(self, salt: int, side: int, layer: int, begin: int, end: int) -> torch.Tensor:
        """[tokens, heads of the arena, head_dim] as integers of the element's width."""
        width = self.num_kv_heads * self.arena.head_dim
        first = salt * 7919 + (side * self.arena.num_layers + layer) * 65537
        flat = torch.arange(first + begin * width, first + end * width, dtype=torch.int64)
        whole = flat.to(self.bits).view(end - begin, self.num_kv_heads, self.arena.head_dim)
        return whole[:, self.arena.heads.slice].contiguous()

    def sides(self) -> list[torch.Tensor]:
        """K and V as integers."""
        return [self.arena.k.view(self.bits), self.arena.v.view(self.bits)]

    def layers(
        self, salt: int, spans: Spans, blocks: list[int]
    ) -> Iterator[tuple[torch.Tensor, list[int], torch.Tensor]]:
        """K and V of each layer, the slots of the tokens of the spans, and the pattern that belongs there."""
        runs = slot_runs(blocks, sum(end - begin for begin, end in spans))
        slots = [slot for begin, end in runs for slot in range(begin, end)]
        for side, tensor in enumerate(self.sides()):
            for layer in range(self.arena.num_layers):
                pattern = [self.pattern(salt, side, layer, begin, end) for begin, end in spans]
                yield tensor[layer], slots, torch.cat(pattern)

    def op_fill(self, salt: int, spans: Spans, blocks: list[int]) -> dict[str, Any]:
        """Writes the pattern of the tokens of the spans into blocks."""
        for tensor, slots, pattern in self.layers(salt, spans, blocks):
            tensor[slots] = pattern
        return {}

    def op_count_wrong(self, salt: int, spans: Spans, blocks: list[int]) -> dict[str, Any]:
        """How many elements of these blocks differ from the pattern."""
        layers = self.layers(salt, spans, blocks)
        return {"wrong": sum(int((tensor[slots] != pattern).sum()) for tensor, slots, pattern in layers)}

    def op_digest(self) -> dict[str, Any]:
        """A digest of the whole arena."""
        digest = hashlib.sha256()
        for tensor in self.sides():
            digest.update(tensor.numpy().data)
        return {"digest": digest.hexdigest()}

    def op_process(self) -> dict[str, Any]:
        """What the process costs."""
        times = os.times()
        statm = Path("/proc/self/statm").read_text(encoding="ascii")
        resident = int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "cpu_s": times.user + times.system,
            "resident_bytes": resident,
            "threads": threading.active_count(),
        }


class Source(Half):
    """A prefill engine's half."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.sender = KvSender(
            self.arena,
            self.format,
            config["name"],
            config["incarnation"],
            config["transport"],
            open_timeout_s=config.get("open_timeout_s", 5.0),
            ack_timeout_s=config.get("ack_timeout_s", 10.0),
        )
        self.transfers: dict[str, Any] = {}

    def op_begin(
        self, key: str, shards: list[dict[str, Any]], spans: Spans, blocks: list[int]
    ) -> dict[str, Any]:
        """Begins a transfer under a name."""
        placement = Placement(group="decode-0", shards=[shard_of(shard) for shard in shards])
        attempt = placement.shards[0].fence.attempt
        tokens = [Span(*span) for span in spans]
        self.transfers[key] = self.sender.begin(
            attempt, placement, tokens, [UsedRows.of_all(Rows(tokens, blocks))]
        )
        return {}

    def op_ready(self, key: str, layers: list[int]) -> dict[str, Any]:
        """Says that layers are there."""
        for layer in layers:
            self.sender.layer_ready(self.transfers[key], layer)
        return {}

    def op_wait(self, key: str, timeout: float = 20.0) -> dict[str, Any]:
        """Waits for the end of a transfer."""
        try:
            summary = self.transfers[key].done.result(timeout)
        except TransferError as error:
            return {"reason": error.reason, "message": error.message}
        return {"bytes_sent": summary.bytes_sent, "resent": summary.slabs_resent}

    def op_abort(self, key: str, timeout: float = 20.0) -> dict[str, Any]:
        """Aborts, and waits until the blocks are quiet."""
        self.sender.abort(self.transfers[key]).result(timeout)
        return {}

    def op_stats(self) -> dict[str, Any]:
        """The sender's counter."""
        return {"bytes_posted": self.sender.bytes_posted}

    def op_close(self) -> dict[str, Any]:
        """Closes the sender."""
        self.sender.close()
        return {}


class Target(Half):
    """A decode engine's half."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.receiver = KvReceiver(
            self.arena,
            self.format,
            config["incarnation"],
            "127.0.0.1",
            transport=config["transport"],
            ring=RingOptions(slot_bytes=config["slot_bytes"], num_slots=config["num_slots"]),
        )
        self.complete: dict[str, threading.Event] = {}
        self.num_to_corrupt = 0
        self._take = self.receiver.intake.take
        self.receiver.intake.take = self.take  # type: ignore[method-assign] # faults are the test's business

    def take(self, header: Any, source_incarnation: str, copy: Any) -> SlabAck:
        """Flips a bit of the target's memory, as long as it is told to."""

        def corrupt() -> memoryview:
            data = bytearray(copy())
            if self.num_to_corrupt > 0:
                self.num_to_corrupt -= 1
                data[len(data) // 2] ^= 1
            return memoryview(data)

        return self._take(header, source_incarnation, corrupt)

    def op_address(self) -> dict[str, Any]:
        """Where sources find it, and by what it is reached."""
        return {"address": self.receiver.address, "transport": self.receiver.transport}

    def op_expect(
        self, fence: dict[str, Any], token_begin: int, token_end: int, blocks: list[int]
    ) -> dict[str, Any]:
        """Expects an attempt."""
        event = self.complete[fence["request_id"]] = threading.Event()
        self.receiver.expect(fence_of(fence), token_begin, token_end, blocks, event.set)
        return {}

    def op_wait_complete(self, request_id: str, timeout: float = 20.0) -> dict[str, Any]:
        """Waits for the KV of an attempt."""
        return {"complete": self.complete[request_id].wait(timeout)}

    def op_forget(self, fence: dict[str, Any]) -> dict[str, Any]:
        """Forgets an attempt."""
        self.receiver.forget(fence_of(fence))
        return {}

    def op_corrupt(self, count: int) -> dict[str, Any]:
        """Corrupts the next slabs."""
        self.num_to_corrupt = count
        return {}

    def op_stats(self) -> dict[str, Any]:
        """What the intake counted."""
        verdicts = self.receiver.intake.num_verdicts
        return {
            "accepted": verdicts[SlabVerdict.SLAB_VERDICT_ACCEPTED],
            "corrupt": verdicts[SlabVerdict.SLAB_VERDICT_CORRUPT],
            "refused": verdicts[SlabVerdict.SLAB_VERDICT_REFUSED],
            "bytes_accepted": self.receiver.intake.bytes_accepted,
        }

    def op_rings(self) -> dict[str, Any]:
        """The rings there are, with digests of their memory."""
        rings = getattr(self.receiver.rings, "rings", [])
        return {
            "rings": {
                ring.source_incarnation: {
                    "trusted": ring.trusted,
                    "address": ring.memory.data_ptr(),
                    "digest": hashlib.sha256(ring.memory.numpy().data).hexdigest(),
                }
                for ring in rings
            }
        }

    def op_count_in_ring(self, source: str, salt: int, layer: int, token: int) -> dict[str, Any]:
        """How often K of that token, by its pattern, lies in a source's ring."""
        pattern = self.pattern(salt, 0, layer, token, token + 1).numpy().tobytes()
        ring = next(ring for ring in self.receiver.rings.rings if ring.source_incarnation == source)  # type: ignore[union-attr]
        return {"count": ring.memory.numpy().tobytes().count(pattern)}

    def op_close(self) -> dict[str, Any]:
        """Closes the receiver."""
        self.receiver.close()
        return {}


def fence_of(fence: dict[str, Any]) -> Fence:
    """A fence from its JSON."""
    attempt = Attempt(request_id=fence["request_id"], number=fence["number"])
    return Fence(process_incarnation=fence["process_incarnation"], epoch=fence["epoch"], attempt=attempt)


def shard_of(shard: dict[str, Any]) -> ShardPlacement:
    """A shard from its JSON."""
    return ShardPlacement(
        rank=shard["rank"],
        token_begin=shard["token_begin"],
        token_end=shard["token_end"],
        head_begin=shard["head_begin"],
        head_end=shard["head_end"],
        transfer_address=shard["address"],
        fence=fence_of(shard["fence"]),
    )


def main() -> None:
    """Serves commands until the control connection ends."""
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
    torch.set_num_threads(1)
    config = json.loads(sys.argv[2])
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=None) as control:
        half: Source | Target = Source(config) if config["role"] == "source" else Target(config)
        lines = control.makefile("rw", encoding="utf-8")
        print(json.dumps({"ready": True}), file=lines, flush=True)
        for line in lines:
            command = json.loads(line)
            operation = command.pop("op")
            try:
                answer = {"ok": True, **getattr(half, f"op_{operation}")(**command)}
            except Exception as error:
                logging.getLogger("peer").exception("%s failed", operation)
                answer = {"ok": False, "error": repr(error)}
            print(json.dumps(answer), file=lines, flush=True)


if __name__ == "__main__":
    main()
