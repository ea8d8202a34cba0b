"""Decode on meshes of sequence and tensor ranks: tokens as on one rank, whatever moves, and bytes as in closed form."""

from pathlib import Path

import pytest

from sps2_engine.mesh import Mesh
from support.checkpoints import make_tiny_checkpoint
from support.decode_script import Executed, Resizes, check_bytes, execute, ids, write_script

pytestmark = pytest.mark.multiprocess

RESIZES: Resizes = {5: [(0, 2, ())], 20: [(1, 2, ())], 40: [(0, 1, (1,))], 60: [(1, 1, (0,))]}
"""To both sequence indices, and to another home."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 4 query heads and 2 KV heads."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("decode mesh") / "model", "llama")


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Executed:
    return execute(checkpoint, Mesh(), write_script(1, {}))


@pytest.mark.parametrize(
    "mesh", [Mesh(1, 2), Mesh(2, 2), Mesh(1, 4)], ids=lambda mesh: f"{mesh.sp}x{mesh.tp}"
)
def test_same_tokens_as_one_rank(checkpoint: Path, alone: Executed, mesh: Mesh) -> None:
    """On 1 x 4 two ranks each hold the same KV head."""
    script = write_script(mesh.sp, RESIZES if mesh.sp > 1 else {})
    executed = execute(checkpoint, mesh, script)
    assert dict(ids(executed)) == dict(ids(alone))
    check_bytes(checkpoint, script, executed)
    assert (script.num_blocks_moved > 10) == (mesh.sp > 1)
