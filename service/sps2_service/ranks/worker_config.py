"""What one rank's supervisor is told by flags, environment or file. Shared by both workers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sps2_service.config import ServiceConfig, check_address, setting


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(ServiceConfig):
    """One rank of a group: a supervisor process that starts and watches its engine."""

    group: str
    """Name of the group, for example prefill-0."""
    rank: int = setting(minimum=0)
    """Rank in the group; 0 leads."""
    group_size: int = setting(minimum=1)
    """Ranks of the group."""
    model: Path
    """Hugging Face model folder: config.json, safetensors, tokenizer.json."""
    model_name: str = ""
    """Name that requests use; empty: the folder's name."""
    directory: str
    """HOST:PORT of the KV directory."""
    leader: str = ""
    """HOST:PORT of rank 0; every other rank needs it."""
    tp: int = setting(1, minimum=1)
    """Tensor ranks: parts that every layer is split into, each on a rank of its own; the same on all ranks of the
    group, whose size must be a multiple. A group of 4 with 2 is 2 slices of the prompt (prefill), or 2 holders of
    KV (decode), x 2 parts of the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the engine computes; auto takes a GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"
    """Weights and their products; auto takes bf16 where the device multiplies it in hardware. KV on a CPU is fp32."""
    threads: int = setting(1, minimum=1)
    """Threads of one operator on a CPU."""
    kv_tokens: int = setting(131_072, minimum=64)
    """Tokens whose KV the rank can hold."""
    kv_transport: Literal["auto", "nixl", "grpc"] = "auto"
    """How KV travels from prefill to decode; auto takes NIXL where both sides have it."""
    collective_timeout_s: float = setting(120.0, minimum=1)
    """Longest wait for a peer inside a collective; a dead or stopped engine is noticed long before."""
    drain_s: float = setting(30.0, minimum=0)
    """Seconds for requests to finish when the group drains; what is left then goes on on other groups."""
    engine_stuck_s: float = setting(600.0, minimum=1)
    """An engine that is busy for so long without a step or a layer done is killed and started again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_address("--directory", self.directory)
        if self.leader:
            check_address("--leader", self.leader)
        if self.rank >= self.group_size:
            raise ValueError(f"--rank {self.rank} is outside a group of {self.group_size}")
        if self.rank > 0 and not self.leader:
            raise ValueError(f"--leader is required for rank {self.rank}: the address of rank 0")
        if self.group_size % self.tp:
            raise ValueError(
                f"a group of {self.group_size} ranks cannot be cut into tensor groups of {self.tp}: "
                f"make its size a multiple of {self.tp}, or change --tp"
            )

    @property
    def worker_id(self) -> str:
        """Name of this rank: "<group>/<rank>"."""
        return f"{self.group}/{self.rank}"

    def engine_settings(self, model_hash: str) -> dict[str, Any]:
        """What the engine is told of this, by the names of `sps2_engine.runtime.options.EngineOptions`."""
        return {
            "name": self.worker_id,
            "rank": self.rank,
            "model": str(self.model),
            "model_hash": model_hash,
            "host": self.host,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "kv_tokens": self.kv_tokens,
            "kv_transport": self.kv_transport,
            "collective_timeout_s": self.collective_timeout_s,
            "tp": self.tp,
            "log_level": self.log_level,
            "log_json": self.log_json,
        }

    @property
    def host(self) -> str:
        """Interface that the engine binds to: the one that gRPC is served on."""
        return self.listen.rpartition(":")[0] or "127.0.0.1"
