"""`sps2 up` refuses a damaged checkpoint with one clear line."""

from pathlib import Path

import pytest

from support.bad_input import check_start_refused, drop_tensor
from support.checkpoints import make_tiny_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

MISSING = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tiny", "llama")
    drop_tensor(folder, MISSING)
    check_start_refused(folder, [MISSING], ["--prefill", "1x1", "--decode", "1x1"])
