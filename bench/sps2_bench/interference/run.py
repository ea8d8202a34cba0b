"""Runs every case, round after round: what is compared takes turns on the same cores."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sps2_bench.deployment import deployment
from sps2_bench.interference.load import Load
from sps2_bench.interference.served import Decodes, answer_prompt, run_window
from sps2_bench.interference.window import CONTROL, PREFILL, QUIET, Case, Window
from sps2_bench.processes import Worker
from sps2_client import AsyncClient

WINDOW_TIMEOUT_S = 1_800.0
START_TIMEOUT_S = 60.0
SPS2, SARATHI = "sps2", "sarathi"

Progress = Callable[[int, Case, Window], None]
"""Told the round and what it gave for a case."""


@dataclass(frozen=True)
class Setup:
    """What the programs run on."""

    folder: Path
    """Checkpoint with a tokenizer."""
    vocab_size: int
    prefill_cpus: Sequence[int]
    """Also the control's, and those of all that belongs to no pool."""
    decode_cpus: Sequence[int]
    control_mib: int
    """Memory that the control reads."""


def list_cases(chunks: Sequence[int]) -> list[Case]:
    """In the order of the first round."""
    apart = [Case(SPS2, 0, what) for what in (PREFILL, QUIET, CONTROL)]
    return [*apart, *(Case(SARATHI, chunk, what) for chunk in chunks for what in (PREFILL, QUIET))]


def run_rounds(
    setup: Setup, load: Load, cases: Sequence[Case], num_rounds: int, progress: Progress
) -> list[dict[Case, Window]]:
    """Every case once in each round, in another order each time.

    Raises:
        WorkerError: a process ended or fell silent.
        SPS2Error: a request failed.
    """
    with ExitStack() as stack:
        address = stack.enter_context(
            deployment(setup.folder, _up_arguments(setup, load), setup.prefill_cpus)
        )
        streamer = Worker("sps2_bench.interference.streamer", {"mib": setup.control_mib}, setup.prefill_cpus)
        sarathi = Worker(
            "sps2_bench.interference.sarathi_peer",
            {"folder": str(setup.folder), "load": asdict(load)},
            [*setup.prefill_cpus, *setup.decode_cpus],
        )
        programs = _Programs(
            setup, load, address, stack.enter_context(streamer), stack.enter_context(sarathi)
        )
        programs.warm_up(cases)
        rounds: list[dict[Case, Window]] = []
        for number in range(num_rounds):
            rounds.append({})
            turn = number % len(cases)
            for case in [*cases[turn:], *cases[:turn]]:
                rounds[-1][case] = programs.run(case)
                progress(number, case, rounds[-1][case])
        return rounds


def _up_arguments(setup: Setup, load: Load) -> list[str]:
    flags = {
        "--prefill": "1x1",
        "--decode": "1x1",
        "--prefill-cpus": ",".join(map(str, setup.prefill_cpus)),
        "--decode-cpus": ",".join(map(str, setup.decode_cpus)),
        "--device": "cpu",
        "--dtype": "fp32",
        "--kv-tokens": str(load.kv_tokens),
    }
    return [part for pair in flags.items() for part in pair]


@dataclass
class _Programs:
    """The programs under load; one runs while the others idle."""

    setup: Setup
    load: Load
    address: str
    streamer: Worker
    sarathi: Worker
    prompts: list[list[int]] = field(init=False)
    long_prompt: list[int] = field(init=False)
    num_tokens: int = 1
    """Tokens of a decode in the last span of a prefill on the deployment: as long last the spans without one."""

    def __post_init__(self) -> None:
        vocab_size = self.setup.vocab_size
        self.prompts = [self.load.context_prompt(row, vocab_size) for row in range(self.load.batch)]
        self.long_prompt = self.load.long_prompt(vocab_size)

    def warm_up(self, cases: Sequence[Case]) -> None:
        """Everything once: first runs pay for what initialises itself lazily."""
        self._switch(on=True)
        self._switch(on=False)
        for case in cases:
            if case.program == SPS2 or case.disturbance == QUIET:
                self.run(case)

    def run(self, case: Case) -> Window:
        """One window of a case."""
        if case.program == SARATHI:
            num_tokens = 0 if case.disturbance == PREFILL else self.num_tokens
            self.sarathi.ask({"chunk": case.chunk, "num_tokens": num_tokens})
            return Window(**self.sarathi.answer(WINDOW_TIMEOUT_S))
        disturb = {QUIET: self._nothing, CONTROL: self._stream, PREFILL: self._prefill}[case.disturbance]
        window = asyncio.run(run_window(self.address, self.prompts, disturb))
        if case.disturbance == PREFILL:
            self.num_tokens = window.num_tokens
        return window

    async def _nothing(self, _client: AsyncClient, decodes: Decodes) -> None:
        await decodes.advance(self.num_tokens)

    async def _stream(self, _client: AsyncClient, decodes: Decodes) -> None:
        self._switch(on=True)
        try:
            await decodes.advance(self.num_tokens)
        finally:
            self._switch(on=False)

    def _switch(self, *, on: bool) -> None:
        """Starts or ends the control, at once."""
        self.streamer.ask({"on": on})
        self.streamer.answer(START_TIMEOUT_S)

    async def _prefill(self, client: AsyncClient, _decodes: Decodes) -> float:
        return await answer_prompt(client, self.long_prompt, self.load.profile)
