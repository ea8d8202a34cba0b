"""Must show 3: each service's metrics are as documented, bounded under 1,000 requests, and alive during load."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import pytest

from sps2_client import Client, SPS2Error
from support.deployment import LocalDeployment, deployment
from support.metrics import Scrape, scrape
from support.metrics_under_load import check_seen, watch
from support.must_show import MustShow
from support.ports import free_port_range
from support.streams import ask_together, mixed_requests

pytestmark = pytest.mark.acceptance

NUM_SERVICES = 6
NUM_REQUESTS, AT_ONCE = 1000, 16
LOAD = [3000] * 12
CANARY = "metrics-canary-7f3a"


@pytest.fixture(scope="module")
def running() -> Iterator[LocalDeployment]:
    arguments = ["--threads", "1", "--metrics-port-base", str(free_port_range(NUM_SERVICES))]
    with deployment(arguments=arguments) as one:
        yield one


def scrapes(running: LocalDeployment) -> dict[str, Scrape]:
    return {name: scrape(address) for name, address in running.metrics.items()}


def families(scraped: Scrape) -> set[str]:
    """By the names of docs/metrics.md."""
    return {
        name + ("_total" if family.type == "counter" else "")
        for name, family in scraped.families.items()
        if name.startswith("sps2_")
    }


def test_names(must_show: MustShow, running: LocalDeployment, repo_root: Path) -> None:
    with must_show("3 metrics: names as documented") as figures:
        documented = set(
            re.findall(r"^\| `(sps2_\w+)`", (repo_root / "docs/metrics.md").read_text(), re.MULTILINE)
        )
        with running.client() as client:
            client.generate("Metrics", max_tokens=2)
        seen = scrapes(running)
        for name, one in seen.items():
            assert families(one) <= documented, name
        exported = set.union(*map(families, seen.values()))
        absent = {name for name in documented - exported if not name.startswith("sps2_device_")}
        assert absent <= {"sps2_directory_rpc_errors_total"}, absent  # no call has failed yet
        figures.append(
            f"{len(seen)} endpoints, {len(exported)} names of {len(documented)} documented, none other"
        )


def test_load(must_show: MustShow, running: LocalDeployment) -> None:
    with must_show("3 metrics: scraped during load") as figures:
        before = scrape(running.metrics["router"])
        with running.client() as client, ThreadPoolExecutor(1) as pool:
            answering = pool.submit(ask_together, client, mixed_requests(LOAD, least_tokens=64))
            seen = watch(running.metrics, answering)
            check_seen(seen, before, answering.result())
        router = seen.last["router"]
        figures.append(
            f"{seen.num_scrapes} scrapes while {len(LOAD)} prompts of {LOAD[0]} tokens were answered"
        )
        for name in ("time_to_first_token", "inter_token_latency"):
            count, total = (router.value(f"sps2_{name}_seconds_{part}") for part in ("count", "sum"))
            figures.append(f"{name} {count:g} times, {total / count:.3f} s on average")
        figures.append(f"queue up to {seen.peak('sps2_waiting_tokens', 'router'):g} tokens")
        for pool_name in ("prefill", "decode"):
            use = seen.peak("sps2_kv_cache_usage_ratio", pool_name)
            assert use > 0, pool_name
            exposed = seen.peak("sps2_exposed_communication_seconds_total", pool_name)
            figures.append(f"{pool_name}: KV use up to {use:.1%}, exposed communication {exposed:.2f} s")


def one_of_many(client: Client, index: int) -> None:
    """A request that ends in one of several ways."""
    name = f"{CANARY}-{index}"
    try:
        model = "" if index % 10 else name  # every tenth asks for a model that is not here
        client.generate(name, max_tokens=1 + index % 3, ignore_eos=True, request_id=name, model=model)
    except SPS2Error:
        assert not index % 10, name


def test_series_are_bounded(must_show: MustShow, running: LocalDeployment) -> None:
    with must_show("3 metrics: series bounded") as figures, running.client() as client:
        for index in range(AT_ONCE):
            one_of_many(client, index)
        before = {name: one.series for name, one in scrapes(running).items()}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one_of_many, repeat(client), range(AT_ONCE, AT_ONCE + NUM_REQUESTS)))
        after = scrapes(running)
        for name, one in after.items():
            # A method of the directory may fail for the first time; what it may say is fixed all the same.
            new = {series for series in one.series - before[name] if "rpc_errors" not in series[0]}
            assert not new, (name, new)
            assert CANARY not in one.text, name
        figures.append(
            f"{NUM_REQUESTS} requests of as many ids, {AT_ONCE} at once, every tenth refused: no series more"
        )
        figures.append(", ".join(f"{name} {len(one.series)}" for name, one in after.items()))
