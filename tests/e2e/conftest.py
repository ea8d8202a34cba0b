"""Deployments that several tests share; each takes ten seconds to start on two cores."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.checkpoints import make_tiny_checkpoint
from support.collector import Collector, collector
from support.deployment import LocalDeployment, deployment
from support.ports import free_port_range

NUM_SERVICES = 6
"""Directory, router and four ranks."""


@pytest.fixture(scope="session")
def traces() -> Iterator[Collector]:
    """Takes the traces of `demo`."""
    with collector() as taker:
        yield taker


@pytest.fixture(scope="session")
def demo(traces: Collector) -> Iterator[LocalDeployment]:
    """The demo model on two prefill and two decode ranks, which check their KV at every step and tell all they can."""
    arguments = ["--debug-invariants", "--metrics-port-base", str(free_port_range(NUM_SERVICES))]
    with deployment(prefill="1x2", decode="1x2", arguments=arguments, env=traces.environment) as running:
        yield running


@pytest.fixture(scope="session")
def odd_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose 14 query and 2 KV heads divide evenly over nothing."""
    folder = tmp_path_factory.mktemp("checkpoints") / "odd"
    return make_tiny_checkpoint(folder, "qwen2", num_attention_heads=14, num_key_value_heads=2)
