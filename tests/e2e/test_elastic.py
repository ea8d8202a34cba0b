"""Groups join and leave under load: no request fails, tokens are right, and what outlasts a drain goes on elsewhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sps2_client import Client, Unavailable
from support.deployment import DEMO_MODEL, LocalDeployment, deployment
from support.elastic import (
    Load,
    attempts_after_draining,
    group_of,
    handed_back,
    same_tokens,
    scale,
    uses,
    wait_for_groups,
)
from support.faults import SEEN_BEFORE, read_tokens
from support.streams import ask, mixed_requests
from support.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

BUDGET_S = 0.5


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def elastic(logs: Path) -> Iterator[LocalDeployment]:
    arguments = ["--profile", "exact", "--threads", "1", "--log-dir", str(logs)]
    with deployment(DEMO_MODEL, "1x1", "1x2", [*arguments, "--drain-timeout", str(10 + BUDGET_S)]) as running:
        yield running


def test_up_under_load_down_and_a_stream_that_outlasts_the_drain(
    elastic: LocalDeployment, logs: Path
) -> None:
    requests, (long,) = mixed_requests([150, 40, 300, 90]), mixed_requests([60], least_tokens=700)
    with elastic.client() as client:
        answers = [ask(client, one) for one in requests]
        with Load(elastic.address, DEMO_MODEL, requests, answers, num_clients=4) as load:
            scale(elastic, "prefill=2", "decode=2")
            wait_until(lambda: all(one.after_s is not None for one in uses(logs / "router.log")), 60)
        load.check()
        alone = ask(client, long)
        with client.stream(timeout=120, **long.options) as stream:
            read_tokens(stream, SEEN_BEFORE)
            leaving = group_of(client, "decode")
            assert client.drain_group(leaving) == BUDGET_S
            tokens = stream.final().token_ids
        same_tokens(DEMO_MODEL, long, tokens, alone.token_ids).check()
        assert handed_back(logs, leaving) == [1]
        staying = "decode-1" if leaving == "decode-0" else "decode-0"
        wait_for_groups(client, "prefill-0", "prefill-1", staying)
        with Load(elastic.address, DEMO_MODEL, requests, answers) as load:
            events = scale(elastic, "prefill=1")
        load.check()
        wait_for_groups(client, "prefill-0", staying)
    assert [one["event"] for one in events] == ["draining", "left", "scaled"]
    assert events[1]["clean"]
    assert attempts_after_draining(logs / "router.log") == []


def test_the_last_group_leaves_and_another_comes(elastic: LocalDeployment) -> None:
    with elastic.client() as client:
        (group,) = (name for name in groups(client) if name.startswith("decode"))
        client.drain_group(group)
        wait_for_groups(client, "prefill-0")
        with pytest.raises(Unavailable, match="no ready decode group") as refused:
            client.generate("x", max_tokens=2)
        assert refused.value.retry_after
        scale(elastic, "decode=1")
        assert client.generate("x", max_tokens=2).token_ids


def groups(client: Client) -> set[str]:
    return {one.group for one in client.cluster_state().workers}
