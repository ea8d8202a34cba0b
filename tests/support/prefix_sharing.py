"""Requests whose prompts begin alike, one coming while the other decodes: held against the same ones alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import Event, Thread

from sps2_client import Client, Generation, Stream
from support.csa_oracle import long_prompts
from support.deployment import LocalDeployment
from support.faults import SEEN_BEFORE, read_tokens
from support.identity import GENERATE_TIMEOUT_S, Prompt, book_ids
from support.streams import Asked, epochs, wait_for_free_kv

BLOCK_TOKENS = 64
SAMPLE_S = 0.1


def prompts_alike(num_common: int, num_others: Sequence[int]) -> list[Prompt]:
    """Prompts for the demo model: the same beginning, then different pages of its book."""
    (common,), book = long_prompts([num_common]), book_ids()
    ends = [len(book) - 100 * index for index in range(len(num_others))]
    return [common + book[end - num : end] for end, num in zip(ends, num_others, strict=True)]


@dataclass
class Sharing:
    """Asks a deployment for pairs of requests."""

    running: LocalDeployment
    client: Client
    profile: str
    """Attention of the requests."""
    alone: dict[Asked, tuple[Generation, int]] = field(default_factory=dict)
    """Each request by itself, and the most blocks that were used then."""

    def ask_alone(self, asked: Asked) -> tuple[Generation, int]:
        """A request by itself; asked for once."""
        if asked not in self.alone:
            with self._blocks_seen() as blocks, self._stream(asked) as stream:
                answer = stream.final()
            wait_for_free_kv(self.client)
            self.alone[asked] = answer, max(blocks, default=0)
        return self.alone[asked]

    def check(self, first: Asked, second: Asked, num_shared: int, *, abort_first: bool = False) -> str:
        """Asks for the second while the first decodes, which then ends or is aborted; the second goes on.

        Args:
            first: ends before the second does.
            second: the one that may find its prompt's beginning in the group.
            num_shared: tokens of it that it must find there: their KV is not sent.
            abort_first: the first is given up once both decode.

        Returns:
            The blocks that were used, alone and together.

        Raises:
            AssertionError: tokens differ from those of the requests alone, or blocks are left behind.
        """
        in_epochs = epochs(self.client)
        (one, one_used), (other, other_used) = self.ask_alone(first), self.ask_alone(second)
        with self._blocks_seen() as blocks, self._stream(first) as earlier:
            read_tokens(earlier, SEEN_BEFORE)
            with self._stream(second) as later:
                read_tokens(later, SEEN_BEFORE)
                if abort_first:
                    earlier.close()
                else:
                    assert earlier.final().token_ids == one.token_ids
                answer = later.final()
        assert answer.token_ids == other.token_ids
        sent, sent_alone = (each.usage.bytes_moved.kv_transfer for each in (answer, other))
        num_tokens = len(second.prompt)
        assert sent * num_tokens == sent_alone * (num_tokens - num_shared), (
            f"{sent} of {sent_alone} bytes sent"
        )
        most = max(blocks, default=0)
        assert most <= _most_blocks(first) + _most_blocks(second) - num_shared // BLOCK_TOKENS
        wait_for_free_kv(self.client)
        assert epochs(self.client) == in_epochs, "a rank's KV blocks were not as they must be: see its log"
        return f"{one_used} and {other_used} blocks used alone, {most} together"

    def _stream(self, asked: Asked) -> Stream:
        options = asked.options
        options["attention_profile"] = self.profile
        return self.client.stream(timeout=GENERATE_TIMEOUT_S, **options)

    @contextmanager
    def _blocks_seen(self) -> Iterator[list[int]]:
        """Blocks used on all decode ranks, every now and then, as their heartbeats tell."""
        seen: list[int] = []
        over = Event()

        def look() -> None:
            with self.running.client() as client:
                while not over.wait(SAMPLE_S):
                    workers = client.cluster_state().workers
                    seen.append(sum(one.kv_blocks_used for one in workers if one.group.startswith("decode")))

        thread = Thread(target=look)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join()


@cache
def _most_blocks(asked: Asked) -> int:
    """Blocks of a request at its end: a rank may leave its last one half empty."""
    return -(-len(asked.prompt) // BLOCK_TOKENS) + -(-asked.num_tokens // BLOCK_TOKENS) + 1


def num_sharing(running: LocalDeployment) -> int:
    """Attempts so far that took blocks over, by their leaders' logs."""
    return sum("shares" in line and "num_tokens" in line for line in running.process.lines)
