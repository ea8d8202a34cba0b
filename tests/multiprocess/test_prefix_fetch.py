"""A prompt whose beginning another prefill group has cached: it comes from there, and the answer is the same.

Whatever goes wrong on the way, the prompt is computed, and nobody keeps a block for it.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sps2.internal.v1 import prefill_service_pb2
from sps2_engine.kv_pool import OutOfBlocksError
from sps2_engine.kv_transfer.rows import Rows
from sps2_engine.mesh import Mesh
from sps2_layout.attention import Attention
from sps2_layout.layout import Span
from sps2_layout.profiles import Ladder, Profile
from sps2_prefill_worker import fetch_costs
from sps2_prefill_worker.fetch_counts import FetchCounts, FetchResult
from sps2_prefill_worker.holders import GrpcHolders
from sps2_prefill_worker.publish import Delivery
from sps2_prefill_worker.servicer import PrefillServicer
from sps2_service.errors import ServiceError, Unavailable
from sps2_service.request_fields import Vocabulary
from sps2_service.server import ServiceServer
from sps2_service.tls import Tls
from support.certificates import Authority
from support.checkpoints import VOCAB_SIZE, make_tiny_checkpoint
from support.prefill_groups import Neighbours, PrefillGroup, prompt
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)

DRAW = random.Random(11)
FIRST = DRAW.choices(range(VOCAB_SIZE), k=500)
SECOND = FIRST[:470] + DRAW.choices(range(VOCAB_SIZE), k=200)
SPARSE = Ladder("sparse", (Profile(4, ((1, 1), (4, 4)), tail=16),), 1)
HELD = 448
"""Tokens of the full blocks that both begin with."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("fetch") / "tiny", "llama")


def exact(ids: Sequence[int]) -> Attention:
    return Attention(len(ids), len(ids))


async def all_free(made: Sequence[PrefillGroup]) -> None:
    """What was given up is still being given up when its call has ended."""
    await asyncio.to_thread(wait_until, lambda: not any(group.num_used for group in made), timeout=20.0)


@asynccontextmanager
async def groups(
    model: Path, *meshes: Mesh, neighbours: Neighbours | None = None
) -> AsyncIterator[tuple[list[PrefillGroup], Neighbours]]:
    """Groups "0", "1", ... that reach each other; in the end none holds a block but for what it has cached."""
    neighbours = neighbours or Neighbours()
    made = [PrefillGroup(str(index), model, mesh, neighbours) for index, mesh in enumerate(meshes)]
    try:
        yield made, neighbours
        await all_free(made)
    finally:
        for group in made:
            group.close()
    assert [one.num_used for one in made] == [0] * len(made)
    assert [sum(role.kv_blocks_cached for role in one.ranks.roles) for one in made] == [0] * len(made)


async def computed(group: PrefillGroup, ids: Sequence[int], attention: Attention) -> int:
    """The first token where nothing is reused."""
    first, _ = await group.prefill(prompt("whole", ids, attention, reuse=False))
    assert first.cached_tokens == 0
    return first.token_id


ONE, PAIR = Mesh(1, 1), Mesh(2, 1)
MESHES = [
    (ONE, PAIR),
    (Mesh(2, 2), Mesh(3, 1)),
    (Mesh(3, 1), Mesh(1, 2)),
]


@pytest.mark.parametrize(("holder", "asking"), MESHES, ids=lambda mesh: f"{mesh.sp}x{mesh.tp}")
async def test_a_fetched_beginning_is_as_good_as_a_computed_one(
    model: Path, holder: Mesh, asking: Mesh
) -> None:
    """From any mesh to any other; a second fetch brings only what the first has not."""
    longer = [*SECOND, *DRAW.choices(range(VOCAB_SIZE), k=90)]
    async with groups(model, holder, asking) as ((a, b), neighbours):
        await a.prefill(prompt("first", FIRST, exact(FIRST)))
        first, delivered = await b.prefill(prompt("second", SECOND, exact(SECOND), [("0", HELD)]))
        assert (first.cached_tokens, first.token_id) == (HELD, await computed(b, SECOND, exact(SECOND)))
        assert torch.equal(b.cached_kv(HELD), a.cached_kv(HELD))
        token_bytes = b.planner.costs.kv_token_bytes
        assert delivered.fetched_bytes == HELD * token_bytes
        assert neighbours.asked == ["0"]
        await a.prefill(prompt("longer", longer, exact(longer)))
        later, delivered = await b.prefill(prompt("later", [*longer, 5], exact([*longer, 5]), [("0", 704)]))
        assert (later.cached_tokens, delivered.fetched_bytes) == (704, (704 - 640) * token_bytes)
        again, delivered = await b.prefill(prompt("again", longer, exact(longer), [("0", 704)]))
        assert (again.cached_tokens, delivered.fetched_bytes) == (704, 0), "it is here"
        counts = b.coordinator.fetches
        assert counts == FetchCounts(Counter({FetchResult.COMPLETE: 2}), 512, 512 * token_bytes)
        assert again.token_id == await computed(b, longer, exact(longer))


async def test_a_mask_is_adopted_with_what_is_fetched(model: Path) -> None:
    first = Attention.admit(SPARSE, len(FIRST))
    adopting = first.adopting(HELD)
    async with groups(model, ONE, PAIR) as ((a, b), _):
        await a.prefill(prompt("first", FIRST, first))
        dense, delivered = await b.prefill(prompt("dense", SECOND, exact(SECOND), [("0", HELD)]))
        assert (dense.cached_tokens, delivered.fetched_bytes) == (0, 0), "KV of another mask is not sent"
        taken, _ = await b.prefill(prompt("second", SECOND, adopting, [("0", HELD)]))
        assert (taken.cached_tokens, taken.token_id) == (HELD, await computed(b, SECOND, adopting))


@pytest.mark.parametrize("other", ["has evicted it", "is gone"])
async def test_a_holder_sends_while_it_computes_and_of_two_the_one_that_has_it(
    model: Path, other: str
) -> None:
    async with groups(model, ONE, ONE, PAIR) as ((first, busy, asking), neighbours):
        if other == "is gone":
            first.die()
        await busy.prefill(prompt("first", FIRST, exact(FIRST)))
        busy.free.clear()
        sources = [("0", HELD), ("1", HELD)]
        answer, _ = await asking.prefill(prompt("second", SECOND, exact(SECOND), sources))
        busy.free.set()
        assert neighbours.asked == ["0", "1"]
        assert asking.coordinator.fetches.results == {FetchResult.REFUSED: 1, FetchResult.COMPLETE: 1}
        assert (answer.cached_tokens, answer.token_id) == (
            HELD,
            await computed(asking, SECOND, exact(SECOND)),
        )


def hold_back(group: PrefillGroup) -> asyncio.Event:
    """Its ranks send one layer of what they are asked for and no more; set when they are asked."""
    asked, loop = asyncio.Event(), asyncio.get_running_loop()
    for role in group.ranks.roles:
        publisher = role._loaded_publisher

        def first_layer(delivery: Delivery, layer: int, ready: Any = publisher.layer_ready) -> None:
            loop.call_soon_threadsafe(asked.set)
            if layer == 0:
                ready(delivery, layer)

        publisher.layer_ready = first_layer  # type: ignore[method-assign]
    return asked


@pytest.mark.parametrize(
    ("fault", "result"),
    [
        ("dies", FetchResult.REFUSED),
        ("is silent", FetchResult.LATE),
        ("is gone", FetchResult.REFUSED),
    ],
)
async def test_a_holder_that_fails_costs_the_compute_and_nothing_else(
    model: Path, fault: str, result: FetchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the fetch, or before it; the ranks that asked have their blocks back."""
    async with groups(model, PAIR, PAIR) as ((holder, asking), _):
        await holder.prefill(prompt("first", FIRST, exact(FIRST)))
        if fault == "is silent":
            monkeypatch.setattr(fetch_costs, "LEAST_TIMEOUT_S", 0.3)
        if fault == "is gone":
            holder.die()
        asked = hold_back(holder)
        call = asyncio.ensure_future(asking.prefill(prompt("second", SECOND, exact(SECOND), [("0", HELD)])))
        if fault == "dies":
            await asked.wait()
            holder.die()
        first, delivered = await call
        assert (first.cached_tokens, delivered.fetched_bytes) == (0, 0)
        assert asking.coordinator.fetches == FetchCounts(Counter({result: 1}))
        assert first.token_id == await computed(asking, SECOND, exact(SECOND))
        if fault != "is silent":
            for role in holder.ranks.roles:
                role.reset()


async def test_a_rank_without_room_has_the_prompt_computed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with groups(model, ONE, PAIR) as ((holder, asking), neighbours):
        await holder.prefill(prompt("first", FIRST, exact(FIRST)))

        def take(_spans: Sequence[Span]) -> Rows:
            raise OutOfBlocksError(4, 0)

        monkeypatch.setattr(asking.ranks.roles[1]._loaded_publisher, "take", take)
        first, _ = await asking.prefill(prompt("second", SECOND, exact(SECOND), [("0", HELD)]))
        assert (first.cached_tokens, neighbours.asked) == (0, [])
        assert asking.coordinator.fetches.results == {FetchResult.NO_ROOM: 1}


async def test_a_prompt_that_is_cancelled_or_loses_its_group_ends_its_fetch(model: Path) -> None:
    async with groups(model, PAIR, ONE) as ((holder, asking), _):
        await holder.prefill(prompt("first", FIRST, exact(FIRST)))
        asked = hold_back(holder)
        cancelled = asyncio.ensure_future(
            asking.prefill(prompt("cancelled", SECOND, exact(SECOND), [("0", HELD)]))
        )
        await asked.wait()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await all_free([asking])
        asked.clear()
        lost = asyncio.ensure_future(asking.prefill(prompt("lost", SECOND, exact(SECOND), [("0", HELD)])))
        await asked.wait()
        asking.die()
        with pytest.raises(Unavailable, match="has died"):
            await lost
        assert asking.coordinator.fetches.results == {FetchResult.GIVEN_UP: 2}
        asking.ranks.roles[0].reset()


class TlsNeighbours(Neighbours):
    """Leaders serve SendPrefix by mTLS, and ask each other with the certificate that the test names."""

    def __init__(self, authority: Authority) -> None:
        super().__init__()
        self._authority = authority
        self.asks_as = "prefill"
        self.addresses: dict[str, str] = {}
        self.failures: list[str] = []

    async def send_prefix(
        self, address: str, request: prefill_service_pb2.SendPrefixRequest, timeout_s: float
    ) -> int:
        holders = GrpcHolders(self._tls(self.asks_as) if self.asks_as else None)
        try:
            return await holders.send_prefix(self.addresses[address], request, timeout_s)
        except ServiceError as error:
            self.failures.append(type(error).__name__)
            raise

    @asynccontextmanager
    async def serving(self, group: PrefillGroup) -> AsyncIterator[None]:
        server = ServiceServer(tls=self._tls(group.name), peers=("prefill",))
        servicer = PrefillServicer(group.coordinator, Vocabulary("tiny", VOCAB_SIZE))
        server.add(servicer, prefill_service_pb2.DESCRIPTOR.services_by_name["PrefillService"])
        self.addresses[group.name] = await server.start("127.0.0.1:0")
        try:
            yield
        finally:
            await server.stop(0)

    def _tls(self, name: str) -> Tls:
        made = self._authority.issue(name)
        return Tls(made.cert, made.key, self._authority.cert)


async def test_a_fetch_under_mutual_tls(model: Path, tmp_path: Path) -> None:
    """Who may not ask, or asks in plaintext, computes; a leader with the right certificate gets what is held."""
    neighbours = TlsNeighbours(Authority(tmp_path))
    async with groups(model, ONE, PAIR, neighbours=neighbours) as ((holder, asking), _):
        await holder.prefill(prompt("first", FIRST, exact(FIRST)))
        async with neighbours.serving(holder):
            # What it computes itself it has cached then: each of the others begins with less of it.
            for name, num_tokens, asks_as in (("plain", 128, ""), ("stranger", 256, "decode")):
                neighbours.asks_as = asks_as
                ids = FIRST[: num_tokens + 1]
                first, delivered = await asking.prefill(prompt(name, ids, exact(ids), [("0", num_tokens)]))
                assert delivered.fetched_bytes == 0
            assert neighbours.failures == ["Unavailable", "PermissionDenied"]
            neighbours.asks_as = "prefill"
            first, delivered = await asking.prefill(prompt("second", SECOND, exact(SECOND), [("0", HELD)]))
        assert delivered.fetched_bytes == (HELD - 256) * asking.planner.costs.kv_token_bytes
        assert (first.cached_tokens, first.token_id) == (HELD, await computed(asking, SECOND, exact(SECOND)))
