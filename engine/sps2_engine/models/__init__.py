"""Decoder models of published checkpoints: their configs, and one generic decoder that runs them all."""

from sps2_engine.models.config import ModelConfig, read_model_config
from sps2_engine.models.decoder import Attend, Decoder
from sps2_engine.models.load import load_decoder, random_decoder
from sps2_engine.weights import CheckpointError

__all__ = [
    "Attend",
    "CheckpointError",
    "Decoder",
    "ModelConfig",
    "load_decoder",
    "random_decoder",
    "read_model_config",
]
