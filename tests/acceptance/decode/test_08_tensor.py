"""Must show 8: decode on meshes of sequence x tensor ranks: streams as on one rank, bytes as in closed form."""

from pathlib import Path

import pytest

from sps2_engine.mesh import Mesh
from support.checkpoints import make_tiny_checkpoint
from support.decode_script import NUM_STEPS, Resizes, check_bytes, execute, ids, write_script
from support.deployment import DEMO_MODEL, deployment
from support.mesh_cases import MODELS
from support.must_show import MustShow
from support.streams import ask, ask_together, check_same, epochs, mixed_requests, wait_for_free_kv

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3_000)]

MESHES = (Mesh(1, 2), Mesh(2, 1), Mesh(2, 2), Mesh(1, 4))
RESIZES: Resizes = {5: [(0, 2, ())], 20: [(1, 2, ())], 40: [(0, 1, (1,))], 60: [(1, 1, (0,))]}
LENGTHS = (16, 3_000, 40, 1_500, 100, 700, 250, 64)
PREFILLS = (("1x1", 1), ("1x2", 1), ("1x2", 2))
"""Pool and tensor ranks."""


def name_of(mesh: Mesh) -> str:
    return f"{mesh.sp}x{mesh.tp}"


@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
def test_tokens_and_bytes(must_show: MustShow, tmp_path: Path, mesh: Mesh) -> None:
    """Every kind of model, heads from 8/1 to 4/4; where there are two holders, rows that move to and fro."""
    with must_show(f"8 tensor ranks: (cp, tp) = ({mesh.sp}, {mesh.tp}), {len(MODELS)} models") as figures:
        num_tokens = 0
        for index, (family, overrides) in enumerate(MODELS.values()):
            folder = make_tiny_checkpoint(tmp_path / str(index), family, **overrides)
            script = write_script(mesh.sp, RESIZES if mesh.sp > 1 else {})
            executed = execute(folder, mesh, script)
            assert dict(ids(executed)) == dict(ids(execute(folder, Mesh(), write_script(1, {}))))
            check_bytes(folder, script, executed)
            num_tokens += NUM_STEPS * len(executed.tokens)
        figures.append(f"{num_tokens:,} tokens as on one rank, sampled ones too, equal on all tensor ranks")
        figures.append("q_exchange, tensor and kv_move bytes are the closed forms")


@pytest.mark.parametrize("prefill", PREFILLS, ids=lambda prefill: f"from-{prefill[0]}-tp{prefill[1]}")
@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
def test_streams(must_show: MustShow, prefill: tuple[str, int], mesh: Mesh) -> None:
    requests = mixed_requests(LENGTHS, least_tokens=32)
    pool, prefill_tp = prefill
    arguments = ["--prefill-tp", str(prefill_tp), "--decode-tp", str(mesh.tp)]
    arguments += ["--debug-invariants", "--threads", "1"]
    what = f"prefill {pool} tp {prefill_tp} -> decode ({mesh.sp}, {mesh.tp})"
    with (
        must_show(f"8 tensor ranks: {what}") as figures,
        deployment(DEMO_MODEL, pool, f"1x{mesh.size}", arguments) as running,
        running.client() as client,
    ):
        in_epochs = epochs(client)
        alone = [ask(client, one) for one in requests]
        tally = check_same(DEMO_MODEL, requests, alone, ask_together(client, requests))
        figures.append(str(tally))
        tally.check()
        wait_for_free_kv(client)
        assert epochs(client) == in_epochs, "blocks or tokens were not as they must be: see the log"
        figures.append("blocks as the leader counts them at every step, 0 used afterwards")
