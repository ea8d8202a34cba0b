"""Short prompts between the slices of a long one, on real ranks: who computes what when, and what is left behind."""

import random
import threading
from collections.abc import Callable

import pytest

from sps2.internal.v1 import engine_pb2
from sps2_engine.collectives import GroupError
from sps2_engine.mesh import Mesh
from support.checkpoints import VOCAB_SIZE, make_tiny_checkpoint
from support.prefill_ranks import PrefillRanks, cancel, prefill

pytestmark = pytest.mark.timeout(120)

SLICE_FLOPS = 4_000_000
"""A few dozen slices in the long prompt."""
LONG, SHORT, OTHER = "1", "2", "3"
DRAW = random.Random(5)
LONG_IDS, SHORT_IDS, OTHER_IDS = (DRAW.choices(range(VOCAB_SIZE), k=length) for length in (1500, 40, 60))

Say = Callable[[], None]


@pytest.fixture(scope="module", params=[Mesh(2, 1), Mesh(1, 2), Mesh(2, 2)], ids=str)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PrefillRanks:
    model = make_tiny_checkpoint(tmp_path_factory.mktemp("interludes") / "tiny", "llama")
    return PrefillRanks(model, request.param)


@pytest.fixture(scope="module")
def expected(ranks: PrefillRanks) -> dict[str, int]:
    """First tokens of the prompts, each computed by itself."""
    tokens = {}
    for request, run in zip((LONG, SHORT, OTHER), all_runs(ranks), strict=True):
        ranks.execute([prefill(run)])
        tokens[request] = ranks.first_token(request)
        check_free(ranks)
    return tokens


def all_runs(ranks: PrefillRanks) -> list[list[engine_pb2.RunPrefill]]:
    """The long prompt, one that a rank computes alone, and a short one that all share."""
    last = ranks.mesh.sp - 1
    return [
        ranks.run_of(1, LONG_IDS, SLICE_FLOPS, short=False),
        ranks.run_of(2, SHORT_IDS, SLICE_FLOPS, short=True, alone_on=last),
        ranks.run_of(3, OTHER_IDS, SLICE_FLOPS, short=True),
    ]


def is_progress(event: engine_pb2.EngineEvent, request: str) -> bool:
    return event.prefill.HasField("progress") and event.prefill.attempt.request_id == request


def is_started(event: engine_pb2.EngineEvent, request: str) -> bool:
    return event.prefill.HasField("started") and event.prefill.attempt.request_id == request


class Once:
    """Does something the first time that rank 0 reports what is waited for."""

    def __init__(
        self, when: Callable[[engine_pb2.EngineEvent], bool], then: Callable[[PrefillRanks], None]
    ) -> None:
        self._when, self._then, self._done = when, then, False

    def __call__(self, ranks: PrefillRanks, rank: int, event: engine_pb2.EngineEvent) -> None:
        if rank == 0 and not self._done and self._when(event):
            self._done = True
            self._then(ranks)


def tell(ranks: PrefillRanks, *commands: list[engine_pb2.EngineCommand]) -> None:
    """All ranks of some commands."""
    for command in commands:
        for rank in range(ranks.mesh.size):
            ranks.notice(rank, command[rank])


def during_the_long_one(*commands: list[engine_pb2.EngineCommand]) -> Once:
    """Tells of commands when the first layer of the long prompt is done."""
    return Once(lambda event: is_progress(event, LONG), lambda ranks: tell(ranks, *commands))


def order(ranks: PrefillRanks, rank: int, kind: str) -> list[str]:
    return [request for request, one in ranks.reports(rank) if one == kind]


def check_free(ranks: PrefillRanks) -> None:
    """Cancelling all leaves no block."""
    for role in ranks.roles:
        role.reset()
    assert ranks.blocks_used == [0] * ranks.mesh.size


def test_short_prompts_are_computed_before_the_long_one_goes_on(
    ranks: PrefillRanks, expected: dict[str, int]
) -> None:
    commands = [prefill(run) for run in all_runs(ranks)]
    ranks.execute(commands, during_the_long_one(*commands[1:]))
    assert {request: ranks.first_token(request) for request in expected} == expected
    tokens = [request for rank in range(ranks.mesh.size) for request in order(ranks, rank, "first_token")]
    assert sorted(tokens) == [LONG, SHORT, OTHER], "each once"
    for rank in range(ranks.mesh.size):
        assert order(ranks, rank, "started") == [LONG, SHORT, OTHER]
        progress = [event.prefill for event in ranks.events[rank] if event.prefill.HasField("progress")]
        assert progress[-1].attempt.request_id == LONG, "it ends last"
    check_free(ranks)


def test_a_follower_that_was_not_told_yet_waits(ranks: PrefillRanks, expected: dict[str, int]) -> None:
    commands = [prefill(run) for run in all_runs(ranks)][:2]

    def hook(ranks: PrefillRanks, rank: int, event: engine_pb2.EngineEvent) -> None:
        if rank == 0 and is_progress(event, LONG) and not order(ranks, 0, "started").count(SHORT):
            ranks.notice(0, commands[1][0])
        elif rank == 0 and is_started(event, SHORT):  # rank 0 has said that it goes now
            for follower in range(1, ranks.mesh.size):
                ranks.notice(follower, commands[1][follower])

    ranks.execute(commands, hook)
    assert ranks.errors == [None] * ranks.mesh.size
    assert (ranks.first_token(LONG), ranks.first_token(SHORT)) == (expected[LONG], expected[SHORT])
    check_free(ranks)


def test_a_cancel_of_the_long_one_while_a_short_one_computes(
    ranks: PrefillRanks, expected: dict[str, int]
) -> None:
    give_up = cancel(LONG, ranks.mesh.size)
    commands = [prefill(run) for run in all_runs(ranks)][:2]
    told = during_the_long_one(commands[1])
    cancelled = Once(lambda event: is_started(event, SHORT), lambda ranks: tell(ranks, give_up))

    def hook(*reported: object) -> None:
        told(*reported)  # type: ignore[arg-type]
        cancelled(*reported)  # type: ignore[arg-type]

    ranks.execute([*commands, give_up], hook)
    assert ranks.first_token(SHORT) == expected[SHORT]
    for rank in range(ranks.mesh.size):
        assert LONG not in order(ranks, rank, "first_token")
        assert order(ranks, rank, "cancelled") == [LONG]
    # What is left is the short one's, on its way.
    assert sum(ranks.blocks_used) == ranks.mesh.tp
    check_free(ranks)


@pytest.mark.parametrize("when", ["waits", "computes"])
def test_a_cancelled_short_one_is_free_before_the_long_one_is_computed(
    ranks: PrefillRanks, expected: dict[str, int], when: str
) -> None:
    give_up = cancel(SHORT, ranks.mesh.size)
    commands = [prefill(run) for run in all_runs(ranks)][:2]
    told = during_the_long_one(commands[1], *([give_up] if when == "waits" else []))
    computing = Once(lambda event: is_started(event, SHORT), lambda ranks: tell(ranks, give_up))

    def hook(*reported: object) -> None:
        told(*reported)  # type: ignore[arg-type]
        if when == "computes":
            computing(*reported)  # type: ignore[arg-type]

    ranks.execute([*commands, give_up], hook)
    assert ranks.first_token(LONG) == expected[LONG]
    for rank in range(ranks.mesh.size):
        events = [event.prefill for event in ranks.events[rank] if event.HasField("prefill")]
        kinds = [(one.attempt.request_id, one.WhichOneof("report")) for one in events]
        assert kinds.count((SHORT, "cancelled")) == 1
        assert kinds.index((SHORT, "cancelled")) < len(kinds) - 1 - kinds[::-1].index((LONG, "progress"))
    in_use = ranks.blocks_used
    for role in ranks.roles:
        role.notice(cancel(LONG, 1)[0])
        role.execute(cancel(LONG, 1)[0])
    assert ranks.blocks_used == [0] * ranks.mesh.size, f"of {in_use} only the long one's were left"


def test_the_end_of_the_group_while_a_short_one_computes(ranks: PrefillRanks) -> None:
    commands = [prefill(run) for run in all_runs(ranks)][:2]
    told = during_the_long_one(commands[1])

    def hook(ranks: PrefillRanks, rank: int, event: engine_pb2.EngineEvent) -> None:
        told(ranks, rank, event)
        if rank == ranks.mesh.size - 1 and is_started(event, SHORT):
            raise GroupError("this rank dies here")

    ranks.execute(commands, hook)
    assert all(ranks.errors), "every rank has noticed"
    assert ranks.blocks_used == [0] * ranks.mesh.size


def test_the_end_of_the_epoch_while_a_follower_waits_for_the_word(ranks: PrefillRanks) -> None:
    commands = [prefill(run) for run in all_runs(ranks)][:2]
    abort = engine_pb2.EngineCommand(abort_group=engine_pb2.AbortGroup(reason="a rank is gone"))
    ended = threading.Event()

    def hook(ranks: PrefillRanks, rank: int, event: engine_pb2.EngineEvent) -> None:
        if rank == 0 and is_progress(event, LONG):
            ranks.notice(0, commands[1][0])
        elif rank == 0 and is_started(event, SHORT):
            for follower in range(1, ranks.mesh.size):
                ranks.notice(follower, abort)
            ended.set()

    ranks.execute(commands, hook)
    assert ended.is_set()
    assert all(ranks.errors)
    assert ranks.blocks_used == [0] * ranks.mesh.size
