"""What the endpoints of a deployment say while it answers, and what they must have said when it is done."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from support.metrics import Scrape, scrape
from support.streams import Answered
from support.waiting import wait_until

LOOK_INTERVAL_S = 0.25
END_TIMEOUT_S = 10.0


@dataclass
class Seen:
    """All scrapes of a load."""

    num_scrapes: int = 0
    last: dict[str, Scrape] = field(default_factory=dict)
    """By process; after the load."""
    peaks: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    """The largest sum over series, by process and name."""

    def take(self, addresses: Mapping[str, str]) -> None:
        """Scrapes every process once."""
        for name, address in addresses.items():
            self.last[name] = one = scrape(address)
            self.num_scrapes += 1
            for series in {key[0] for key in one.series}:
                self.peaks[name, series] = max(self.peaks[name, series], one.total(series))

    def peak(self, series: str, pool: str) -> float:
        """The largest over the processes of a pool, or over one."""
        return max(
            value for (name, found), value in self.peaks.items() if found == series and name.startswith(pool)
        )


def watch(addresses: Mapping[str, str], load: "Future[list[Answered]]") -> Seen:
    """Scrapes again and again until the load is over, and once more when its last call has ended.

    A client has its answer a moment before the router is through with the call.
    """
    seen = Seen()
    while not load.done():
        seen.take(addresses)
        wait([load], timeout=LOOK_INTERVAL_S)
    wait_until(lambda: not scrape(addresses["router"]).value("sps2_num_requests_running"), END_TIMEOUT_S)
    seen.take(addresses)
    return seen


def check_seen(seen: Seen, before: Scrape, answers: Sequence[Answered]) -> None:
    """Counters have counted these answers exactly, states have been seen as they were.

    Args:
        seen: of a load of more prompts than a prefill group takes at once.
        before: of the router, before it.
        answers: all that the load has made.
    """
    router, num_answers = seen.last["router"], len(answers)

    def grown(name: str) -> float:
        return router.total(f"sps2_{name}") - before.total(f"sps2_{name}")

    num_tokens = sum(len(one.token_ids) for one in answers)
    assert grown("requests_total") == num_answers
    assert grown("generation_tokens_total") == num_tokens
    assert grown("prompt_tokens_total") == sum(one.usage.prompt_tokens for one in answers)
    assert grown("time_to_first_token_seconds_count") == num_answers
    assert grown("inter_token_latency_seconds_count") == num_tokens - num_answers
    for phase in ("queue", "prefill", "transfer", "decode"):
        assert grown(f"request_{phase}_time_seconds_count") == num_answers
        assert grown(f"request_{phase}_time_seconds_sum") > 0
    for name in ("num_requests_waiting", "waiting_tokens", "num_requests_running"):
        assert seen.peak(f"sps2_{name}", "router") > 0, name
        assert router.value(f"sps2_{name}") == 0, name
    for pool in ("prefill", "decode"):
        for name in ("exposed_communication_seconds_total", "engine_steps_total", "collective_bytes_total"):
            assert seen.peak(f"sps2_{name}", pool) > 0, (pool, name)
    for name in ("prefill_queued_tokens", "prefill_tokens_total", "kv_transfer_bytes_total"):
        assert seen.peak(f"sps2_{name}", "prefill") > 0, name
    for name in ("kv_cache_usage_ratio", "step_seconds_count", "generation_tokens_total"):
        assert seen.peak(f"sps2_{name}", "decode") > 0, name
    assert seen.last["directory"].value("sps2_directory_state", state="ok") == 1
    services = {
        name: one.families["sps2_build_info"].samples[0].labels["service"] for name, one in seen.last.items()
    }
    assert all(name.startswith(service) for name, service in services.items())
