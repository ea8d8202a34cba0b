"""Must show 1: the directory against its model under seeded faults, what a missing fence does, and its speed."""

import json
import subprocess
import sys
import time

import pytest

from sps2_service.lease_fence import LeaseFence
from support.directory_machine import FaultyRunner, run_machine
from support.must_show import MustShow
from support.redis_server import RedisServer

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3000)]

NUM_STEPS = 100_000
STEPS_OF_A_RUN = 100
RUNS_WITHOUT_A_FENCE = 300

LOOKUPS_PER_S, LOOKUP_P99_MS = 10_000, 20
UNARY_PER_S, HALF_LOAD_P99_MS = 1000, 5
EXPIRY_AFTER_TTL_S = 1.0


def test_100_000_steps(redis_server: RedisServer, must_show: MustShow) -> None:
    with must_show("1 the directory does what its model does, with seeded faults") as figures:
        began, done = time.monotonic(), 0
        while done < NUM_STEPS:
            done += run_machine(redis_server.url, NUM_STEPS // STEPS_OF_A_RUN, STEPS_OF_A_RUN, seed=done)
        figures.append(f"{done:,} steps in {time.monotonic() - began:.0f} s")


def test_without_the_workers_fence(
    redis_server: RedisServer, must_show: MustShow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LeaseFence, "holds", lambda fence, _now: fence.holds_until > 0)
    with must_show("1 the same without the workers' fence fails") as figures:
        with pytest.raises(AssertionError, match="acts after its lease has ended") as caught:
            run_machine(redis_server.url, RUNS_WITHOUT_A_FENCE, STEPS_OF_A_RUN, shrink=False)
        figures.append(str(caught.value).splitlines()[0][-60:])


@pytest.mark.parametrize(
    ("fence", "script", "piece", "instead"),
    [
        ("of attempts", "record_shards", "then return STALE end", "then end"),
        ("of prefixes", "find_prefix", "worker[TOKEN] ~= token", "false"),
        ("of incarnations", "renew", "worker[INCARNATION] ~= incarnation", "false"),
        ("of epochs", "draw_epoch", "drawn + 1", "0"),
        ("that holds leases after an outage", "expire", "if time >= hold_until then", "if true then"),
    ],
)
def test_without_a_fence_of_the_store(
    redis_server: RedisServer,
    must_show: MustShow,
    monkeypatch: pytest.MonkeyPatch,
    fence: str,
    script: str,
    piece: str,
    instead: str,
) -> None:
    monkeypatch.setattr(FaultyRunner, "edits", {script: (piece, instead)})
    with must_show(f"1 the same without the fence {fence} fails") as figures:
        with pytest.raises((AssertionError, pytest.fail.Exception)) as caught:
            run_machine(redis_server.url, RUNS_WITHOUT_A_FENCE, STEPS_OF_A_RUN, shrink=False)
        figures.append(type(caught.value).__name__)


def test_speed(must_show: MustShow) -> None:
    command = [sys.executable, "-P", "-m", "sps2_cli", "bench", "directory", "--json"]
    with must_show("1 a thousand workers renewing beside 100,000 live requests") as figures:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
        assert ran.returncode == 0, ran.stderr[-2000:]
        shown = json.loads(ran.stdout)
        figures.append(f"{shown['lookups_per_s']:,.0f} keys/s looked up, p99 {shown['p99_ms']:.1f} ms")
        figures.append(
            f"{shown['unary_per_s']:,.0f} calls/s beside renewals of {shown['renewals_per_s']:,.0f} ranks/s"
        )
        figures.append(f"p99 {shown['half_load_p99_ms']:.1f} ms at {shown['half_load_per_s']:,.0f} calls/s")
        figures.append(f"a lease of {shown['ttl_s']:g} s is over after {shown['expiry_s']:.2f} s")
        assert shown["lookups_per_s"] >= LOOKUPS_PER_S
        assert shown["p99_ms"] <= LOOKUP_P99_MS
        assert shown["unary_per_s"] >= UNARY_PER_S
        assert shown["half_load_p99_ms"] <= HALF_LOAD_P99_MS
        assert shown["expiry_s"] <= shown["ttl_s"] + EXPIRY_AFTER_TTL_S
