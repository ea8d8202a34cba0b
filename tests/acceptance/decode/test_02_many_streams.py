"""Must show 2: 64 requests of 16 to 16,000 tokens at once; each stream is that of its run alone, no block is astray."""

import threading

import pytest

from sps2_client import Client
from support.deployment import DEMO_MODEL, deployment
from support.must_show import MustShow
from support.streams import (
    ask,
    ask_together,
    check_same,
    epochs,
    mixed_requests,
    most_at_once,
    wait_for_free_kv,
)

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3_000)]

NUM_REQUESTS = 64
SHORTEST, LONGEST = 16, 16_000
KV_TOKENS = 131_072
MAX_CONTROL_SHARE = 0.05


def lengths() -> list[int]:
    """Evenly spread in their logarithm, long and short by turns."""
    ratio = (LONGEST / SHORTEST) ** (1 / (NUM_REQUESTS - 1))
    ascending = [round(SHORTEST * ratio**index) for index in range(NUM_REQUESTS)]
    return [length for pair in zip(ascending[::2], ascending[::-2], strict=True) for length in pair]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_64_streams_of_mixed_length(must_show: MustShow, num_ranks: int) -> None:
    requests = mixed_requests(lengths(), least_tokens=32)
    arguments = ["--debug-invariants", "--kv-tokens", str(KV_TOKENS), "--threads", "1"]
    with (
        must_show(
            f"2 {NUM_REQUESTS} streams of {SHORTEST} to {LONGEST:,} tokens, decode 1x{num_ranks}"
        ) as figures,
        deployment(decode=f"1x{num_ranks}", arguments=arguments) as running,
        running.client() as client,
    ):
        in_epochs = epochs(client)
        alone = [ask(client, one) for one in requests]
        with WatchedControl(client) as control:
            together = ask_together(client, requests)
        tally = check_same(DEMO_MODEL, requests, alone, together)
        figures += [str(tally), f"up to {most_at_once(together)} decoding at once"]
        tally.check()
        wait_for_free_kv(client)
        assert epochs(client) == in_epochs, "a rank's KV blocks were not as they must be: see its log"
        figures.append("blocks as the leader counts them at every step, 0 used afterwards")
        figures.append(f"control {control.most:.1%} of a step at most")
        assert 0 < control.most < MAX_CONTROL_SHARE


class WatchedControl:
    """The largest share of a step that control takes while the block runs, as `sps2 status` shows it."""

    def __init__(self, client: Client) -> None:
        self.most = 0.0
        self._client = client
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "WatchedControl":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self.most = max(self.most, *(one.control_share for one in self._client.cluster_state().workers))
