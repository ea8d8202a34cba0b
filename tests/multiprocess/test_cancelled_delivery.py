"""A prompt that is cancelled while its KV is under way, and the next one needs its blocks.

The commands of a rank have their turns: the cancel's is behind the next prompt's, which waits for the blocks.
"""

import random
import threading

import pytest

from sps2.internal.v1 import engine_pb2
from sps2_engine.kv_pool import OutOfBlocksError
from sps2_engine.mesh import Mesh
from sps2_prefill_worker import publish
from support.checkpoints import VOCAB_SIZE, make_tiny_checkpoint
from support.prefill_ranks import KV_TOKENS, PrefillRanks, cancel, prefill

pytestmark = pytest.mark.timeout(120)

FIRST, SECOND = "1", "2"
MORE_THAN_HALF = KV_TOKENS // 2 + 64


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> PrefillRanks:
    return PrefillRanks(make_tiny_checkpoint(tmp_path_factory.mktemp("cancel") / "tiny", "llama"), Mesh(1, 1))


@pytest.mark.parametrize("when", ["as it is computed", "as the next one waits"])
def test_its_blocks_are_free_before_the_turn_of_its_cancel(
    ranks: PrefillRanks, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "ROOM_TIMEOUT_S", 5.0)
    draw = random.Random(3)
    runs = [
        ranks.run_of(number, draw.choices(range(VOCAB_SIZE), k=MORE_THAN_HALF), 10**12, short=False)
        for number in (1, 2)
    ]
    cancels = {request: cancel(request, 1) for request in (FIRST, SECOND)}
    pool = ranks.roles[0]._model.pool
    allocate = pool.allocate

    def allocate_or_tell(num_blocks: int) -> list[int]:
        try:
            return allocate(num_blocks)
        except OutOfBlocksError:
            if when == "as the next one waits":
                threading.Thread(target=ranks.notice, args=(0, cancels[FIRST][0])).start()
            raise

    def on_event(_: PrefillRanks, rank: int, event: engine_pb2.EngineEvent) -> None:
        request = event.prefill.attempt.request_id
        if event.prefill.HasField("first_token") and (request == SECOND or when == "as it is computed"):
            ranks.notice(rank, cancels[request][0])

    monkeypatch.setattr(pool, "allocate", allocate_or_tell)
    ranks.execute([prefill(runs[0]), prefill(runs[1]), cancels[FIRST], cancels[SECOND]], on_event, told=2)
    assert ranks.reports(0) == [
        (request, kind)
        for kinds in (("started", "first_token"), ("cancelled",))
        for request in (FIRST, SECOND)
        for kind in kinds
    ]
    assert ranks.blocks_used == [0]
