"""Must show 5: bad input is refused with the right status, and the deployment goes on serving."""

from pathlib import Path

import pytest

from support.bad_input import check_all_refused, check_start_refused, drop_tensor
from support.checkpoints import make_tiny_checkpoint
from support.deployment import deployment
from support.must_show import MustShow
from support.streams import wait_for_free_kv

pytestmark = pytest.mark.acceptance

REFUSED_WITHIN_S = 30.0


def test_requests(must_show: MustShow) -> None:
    with must_show("5 bad requests") as figures, deployment() as running:
        count = check_all_refused(running)
        with running.client() as client:
            wait_for_free_kv(client)
        figures.append(f"{count} refused with status, field and advice; then it served as before")


@pytest.mark.parametrize(
    ("family", "tensor"),
    [("llama", "model.layers.1.mlp.up_proj.weight"), ("qwen3", "model.layers.0.self_attn.k_norm.weight")],
)
def test_missing_tensor(must_show: MustShow, tmp_path: Path, family: str, tensor: str) -> None:
    with must_show(f"5 {family} checkpoint without {tensor}") as figures:
        folder = make_tiny_checkpoint(tmp_path / family, family)
        drop_tensor(folder, tensor)
        seconds = check_start_refused(folder, [tensor])
        figures.append(f"`sps2 up` named it and exited with 1 after {seconds:.1f} s")
        assert seconds < REFUSED_WITHIN_S
