"""The smallest release by its rendered manifests, on processes; at full size: tests/acceptance/kubernetes."""

from pathlib import Path

import pytest

from support.kubelet.fixture import drill, not_in_order

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

START_S, STEP_S = 150.0, 60.0
VALUES = {
    "router": {"replicas": 1, "preStopSeconds": 2, "flags": {"max-connection-age-s": 1}},
    "directory": {"replicas": 1, "preStopSeconds": 1},
}


def test_a_release_starts_serves_and_ends(tmp_path: Path) -> None:
    with drill(tmp_path, VALUES, ["serve"]) as running:
        started = running.step("start", START_S)
        assert set(started["starts"].values()) == {1}
        assert len(set(started["pods"].values())) == len(started["pods"]) == 5
        served = running.step("serve", STEP_S)
        assert len(served["token_ids"]) == served["asked"]
        exits = running.finish(STEP_S)["exits"]
    assert len(exits) == 5
    assert not_in_order(exits) == []
