"""One deployment under what clients do to it: several streams, bad requests."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from support.bad_calls import check_calls, spec_calls, wire_calls
from support.bad_input import check_all_refused
from support.bad_worker_calls import check_worker_calls
from support.deployment import DEMO_MODEL, LocalDeployment
from support.metrics import scrape
from support.metrics_under_load import check_seen, watch
from support.streams import ask, ask_together, check_same, epochs, mixed_requests, wait_for_free_kv

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def test_streams_at_once_get_what_they_get_alone(demo: LocalDeployment) -> None:
    requests = mixed_requests([5, 300, 64, 900, 129, 1])
    with demo.client() as client:
        in_epochs = epochs(client)
        alone = [ask(client, one) for one in requests]
        check_same(DEMO_MODEL, requests, alone, ask_together(client, requests)).check()
        wait_for_free_kv(client)
        assert epochs(client) == in_epochs, "a rank's KV blocks were not as they must be: see its log"


def test_metrics_under_load(demo: LocalDeployment) -> None:
    requests = mixed_requests([1500] * 6, least_tokens=24)
    before = scrape(demo.metrics["router"])
    with demo.client() as client, ThreadPoolExecutor(1) as pool:
        answering = pool.submit(ask_together, client, requests)
        seen = watch(demo.metrics, answering)
        answers = answering.result()
    check_seen(seen, before, answers)


def test_bad_requests_are_refused_and_it_goes_on(demo: LocalDeployment) -> None:
    check_all_refused(demo)
    with demo.client() as client:
        model = client.list_models()[0]
        check_calls(demo.address, spec_calls(model) + wire_calls())
        check_worker_calls(client, DEMO_MODEL)
        wait_for_free_kv(client)
