"""The smoke form of must show 4: one deployment from fault to fault, and what two ends of it leave behind."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.faults import (
    SEEN_BEFORE,
    Leaving,
    Phase,
    Target,
    Traces,
    Victim,
    leave,
    make_model,
    read_tokens,
    shared_files,
    target,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

# Bounds for a busy machine; the acceptance suite has the promised ones.
DETECTED_S = 10.0
RECOVERED_S = 60.0
FREED_S = 8.0
GONE_S = 10.0
CARRIED_TOKENS = 400


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("faults") / "tiny")


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[Target]:
    with target(model) as deployed:
        yield deployed


@pytest.fixture
def one(shared: Target) -> Target:
    """The deployment, at rest again after what the test before did to it."""
    shared.settled(RECOVERED_S)
    return shared


def test_a_stream_that_dies_says_what_died(one: Target) -> None:
    cut = one.interrupt_router()
    assert cut.detected_s <= DETECTED_S
    one.recover(time.monotonic(), RECOVERED_S)


def test_a_stream_goes_on_where_it_stopped(one: Target) -> None:
    """The leader with its engine; engines alone: `test_resume`."""
    victim = Victim("decode-0/0", "both")
    with one.regrouped(victim, RECOVERED_S):
        one.survive(victim, CARRIED_TOKENS)


@pytest.mark.parametrize("victim", [Victim("redis"), Victim("directory")], ids=str)
def test_a_stream_does_not_miss_what_it_does_not_need(one: Target, victim: Victim) -> None:
    one.carry_on(victim, CARRIED_TOKENS)
    one.recover(time.monotonic(), RECOVERED_S)


def test_a_stream_does_not_miss_a_prefill_rank(one: Target) -> None:
    victim = Victim("prefill-0/1", "engine")
    with one.regrouped(victim, RECOVERED_S):
        one.carry_on(victim, CARRIED_TOKENS)
        one.recover(time.monotonic(), RECOVERED_S)


@pytest.mark.parametrize(
    ("how", "phase"), [("cancel", "prefill"), ("deadline", "decode"), ("killed", "decode")]
)
def test_a_client_that_leaves_frees_everything(one: Target, how: Leaving, phase: Phase) -> None:
    leave(one, how, phase, FREED_S)
    one.settled()


@pytest.mark.parametrize(("name", "ranks"), [("SIGINT", "1x1"), ("SIGKILL", "1x2")])
def test_sps2_up_leaves_nothing_behind(model: Path, tmp_path: Path, name: str, ranks: str) -> None:
    before = shared_files()
    with target(model, ranks, cwd=tmp_path) as up:
        expected = up.expected(CARRIED_TOKENS)
        with up.streaming(num_tokens=CARRIED_TOKENS) as stream:
            read_tokens(stream, SEEN_BEFORE)
            traces = Traces.of(up, before, tmp_path)
            up.check_live()
            if name == "SIGINT":
                up.deployment.process.send(signal.SIGINT)
                assert stream.final().token_ids == expected
                assert up.deployment.process.wait(60.0) == 0, up.log
            else:
                os.kill(up.deployment.process.pid, signal.SIGKILL)
                assert up.names_router(up.error_of(stream))
        traces.gone(GONE_S)
