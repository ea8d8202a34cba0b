"""Which model a benchmark runs: a checkpoint folder, or random weights of given sizes."""

from pathlib import Path

import typer

from sps2_bench.options import parse_settings
from sps2_bench.prefill.random_model import DEFAULT_SHAPE, model_config
from sps2_engine.models import CheckpointError, ModelConfig, read_model_config


def chosen_config(model: Path | None, random_model: str) -> ModelConfig:
    """The shape of the model that the options name.

    Args:
        model: a checkpoint folder, or None for random weights.
        random_model: sizes of the random model over `DEFAULT_SHAPE`, as in "hidden=64,layers=2".

    Raises:
        typer.BadParameter: they name none.
    """
    try:
        if model:
            return read_model_config(model)
        shape = parse_settings(random_model, DEFAULT_SHAPE) if random_model else DEFAULT_SHAPE
        return model_config(shape)
    except (CheckpointError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
