"""Requests whose prompts begin alike, one coming while the other decodes: held against the same ones alone."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import Event, Thread

from sps2_client import Client, Generation, Stream
from sps2_layout.profiles import EXACT, Ladder
from support.csa_oracle import csa_tokens, long_prompts
from support.deployment import DEMO_MODEL, LocalDeployment
from support.faults import SEEN_BEFORE, Target, Victim, read_tokens
from support.identity import GENERATE_TIMEOUT_S, Prompt, Tally, book_ids
from support.oracle import compare
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
    """Asks a deployment for requests that begin alike."""

    running: LocalDeployment
    client: Client
    ladder: Ladder
    """Attention of the requests: that of the deployment, or EXACT."""
    tally: Tally = field(default_factory=Tally)
    """Tokens compared."""
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

    def check(
        self, first: Asked, others: Sequence[Asked], num_shared: int, *, abort_first: bool = False
    ) -> str:
        """Asks for the others while the first decodes, which then ends or is aborted; the others go on.

        Args:
            first: ends before the others do.
            others: those that may find their prompts' beginning in the group.
            num_shared: tokens that each of them must find there: their KV is not sent.
            abort_first: the first is given up once all decode.

        Returns:
            The blocks that were used, alone and together.

        Raises:
            AssertionError: tokens differ from those of the requests alone, or blocks are left behind.
        """
        in_epochs = epochs(self.client)
        used_alone = [self.ask_alone(one)[1] for one in (first, *others)]
        with self._blocks_seen() as blocks, ExitStack() as open_streams:
            earlier = open_streams.enter_context(self._stream(first))
            read_tokens(earlier, SEEN_BEFORE)
            later = [open_streams.enter_context(self._stream(one)) for one in others]
            for stream in later:
                read_tokens(stream, SEEN_BEFORE)
            if abort_first:
                earlier.close()
            else:
                self._compare(first, earlier.final())
            for asked, stream in zip(others, later, strict=True):
                answer = stream.final()
                self._compare(asked, answer)
                self._check_sent(asked, answer, num_shared)
        most = max(blocks, default=0)
        allowed = sum(_most_blocks(one) for one in (first, *others))
        assert 0 < most <= allowed - len(others) * num_shared // BLOCK_TOKENS
        wait_for_free_kv(self.client)
        assert epochs(self.client) == in_epochs, "a rank's KV blocks were not as they must be: see its log"
        return f"{' + '.join(map(str, used_alone))} blocks used alone, {most} together"

    def survive(self, first: Asked, second: Asked, victim: Victim) -> None:
        """A decode rank dies while it holds blocks of both; both streams go on where they stopped.

        Raises:
            AssertionError: tokens differ from those of the requests alone, or nothing was shared.
        """
        for one in (first, second):
            self.ask_alone(one)
        before = num_sharing(self.running)
        with ExitStack() as open_streams:
            earlier = open_streams.enter_context(self._stream(first))
            read_tokens(earlier, SEEN_BEFORE)
            later = open_streams.enter_context(self._stream(second))
            read_tokens(later, SEEN_BEFORE)
            Target(self.running).send(victim)
            assert self.client.cluster_state().num_requests_live == 2, "a stream is too short for the fault"
            self._compare(second, later.final())
            self._compare(first, earlier.final())
        assert num_sharing(self.running) > before

    def _compare(self, asked: Asked, answer: Generation) -> None:
        """A greedy stream may differ at a near-tie, which the batch that it is in may round the other way."""
        for one, other in zip(self.ask_alone(asked)[0].choices, answer.choices, strict=True):
            gaps: Sequence[float] = [float("inf")] * asked.num_tokens
            if one.token_ids != other.token_ids and asked.seed is None:
                gaps = csa_tokens(DEMO_MODEL, self.ladder, asked.prompt, asked.num_tokens)[1]
            self.tally.add(compare(other.token_ids, one.token_ids, gaps))

    def _check_sent(self, asked: Asked, answer: Generation, num_shared: int) -> None:
        """The KV of what is shared is not sent."""
        sent, sent_alone = (one.usage.bytes_moved.kv_transfer for one in (answer, self.ask_alone(asked)[0]))
        num_tokens = len(asked.prompt)
        assert sent * num_tokens == sent_alone * (num_tokens - num_shared), (
            f"{sent} of {sent_alone} bytes sent"
        )

    def _stream(self, asked: Asked) -> Stream:
        options = asked.options
        options["attention_profile"] = "exact" if self.ladder is EXACT else ""
        return self.client.stream(timeout=GENERATE_TIMEOUT_S, **options)

    @contextmanager
    def _blocks_seen(self) -> Iterator[list[int]]:
        """Blocks used on all decode ranks, every now and then, as their heartbeats tell.

        Tensor ranks hold their heads' part of the same blocks, which are counted once.
        """
        seen: list[int] = []
        over = Event()

        def look() -> None:
            with self.running.client() as client:
                while not over.wait(SAMPLE_S):
                    workers = client.cluster_state().workers
                    decode = [one for one in workers if one.role == "decode"]
                    seen.append(sum(one.kv_blocks_used for one in decode if one.rank % one.tensor_ranks == 0))

        thread = Thread(target=look)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join()


@cache
def _most_blocks(asked: Asked) -> int:
    """Blocks of a request at its end; a choice that ends early may have one more than its tokens need."""
    num_shared = len(asked.prompt) // BLOCK_TOKENS
    num_own = len(asked.prompt) % BLOCK_TOKENS + asked.num_tokens
    return num_shared + asked.num_choices * (-(-num_own // BLOCK_TOKENS) + 1)


def num_sharing(running: LocalDeployment) -> int:
    """Attempts so far that took blocks over, by their leaders' logs."""
    return sum("shares" in line and "num_tokens" in line for line in running.process.lines)
