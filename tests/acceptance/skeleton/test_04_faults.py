"""Must show 4: what dies is named or not missed at all, what it held is free, and nothing is left behind."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from support.faults import (
    DECODE_VICTIMS,
    PREFILL_VICTIMS,
    SEEN_BEFORE,
    SHORT,
    STORE_VICTIMS,
    SUPERVISED,
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
from support.must_show import MustShow

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]

DETECTED_S = 5.0
RECOVERED_S = 30.0
CARRIED_TOKENS = 500
FREED_S = 2.0 + 2.0
"""Two seconds to free, and as many until heartbeats have told the router so."""
GONE_S = 5.0
START_STAGES = ("", "", "device", "KV is taken", "KV is taken", "epoch .* rank 1 of 2")
"""How far an engine comes, by its log, before it dies again; the empty stage is that it exists."""


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
    shared.settled(60.0)
    return shared


def test_a_stream_that_dies_says_what_died(one: Target, must_show: MustShow) -> None:
    with must_show("4 kill -9 of router in mid-stream") as figures:
        cut = one.interrupt_router()
        figures.append(f"{type(cut.error).__name__} names it after {cut.detected_s:.2f} s")
        figures.append(f"serving again {one.recover(time.monotonic(), RECOVERED_S):.1f} s later")
        assert cut.detected_s <= DETECTED_S


@pytest.mark.parametrize("victim", DECODE_VICTIMS, ids=str)
def test_a_stream_goes_on_where_it_stopped(one: Target, victim: Victim, must_show: MustShow) -> None:
    with must_show(f"4 kill -9 of {victim} in mid-stream") as figures:
        with one.regrouped(victim, 2 * RECOVERED_S):
            pause_s = one.survive(victim, CARRIED_TOKENS)
        figures.append(
            f"{CARRIED_TOKENS} of {CARRIED_TOKENS} tokens right, the longest pause {pause_s:.1f} s"
        )
        figures.append("a later epoch, all other engines as before")
        assert pause_s <= RECOVERED_S


@pytest.mark.parametrize("victim", [*STORE_VICTIMS, *PREFILL_VICTIMS], ids=str)
def test_a_stream_does_not_miss_what_it_does_not_need(
    one: Target, victim: Victim, must_show: MustShow
) -> None:
    with must_show(f"4 kill -9 of {victim} after delivery") as figures:
        one.carry_on(victim, CARRIED_TOKENS)
        figures.append(f"{CARRIED_TOKENS} of {CARRIED_TOKENS} tokens right")
        figures.append(f"new request served {one.recover(time.monotonic(), RECOVERED_S):.1f} s later")


@pytest.mark.parametrize("victim", [*PREFILL_VICTIMS, *DECODE_VICTIMS], ids=str)
def test_a_rank_that_dies_during_prefill(one: Target, victim: Victim, must_show: MustShow) -> None:
    with must_show(f"4 kill -9 of {victim} during prefill") as figures:
        ended, took = one.lose_prefill(victim)
        figures.append(f"{ended} after {took:.1f} s")
        assert took <= 2 * RECOVERED_S  # the prompt is computed twice
        figures.append(f"serving again {one.recover(time.monotonic(), RECOVERED_S):.1f} s later")


@pytest.mark.parametrize("phase", get_args(Phase))
@pytest.mark.parametrize("how", get_args(Leaving))
def test_a_client_that_leaves_frees_everything(
    one: Target, how: Leaving, phase: Phase, must_show: MustShow
) -> None:
    with must_show(f"4 client leaves during {phase} ({how})") as figures:
        figures.append(f"every block reported free after {leave(one, how, phase, FREED_S):.2f} s")
        one.settled()


@pytest.mark.parametrize("name", ["decode-0/0", "decode-0/1"])
def test_a_silent_engine_is_noticed(one: Target, name: str, must_show: MustShow) -> None:
    victim = Victim(name, "engine")
    with must_show(f"4 SIGSTOP of {victim} in mid-stream") as figures:
        seen = len(one.deployment.process.lines)
        pause_s = one.survive(victim, CARRIED_TOKENS, signal.SIGSTOP)
        one.deployment.process.wait_for_line("no sign of life", 1.0, after=seen)
        figures.append(
            f"{CARRIED_TOKENS} of {CARRIED_TOKENS} tokens right, the longest pause {pause_s:.1f} s"
        )
        assert pause_s <= SUPERVISED + RECOVERED_S


def test_faults_in_a_row(one: Target, must_show: MustShow) -> None:
    """An engine that dies again and again while it starts and its group forms; then all ranks at once."""
    victim = Victim("decode-0/1", "engine")
    one.expected(SHORT)
    with must_show(f"4 kill -9 of {victim} while it starts, then of every rank at once") as figures:
        for stage in START_STAGES:
            seen = len(one.deployment.process.lines)
            one.send(victim)
            one.wait_for_engines()
            if stage:
                one.deployment.process.wait_for_line(rf"{victim.name} engine \| .*{stage}", 30.0, after=seen)
        for name in one.ranks:
            one.send(Victim(name, "both"))
        figures.append(f"serving again {one.recover(time.monotonic(), 2 * RECOVERED_S):.1f} s after the last")


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_sps2_up_leaves_nothing_behind(model: Path, tmp_path: Path, name: str, must_show: MustShow) -> None:
    before = shared_files()
    with (
        must_show(f"4 {name} of sps2 up with a running stream") as figures,
        target(model, cwd=tmp_path) as up,
    ):
        expected = up.expected(CARRIED_TOKENS)
        with up.streaming(num_tokens=CARRIED_TOKENS) as stream:
            read_tokens(stream, SEEN_BEFORE)
            traces = Traces.of(up, before, tmp_path)
            up.check_live()
            if name == "SIGINT":
                up.deployment.process.send(signal.SIGINT)
                assert stream.final().token_ids == expected
                assert up.deployment.process.wait(60.0) == 0, up.log
                figures.append("the stream finished, exit 0")
            else:
                os.kill(up.deployment.process.pid, signal.SIGKILL)
                error = up.error_of(stream)
                figures.append(f"the client has {type(error).__name__}")
                assert up.names_router(error), repr(error)
        took = traces.gone(GONE_S)
        figures.append(f"{len(traces.pids)} processes gone after {took:.2f} s, port free, no file left")
