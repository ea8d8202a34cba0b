"""What both roles load at start: weights, the KV arena, and how they introduce themselves to peers."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sps2.internal.v1 import engine_pb2, kv_transfer_service_pb2
from sps2_engine.kv_pool import BLOCK_TOKENS, BlockPool, KvArena
from sps2_engine.models.decoder import Decoder
from sps2_engine.models.load import load_decoder
from sps2_engine.runtime.device import DTYPES, kv_dtype
from sps2_engine.runtime.options import EngineOptions

SLAB_LAYOUT_VERSION = 1


@dataclass(frozen=True)
class LoadedModel:
    """A rank's weights and KV memory."""

    options: EngineOptions
    device: torch.device
    decoder: Decoder
    arena: KvArena
    pool: BlockPool
    incarnation: str
    """Drawn once in the life of the engine process."""

    @property
    def scale(self) -> float:
        """Factor on attention scores."""
        return float(self.decoder.config.head_dim**-0.5)

    def kv_format(self) -> kv_transfer_service_pb2.KvFormat:
        """What peers must agree on before a byte of KV is sent."""
        config = self.decoder.config
        return kv_transfer_service_pb2.KvFormat(
            model_hash=self.options.model_hash,
            dtype=kv_dtype(self.options.dtype, self.device),
            layout_version=SLAB_LAYOUT_VERSION,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )

    def event(self, transfer_address: str = "") -> engine_pb2.EngineLoaded:
        """What the supervisor is told."""
        config = self.decoder.config
        return engine_pb2.EngineLoaded(
            process_incarnation=self.incarnation,
            transfer_address=transfer_address,
            kv_blocks_total=self.pool.num_blocks,
            device=self.device.type,
            dtype=self.options.dtype,
            num_layers=config.num_layers,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            linear_flops_per_token=self.decoder.flops_per_token,
        )


def load_model(
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[float], None],
    arena_device: torch.device,
) -> LoadedModel:
    """Loads the rank's share of the weights and allocates its KV arena, once in the life of the process.

    Args:
        arena_device: where KV lies; prefill keeps it in host memory, from which it leaves, since its attention
            reads each layer's keys while they are still at hand.

    Raises:
        CheckpointError: in one line, what is wrong with the model folder.
        ValueError: in one line, why the model cannot be split among so many tensor ranks.
    """
    decoder = load_decoder(Path(options.model), dtype, device, progress, options.share)
    config = decoder.config
    heads = options.share.kv_heads(config.num_kv_heads)
    num_blocks = -(-options.kv_tokens // BLOCK_TOKENS)
    kept_in = DTYPES[kv_dtype(options.dtype, device)]
    arena = KvArena(
        config.num_layers,
        num_blocks,
        len(heads),
        config.head_dim,
        kept_in,
        arena_device,
        first_head=heads.span.begin,
    )
    return LoadedModel(options, device, decoder, arena, BlockPool(num_blocks), uuid.uuid4().hex)
