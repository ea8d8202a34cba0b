"""Live resize on Gloo ranks: real models, plans and collectives; tokens as on one rank that is never resized."""

from pathlib import Path

import pytest

from sps2_engine.mesh import Mesh
from support.checkpoints import make_tiny_checkpoint
from support.decode_script import check_bytes, execute, ids, write_script

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("resize") / "model", "llama")


def test_one_to_four_to_two_and_another_home(checkpoint: Path) -> None:
    """1 -> 4 -> 2; then away from home; and two choices that go to two ranks of which neither was their home."""
    script = write_script(
        4,
        {
            5: [(0, 4, ())],
            20: [(0, 2, ())],
            40: [(0, 2, (2, 3)), (1, 2, (2, 3))],
            60: [(0, 1, (1,)), (1, 4, ())],
        },
    )
    alone = execute(checkpoint, Mesh(), write_script(1, {}))
    resized = execute(checkpoint, Mesh(4), script)

    assert dict(ids(resized)) == dict(ids(alone))
    assert len({tuple(row) for _, row in ids(resized)}) == 3
    assert alone.posted["kv_move"] == 0
    check_bytes(checkpoint, script, resized)
    assert 1 in script.homes
