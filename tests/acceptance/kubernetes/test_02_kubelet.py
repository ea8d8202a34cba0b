"""Must show 2, the kubelet drill: a rendered release on processes, scaled, rolled out, ended and killed under load.

The tests read one drill in order: its steps go on by themselves. See `support.kubelet` for what is true to a cluster.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from support.chart import example, render
from support.deployment import DEMO_MODEL
from support.identity import reference
from support.kubelet.fixture import RunningDrill, drill, not_in_order
from support.must_show import MustShow
from support.oracle import compare

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3600)]

STEP_S = 900.0
POOLS = ("decode", "prefill")
DEPLOYMENTS = ("router", "directory", "prefill", "decode")
ENDS = ("decode", "router")
STEPS = [
    *("serve", "helm-test"),
    *(f"scale {pool}" for pool in POOLS),
    *(f"restart {one}" for one in DEPLOYMENTS),
    *(f"end {one}" for one in ENDS),
    *("kill decode", "serve"),
]
STATEFUL = {
    **example("trial-cpu"),
    "prefill": {**example("trial-cpu")["prefill"], "placement": "statefulset", "groups": 2},
    "decode": {**example("trial-cpu")["decode"], "placement": "statefulset", "groups": 2},
}
"""Two groups in each pool: when a pod of one ends, the group does."""
KILLED = 137


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDrill]:
    with drill(tmp_path_factory.mktemp("trial"), example("trial-cpu"), STEPS) as running:
        yield running


def test_it_starts_as_declared(trial: RunningDrill, must_show: MustShow) -> None:
    with must_show("2 kubelet drill: trial-cpu starts as rendered") as figures:
        started = trial.step("start", STEP_S)
        containers = [one for workload in _workloads("trial-cpu") for one in workload.containers]
        probes = Counter(kind for one in containers for kind in one if kind.endswith("Probe"))
        assert sorted(started["starts"].values()) == [1] * len(containers)
        assert len(set(started["pods"].values())) == len(started["pods"])
        figures.append(
            f"{len(containers)} containers in {len(started['pods'])} pods, each with its own address"
        )
        figures.append(
            f"ready after {started['took_s']:.0f} s by {probes.total()} probes, none started twice"
        )


def test_it_serves(trial: RunningDrill, must_show: MustShow) -> None:
    with must_show("2 kubelet drill: a completion through the Service, and helm test") as figures:
        figures.append(_check_served(trial.step("serve", STEP_S)))
        tested = trial.step("helm-test", STEP_S)
        assert tested["code"] == 0, tested["output"]
        figures.append("the test hook's pod ends with 0")


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_is_scaled(trial: RunningDrill, must_show: MustShow, pool: str) -> None:
    with must_show(f"2 kubelet drill: {pool} 1, 2, 1 by its Deployment, under load") as figures:
        step = trial.step(f"scale {pool}", STEP_S)
        figures.append(_check_load(step))
        assert len(step["groups"]) == 1
        figures.append("the new group was used")


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_a_rolling_restart(trial: RunningDrill, must_show: MustShow, deployment: str) -> None:
    with must_show(f"2 kubelet drill: rolling restart of {deployment}, under load") as figures:
        step = trial.step(f"restart {deployment}", STEP_S)
        figures.append(_check_load(step))
        assert len(step["after"]) == len(step["before"])
        assert not set(step["after"]) & set(step["before"])
        figures.append(f"in {step['took_s']:.0f} s")


@pytest.mark.parametrize("component", ENDS)
def test_sigterm_amid_a_stream(trial: RunningDrill, must_show: MustShow, component: str) -> None:
    with must_show(f"2 kubelet drill: SIGTERM to {component} amid a stream") as figures:
        step = trial.step(f"end {component}", STEP_S)
        last_s = max(step["stop_s"])
        assert step["sigterm_s"] < step["stream_s"] <= last_s <= step["grace_s"]
        figures.append(
            f"{step['tokens']} tokens as undisturbed, the last {step['stream_s']:.1f} s after the deletion"
        )
        figures.append(
            f"SIGTERM after {step['sigterm_s']:.0f} s, the end after {last_s:.1f} of {step['grace_s']:.0f} s"
        )


def test_a_container_is_killed(trial: RunningDrill, must_show: MustShow) -> None:
    with must_show("2 kubelet drill: kill -9 of decode's second rank") as figures:
        step = trial.step("kill decode", STEP_S)
        assert step["codes"] == [KILLED]
        assert step["survivor_stayed"]
        before, after = step["epochs"]
        assert after > before
        figures.append(f"a new epoch after {step['back_s']:.1f} s; the other rank's process stayed")
        figures.append(_check_served(trial.step("serve", STEP_S)))


def test_everything_ended_by_itself(trial: RunningDrill, must_show: MustShow) -> None:
    with must_show("2 kubelet drill: ends of containers") as figures:
        exits = trial.finish(STEP_S)["exits"]
        assert [one["code"] for one in not_in_order(exits)] == [KILLED]
        share = max(one["stop_s"] / one["grace_s"] for one in exits)
        figures.append(f"{len(exits) - 1} by SIGTERM, all with code 0, none by SIGKILL")
        figures.append(f"at most {100 * share:.0f}% of the grace period")


def test_groups_of_pods(tmp_path: Path, must_show: MustShow) -> None:
    with must_show("2 kubelet drill: placement statefulset, two groups of two pods in each pool") as figures:
        with drill(tmp_path, STATEFUL, ["serve", "restart decode-0", "serve"]) as running:
            started = running.step("start", STEP_S)
            figures.append(f"{len(started['pods'])} pods ready after {started['took_s']:.0f} s")
            figures.append(_check_served(running.step("serve", STEP_S)))
            restarted = running.step("restart decode-0", STEP_S)
            figures.append(f"rolling restart of a group's pods: {_check_load(restarted)}")
            exits = running.finish(STEP_S)["exits"]
        assert [one for one in exits if one["code"] or one["killed"]] == []


def _workloads(name: str) -> list[Any]:
    return [one for one in render(example(name)).workloads if one.component != "test"]


def _check_served(step: dict[str, Any]) -> str:
    """The tokens are those of one plain process."""
    prompt = tuple(Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).encode(step["prompt"]).ids)
    found = compare(step["token_ids"], *reference(DEMO_MODEL, prompt, step["asked"]))
    assert not found.flipped
    return f"{found.num_compared} tokens as one plain process has them"


def _check_load(step: dict[str, Any]) -> str:
    assert step["failures"] == []
    assert step["answers"] > 0
    assert step["flips"] <= max(1, step["compared"] // 10_000)
    return f"{step['answers']} streams, 0 failed, {step['compared']:,} tokens compared, {step['flips']} near-tie flips"
