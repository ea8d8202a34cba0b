"""What a supervisor tells the engine that it starts; torch-free, since both sides import it."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from sps2_engine.mesh import TensorShare


@dataclass(frozen=True)
class EngineOptions:
    """One engine's settings, fixed for its life."""

    name: str
    """Worker id, "<group>/<rank>", for logs and peers."""
    rank: int
    """Rank in the group."""
    model: str
    """Model folder."""
    model_hash: str
    """Hash that peers must have as well."""
    host: str
    """Interface address that collectives, stores and transfers are bound to."""
    device: str
    """auto, cpu or cuda."""
    dtype: str
    """auto, fp32 or bf16: weights and their products (auto is resolved when the engine starts)."""
    threads: int
    """Threads of one operator on a CPU."""
    kv_tokens: int
    """Tokens whose KV the rank can hold (rounded up to whole blocks)."""
    kv_transport: Literal["auto", "nixl", "grpc"]
    """auto, nixl or grpc."""
    collective_timeout_s: float
    """Longest wait for a peer inside a collective."""
    tp: int
    """Tensor ranks: parts that every layer is split into; divides the group."""
    log_level: str = "info"
    """Least severe lines that are logged."""
    log_json: bool | None = None
    """JSON lines on stderr, or text; None: JSON unless that is a terminal."""

    @property
    def share(self) -> TensorShare:
        """What this rank holds of the model."""
        return TensorShare(self.rank % self.tp, self.tp)

    def arguments(self, socket_fd: int) -> list[str]:
        """Command line arguments from which `parse_engine_arguments` makes the same options."""
        return ["--socket-fd", str(socket_fd), "--options", json.dumps(asdict(self))]


def parse_engine_arguments(arguments: Sequence[str]) -> tuple[EngineOptions, int]:
    """The options, and the descriptor of the socket to the supervisor."""
    parser = argparse.ArgumentParser(
        description="Engine of one rank; started by its supervisor, not by people."
    )
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--options", type=json.loads, required=True)
    parsed = parser.parse_args(arguments)
    return EngineOptions(**parsed.options), parsed.socket_fd
