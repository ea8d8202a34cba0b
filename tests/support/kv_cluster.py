"""Sources and targets of KV transfer as real processes, and what can be done to them; returns figures.

Imports nothing of SPS2's rooms: the processes (`kv_peer.py`) do. Acceptance suites call the same functions as
the tests.
"""

import itertools
import json
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from support.process import ManagedProcess

PEER = Path(__file__).with_name("kv_peer.py")
BLOCK_TOKENS = 64
Json = dict[str, Any]
Range = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """Sizes of a test."""

    num_layers: int = 3
    num_blocks: int = 24
    num_kv_heads: int = 2
    head_dim: int = 16
    dtype: str = "fp32"
    slot_bytes: int = 16 << 10
    num_slots: int = 4

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in one layer, K and V."""
        return 2 * self.num_kv_heads * self.head_dim * {"fp32": 4, "bf16": 2}[self.dtype]


class Peer:
    """One process and the socket by which it is told what to do."""

    def __init__(
        self,
        role: str,
        transport: str,
        shape: Shape,
        name: str,
        env: Mapping[str, str] | None = None,
        heads: Range | None = None,
        **options: Any,
    ) -> None:
        self.incarnation = uuid.uuid4().hex[:12]
        self.name = name
        self.heads = heads
        config = {
            "role": role,
            "transport": transport,
            "name": name,
            "incarnation": self.incarnation,
            "heads": heads,
            **vars(shape),
            **options,
        }
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(50)
        port = self._listener.getsockname()[1]
        self.process = ManagedProcess(
            [sys.executable, "-P", PEER, str(port), json.dumps(config)],
            name=name,
            env=env,
            stop_timeout=0.0,
        )
        self.address = ""

    def __enter__(self) -> Self:
        self.process.start()
        return self

    def connect(self) -> Self:
        """Waits until it is ready."""
        self._control, _ = self._listener.accept()
        self._control.settimeout(50)
        self._lines = self._control.makefile("rw", encoding="utf-8")
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self._listener.close()
        if hasattr(self, "_control"):
            self._lines.close()
            self._control.close()

    def tell(self, op: str, **arguments: Any) -> None:
        """Sends a command; its answer is taken by `answer`. A stopped process reads it when it goes on."""
        self._lines.write(json.dumps({"op": op, **arguments}) + "\n")
        self._lines.flush()

    def _answer(self) -> Json:
        line = self._lines.readline()
        if not line:
            raise AssertionError(f"{self.name} ended\n{self.process.tail()}")
        return dict(json.loads(line))

    def answer(self) -> Json:
        """The answer to the oldest command without one."""
        answer = self._answer()
        if not answer["ok"]:
            raise AssertionError(f"{self.name}: {answer['error']}\n{self.process.tail()}")
        return answer

    def ask(self, op: str, **arguments: Any) -> Json:
        """A command and its answer."""
        self.tell(op, **arguments)
        return self.answer()

    def until(self, op: str, key: str, at_least: int, timeout: float = 10.0) -> int:
        """Asks again and again until a figure has grown to `at_least`."""
        deadline = time.monotonic() + timeout
        while (value := int(self.ask(op)[key])) < at_least:
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name}: {key} is {value}, not {at_least}\n{self.process.tail()}")
        return value


@dataclass
class Cluster:
    """Sources and targets that are ready."""

    shape: Shape
    sources: list[Peer]
    targets: list[Peer]
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def request(
        self,
        num_tokens: int,
        num_sources: int = 1,
        num_targets: int = 1,
        **fence: Any,
    ) -> "Request":
        """A request spread evenly, its source blocks filled with its own pattern, expected by nobody yet."""
        return Request(self, next(self._numbers), num_tokens, num_sources, num_targets, fence)


@contextmanager
def cluster(
    transport: str,
    num_sources: int = 1,
    num_targets: int = 1,
    shape: Shape | None = None,
    *,
    target_transport: str = "",
    source_heads: Sequence[Range] = (),
    target_heads: Sequence[Range] = (),
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[Cluster]:
    """Starts them all at once; ends them all, whatever happens. `options` go to the sources.

    Peer i holds the i-th range of heads where there are ranges, else all heads.
    """
    chosen = shape or Shape()
    with ExitStack() as stack:
        targets = [
            stack.enter_context(
                Peer("target", target_transport or transport, chosen, f"decode-0/{i}", env, heads)
            )
            for i, heads in _numbered(num_targets, target_heads)
        ]
        sources = [
            stack.enter_context(Peer("source", transport, chosen, f"prefill-0/{i}", env, heads, **options))
            for i, heads in _numbered(num_sources, source_heads)
        ]
        for peer in (*targets, *sources):
            peer.connect()
        for target in targets:
            target.address = target.ask("address")["address"]
        yield Cluster(chosen, sources, targets)


def _numbered(num_peers: int, heads: Sequence[Range]) -> Iterator[tuple[int, Range | None]]:
    return enumerate(heads or [None] * num_peers)


def split(num_tokens: int, parts: int, multiple: int = 1) -> list[Range]:
    """[0, num_tokens) in equal ranges whose borders are multiples."""
    borders = [min(num_tokens, -(-num_tokens * i // parts) // multiple * multiple) for i in range(parts)]
    return list(itertools.pairwise([*borders, num_tokens]))


class Request:
    """One prompt's KV on its way; even and odd blocks alternate, so that runs are short on both sides."""

    def __init__(
        self, cluster: Cluster, number: int, num_tokens: int, num_sources: int, num_targets: int, fence: Json
    ) -> None:
        self.id = f"request-{number}"
        self.salt = number
        self.num_tokens = num_tokens
        self.shape = cluster.shape
        spans = [[span] for span in split(num_tokens, num_sources)]
        self.sources = list(zip(cluster.sources, spans, strict=False))
        # Placements give whole blocks to each target.
        self.targets = list(zip(cluster.targets, split(num_tokens, num_targets, BLOCK_TOKENS), strict=False))
        self._fence = fence

    def fence(self, target: Peer) -> Json:
        """What slabs for that target must carry."""
        return {
            "process_incarnation": target.incarnation,
            "epoch": 1,
            "request_id": self.id,
            "number": 1,
            **self._fence,
        }

    def shards(self, **changed: Any) -> list[Json]:
        """The placement; `changed` goes into every fence."""
        return [
            {
                "rank": rank,
                "token_begin": begin,
                "token_end": end,
                "head_begin": target.heads[0] if target.heads else 0,
                "head_end": target.heads[1] if target.heads else 0,
                "address": target.address,
                "fence": {**self.fence(target), **changed},
            }
            for rank, (target, (begin, end)) in enumerate(self.targets)
        ]

    @staticmethod
    def blocks(spans: Sequence[Range]) -> list[int]:
        """As many blocks as the tokens need: 1, 0, 2, 3, 5, 4, 6, 7, ... Some neighbours, some not."""
        count = -(-sum(end - begin for begin, end in spans) // BLOCK_TOKENS)
        return [i + (1, -1, 0, 0)[i % 4] for i in range(count + count % 2)][:count]

    def expect(self) -> Self:
        """Every target expects its part."""
        for target, (begin, end) in self.targets:
            blocks = self.blocks([(begin, end)])
            target.ask("expect", fence=self.fence(target), token_begin=begin, token_end=end, blocks=blocks)
        return self

    def begin(self, **changed_fence: Any) -> Self:
        """Every source fills its blocks and begins."""
        for source, spans in self.sources:
            blocks = self.blocks(spans)
            source.ask("fill", salt=self.salt, spans=spans, blocks=blocks)
            shards = self.shards(**changed_fence)
            source.ask("begin", key=self.id, shards=shards, spans=spans, blocks=blocks)
        return self

    def ready(self, layers: Sequence[int] | None = None) -> Self:
        """Every source has these layers, by default all."""
        chosen = list(range(self.shape.num_layers) if layers is None else layers)
        for source, _ in self.sources:
            source.ask("ready", key=self.id, layers=chosen)
        return self

    def results(self) -> list[Json]:
        """How it ended at each source."""
        return [source.ask("wait", key=self.id) for source, _ in self.sources]

    def complete(self) -> list[bool]:
        """Whether each target has all of it."""
        return [
            bool(target.ask("wait_complete", request_id=self.id)["complete"]) for target, _ in self.targets
        ]

    def wrong_elements(self) -> int:
        """Elements in the targets' blocks that are not what the sources had."""
        return sum(
            int(
                target.ask("count_wrong", salt=self.salt, spans=[tokens], blocks=self.blocks([tokens]))[
                    "wrong"
                ]
            )
            for target, tokens in self.targets
        )

    def forget(self) -> None:
        """Every target forgets it."""
        for target, _ in self.targets:
            target.ask("forget", fence=self.fence(target))
