"""Faults in a local deployment: what is killed or stopped, what its clients see, and what is left behind.

The end-to-end tests and the acceptance suite run the same functions; these assert what holds in every run
and return the times for the caller to judge or to print.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from sps2_client import Client, ClusterState, SPS2Error, Stream, TextDelta, Timeouts, TotalTimeout
from support.checkpoints import make_tiny_checkpoint
from support.deployment import ROOT, LocalDeployment, deployment, engine_pid
from support.process import ManagedProcess
from support.waiting import wait_until

# Children are started while gRPC runs in this process; its fork handlers would run between fork and exec.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

NUM_BYTES = 250
PROMPT = [(7 * i * i + i) % NUM_BYTES for i in range(600)]
"""Long enough to be spread over both decode ranks."""
LONG_PROMPT = [(5 * i * i + 3 * i) % NUM_BYTES for i in range(24_000)]
"""Takes seconds to prefill, and about one for each layer."""
NUM_LAYERS = 8
ENDLESS = 6000
"""Output tokens that nobody waits for."""
SEEN_BEFORE = 5
"""Tokens that a client has when the fault comes."""
COMPARED = 300
"""Output tokens that are compared of a stream that a fault ends."""
SHORT = 24
"""Output tokens of a request that only has to be right."""
SUPERVISED = 5.0 + 0.5
"""Seconds after which a supervisor kills an engine that is silent, looked at twice a second."""
PATIENT = Timeouts(total=90.0, between_tokens=30.0)

Part: TypeAlias = Literal["engine", "supervisor", "both", "process"]


@dataclass(frozen=True)
class Victim:
    """What a fault hits: a rank's engine or supervisor or both, or one of the other processes."""

    name: str
    """As `sps2 up` calls it: router, redis, directory, decode-0/1."""
    part: Part = "process"

    def __str__(self) -> str:
        return self.name if self.part == "process" else f"{self.name} {self.part}"


DECODE_VICTIMS = tuple(
    Victim(name, part) for name in ("decode-0/0", "decode-0/1") for part in ("engine", "supervisor", "both")
)
PREFILL_VICTIMS = tuple(
    Victim(name, part) for name in ("prefill-0/0", "prefill-0/1") for part in ("engine", "supervisor")
)
STORE_VICTIMS = (Victim("directory"), Victim("redis"))


@dataclass(frozen=True)
class Interruption:
    """How a stream ended that a fault cut."""

    error: SPS2Error
    detected_s: float
    """From the fault to the error at the client."""


@dataclass
class Target:
    """A deployment under test and the processes that it has now."""

    deployment: LocalDeployment
    _expected: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Tokens by length of the prompt."""

    @property
    def log(self) -> str:
        """The end of what the deployment said, for failures."""
        return self.deployment.process.tail(120)

    def client(self) -> Client:
        """A fresh client: none of its connections has a history."""
        return self.deployment.client()

    # --- processes --------------------------------------------------------------------------------------

    @property
    def pids(self) -> dict[str, int]:
        """Process id of each child of `sps2 up` now, restarted ones included."""
        pids = dict(self.deployment.pids)
        for line in self.deployment.process.lines:
            if line.startswith('{"event": "restarted"'):
                event = json.loads(line)
                pids[event["name"]] = event["pid"]
        return pids

    @cached_property
    def ranks(self) -> list[str]:
        """Names of the ranks."""
        return [name for name in self.deployment.pids if "/" in name]

    @cached_property
    def directory(self) -> str:
        """HOST:PORT of the KV directory, which its restarts keep."""
        arguments = Path(f"/proc/{self.pids[self.ranks[0]]}/cmdline").read_text().split("\0")
        return arguments[arguments.index("--directory") + 1]

    def pids_of(self, victim: Victim) -> list[int]:
        """The processes that a fault is to hit."""
        pid = self.pids[victim.name]
        match victim.part:
            case "engine":
                return [engine_pid(pid)]
            case "both":
                return [engine_pid(pid), pid]
            case _:
                return [pid]

    def send(self, victim: Victim, signum: signal.Signals = signal.SIGKILL) -> float:
        """Sends the signal to all of the victim; when that was, on time.monotonic()."""
        pids = self.pids_of(victim)
        at = time.monotonic()
        for pid in pids:
            os.kill(pid, signum)
        return at

    def wait_for_engines(self, timeout: float = 15.0) -> None:
        """Returns when every rank has an engine process again, whatever state it is in."""
        self._wait(lambda: self._complete(*self.survey()), timeout, "engines are missing")

    def survey(self) -> tuple[set[int], set[int]]:
        """Live processes of the deployment, and those that it should have; equal when all is well."""
        pids = set(self.pids.values())
        engines = set()
        for name in self.ranks:
            with suppress(AssertionError):  # between two lives
                engines.add(engine_pid(self.pids[name]))
        return members(self.deployment.process.pid), {self.deployment.process.pid, *pids, *engines}

    # --- requests ---------------------------------------------------------------------------------------

    def expected(self, num_tokens: int, prompt: Sequence[int] = PROMPT) -> tuple[int, ...]:
        """The first tokens of an undisturbed run; asked for before the fault."""
        known = self._expected.get(len(prompt), ())
        if len(known) < num_tokens:
            with self.streaming(prompt, num_tokens) as stream:
                known = self._expected[len(prompt)] = stream.final().token_ids
        return known[:num_tokens]

    @contextmanager
    def streaming(
        self, prompt: Sequence[int] = PROMPT, num_tokens: int = ENDLESS, *, timeout: Timeouts = PATIENT
    ) -> Iterator[Stream]:
        """A stream by a client of its own; failures show the deployment's log."""
        with (
            self.client() as client,
            client.stream(
                token_ids=prompt, max_tokens=num_tokens, ignore_eos=True, prefix_reuse="off", timeout=timeout
            ) as stream,
        ):
            yield stream

    def state(self) -> ClusterState:
        """The cluster as the router last heard of it."""
        with self.client() as client:
            return client.cluster_state(timeout=5)

    def used(self) -> dict[str, int]:
        """KV blocks in use on each rank, as last reported."""
        return {worker.worker_id: worker.kv_blocks_used for worker in self.state().workers}

    def check_live(self) -> None:
        """The request that the fault is to hit is still being served; else the test would show nothing."""
        assert self.state().num_requests_live == 1, "the stream is too short for the fault"

    def wait_for_blocks(self, *names: str, timeout: float = 15.0) -> None:
        """Returns when each of these ranks reports blocks in use."""
        self._wait(lambda: all(self.used().get(name) for name in names), timeout, f"no blocks on {names}")

    @contextmanager
    def regrouped(self, victim: Victim, timeout: float) -> Iterator[None]:
        """A rank dies meanwhile: its group stands again after it, in a later epoch; all others keep their engines.

        An engine that lives on has its weights still.
        """
        others = {name: engine_pid(self.pids[name]) for name in self.ranks if name != victim.name}
        epoch = self._epoch_of(victim)
        yield
        self.settled(timeout)
        assert {name: engine_pid(self.pids[name]) for name in others} == others, self.log
        assert self._epoch_of(victim) > epoch, self.log

    def _epoch_of(self, victim: Victim) -> int:
        (epoch,) = {one.epoch for one in self.state().workers if one.group == victim.name.partition("/")[0]}
        return epoch

    def freed(self, since: float, timeout: float) -> float:
        """Seconds from `since` until every rank reports no block in use."""
        left = since + timeout - time.monotonic()

        def free() -> bool:
            used = self.used()
            return set(used) >= set(self.ranks) and not any(used.values())

        self._wait(free, left, f"blocks still used {timeout:g} s later")
        return time.monotonic() - since

    def _wait(self, predicate: Callable[[], bool], timeout: float, what: str) -> None:
        try:
            wait_until(predicate, timeout=timeout, interval=0.05)
        except TimeoutError:
            raise AssertionError(f"{what}: {self.state()}\n{self.log}") from None

    # --- what must hold ---------------------------------------------------------------------------------

    def interrupt_router(self) -> Interruption:
        """The one death that a stream does not survive: a typed error, and no wrong token before it."""
        expected = self.expected(COMPARED)
        with self.streaming() as stream:
            read_tokens(stream, SEEN_BEFORE)
            since = self.send(Victim("router"))
            error = self.error_of(stream)
            detected_s = time.monotonic() - since
        given = error.received.token_ids
        assert given == stream.token_ids
        assert len(given) >= SEEN_BEFORE
        assert given[:COMPARED] == expected[: len(given)], f"wrong tokens before the fault\n{self.log}"
        assert self.names_router(error), f"{error} {error.metadata} does not name the router\n{self.log}"
        return Interruption(error, detected_s)

    def error_of(self, stream: Stream) -> SPS2Error:
        """Reads to the end, which must be an error."""
        try:
            for _ in stream:
                pass
        except SPS2Error as error:
            return error
        raise AssertionError(
            f"the stream ended as if complete, with {len(stream.token_ids)} tokens\n{self.log}"
        )

    def names_router(self, error: SPS2Error) -> bool:
        """Whether the error says that the router is gone."""
        return self.deployment.address in error.message

    def carry_on(self, victim: Victim, num_tokens: int) -> float:
        """A fault that must not touch a stream: its tokens are right. Seconds from the fault to its end."""
        expected = self.expected(num_tokens)
        with self.streaming(num_tokens=num_tokens) as stream:
            read_tokens(stream, SEEN_BEFORE)
            since = self.send(victim)
            self.check_live()
            try:
                generation = stream.final()
            except SPS2Error as error:
                raise AssertionError(f"{victim} ended the stream: {error!r}\n{self.log}") from error
        assert generation.token_ids == expected, f"wrong tokens after {victim} died\n{self.log}"
        return time.monotonic() - since

    def survive(self, victim: Victim, num_tokens: int, signum: signal.Signals = signal.SIGKILL) -> float:
        """A fault amid a stream that goes on where it stopped: its tokens are right. Its longest pause, in seconds."""
        expected = self.expected(num_tokens)
        with self.streaming(num_tokens=num_tokens) as stream:
            read_tokens(stream, SEEN_BEFORE)
            self.wait_for_blocks("decode-0/0", "decode-0/1")  # the request is spread over both
            self.send(victim, signum)
            self.check_live()
            longest, before = 0.0, time.monotonic()
            try:
                for _ in stream:
                    longest, before = max(longest, time.monotonic() - before), time.monotonic()
            except SPS2Error as error:
                raise AssertionError(f"{victim} ended the stream: {error!r}\n{self.log}") from error
            generation = stream.final()
        assert generation.token_ids == expected, f"wrong tokens after {victim} died\n{self.log}"
        return longest

    def lose_prefill(self, victim: Victim) -> tuple[str, float]:
        """A fault while a long prompt is computed: retried unseen, or an error that names the group.

        Returns:
            How the request ended, and the seconds from the fault to that.
        """
        expected = self.expected(SHORT, LONG_PROMPT)
        with self.streaming(LONG_PROMPT, SHORT) as stream:
            self.wait_for_blocks("prefill-0/0", "prefill-0/1", "decode-0/0", "decode-0/1")
            since = self.send(victim)
            try:
                tokens = stream.final().token_ids
            except SPS2Error as error:
                component = error.metadata.get("component", "")
                ended = f"{type(error).__name__} {error.reason} names {component}"
                named = component in (victim.name, victim.name.partition("/")[0])
                tokens = stream.token_ids
            else:
                ended, named = "retried unseen", True
            took = time.monotonic() - since
        assert named, f"{ended} instead of {victim}\n{self.log}"
        assert tokens == (expected if ended == "retried unseen" else ()), self.log
        return ended, took

    def serves_again(self, since: float, timeout: float) -> float:
        """Seconds from `since` until a new request is answered; the tokens must be right."""
        expected, last = self.expected(SHORT), "it was not tried"

        def served() -> bool:
            nonlocal last
            try:
                with self.client() as client:
                    left = max(0.1, since + timeout - time.monotonic())
                    tokens = client.generate(
                        token_ids=PROMPT, max_tokens=SHORT, ignore_eos=True, timeout=left
                    ).token_ids
            except SPS2Error as error:
                last = str(error)
                return False
            assert tokens == expected, f"wrong tokens after recovery\n{self.log}"
            return True

        try:
            wait_until(served, timeout=since + timeout - time.monotonic(), interval=0.2)
        except TimeoutError:
            raise AssertionError(f"not serving {timeout:g} s after the fault: {last}\n{self.log}") from None
        return time.monotonic() - since

    def settled(self, timeout: float = 20.0) -> None:
        """All ranks ready, no request live, no block used, and just the processes that there should be."""

        def quiet() -> bool:
            try:
                state = self.state()
            except SPS2Error:
                return False
            workers = {worker.worker_id: worker for worker in state.workers}
            return (
                set(workers) == set(self.ranks)
                and all(worker.state == "ready" for worker in state.workers)
                and not any(worker.kv_blocks_used for worker in state.workers)
                and state.num_requests_live == 0
            )

        try:
            wait_until(quiet, timeout=timeout, interval=0.1)
        except TimeoutError:
            raise AssertionError(f"not quiet after {timeout:g} s: {self.state()}\n{self.log}") from None
        try:
            wait_until(lambda: self._complete(*self.survey()), timeout=10.0, interval=0.1)
        except TimeoutError:
            here, wanted = self.survey()
            extra = {pid: command_of(pid) for pid in here - wanted}
            raise AssertionError(f"orphans {extra}, missing {wanted - here}\n{self.log}") from None

    def _complete(self, here: set[int], wanted: set[int]) -> bool:
        return here == wanted and len(wanted) == 1 + len(self.deployment.pids) + len(self.ranks)

    def recover(self, since: float, timeout: float) -> float:
        """`serves_again`, then `settled`; the seconds of the first."""
        recovered_s = self.serves_again(since, timeout)
        self.settled()
        return recovered_s


def make_model(folder: Path) -> Path:
    """A random model that is quick to decode and, for a long prompt, slow to prefill."""
    return make_tiny_checkpoint(folder, "llama", num_hidden_layers=NUM_LAYERS)


@contextmanager
def target(
    model: Path, ranks: str = "1x2", cwd: Path | None = None, arguments: Sequence[str] = ()
) -> Iterator[Target]:
    """A deployment of as many prefill as decode ranks; its log is printed when the block fails."""
    # One thread for each rank, so that prefill takes its time on large machines too.
    with deployment(model, ranks, ranks, ["--threads", "1", *arguments], cwd=cwd) as one:
        yield Target(one)


def read_tokens(stream: Stream, count: int) -> None:
    """Reads until `count` tokens have come."""
    while len(stream.token_ids) < count:
        assert isinstance(next(stream), TextDelta), "the stream ended too early"


# --- clients that leave ---------------------------------------------------------------------------------

Leaving: TypeAlias = Literal["cancel", "deadline", "killed"]
Phase: TypeAlias = Literal["prefill", "decode"]

CLIENT = """
import sys
from sps2_client import Client
address, prompt, count = sys.argv[1:]
with Client(address) as client:
    prompt = [int(token) for token in bytes.fromhex(prompt)]
    with client.stream(token_ids=prompt, max_tokens=int(count), ignore_eos=True) as stream:
        print("asked", flush=True)
        for event in stream:
            print(len(stream.token_ids), flush=True)
"""


def leave(one: Target, how: Leaving, phase: Phase, timeout: float) -> float:
    """A client leaves in the middle of prefill or decode: seconds until every block on both sides is free."""
    holders = ["decode-0/0", "decode-0/1", *(["prefill-0/0", "prefill-0/1"] if phase == "prefill" else [])]
    match how:
        case "killed":
            since = _leave_killed(one, phase, holders)
        case "cancel":
            since = _leave_early(one, phase, holders)
        case "deadline":
            since = _leave_late(one, phase, holders)
    return one.freed(since, timeout)


def _leave_killed(one: Target, phase: Phase, holders: Sequence[str]) -> float:
    prompt = bytes(LONG_PROMPT if phase == "prefill" else PROMPT).hex()
    command = [sys.executable, "-P", "-c", CLIENT, one.deployment.address, prompt, str(ENDLESS)]
    with ManagedProcess(command, name="client", stop_timeout=0.0) as client:
        client.wait_for_line("asked" if phase == "prefill" else rf"^{SEEN_BEFORE}$", 30.0)
        one.wait_for_blocks(*holders)
        assert client.running, client.tail()
        assert phase == "decode" or client.lines[-1] == "asked", (
            "prefill was over before the client was killed"
        )
        since = time.monotonic()
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
    return since


def _leave_early(one: Target, phase: Phase, holders: Sequence[str]) -> float:
    with one.streaming(LONG_PROMPT if phase == "prefill" else PROMPT) as stream:
        if phase == "decode":
            read_tokens(stream, SEEN_BEFORE)
        one.wait_for_blocks(*holders)
        since = time.monotonic()
        stream.close()
    return since


def _leave_late(one: Target, phase: Phase, holders: Sequence[str]) -> float:
    total = 3.5
    began = time.monotonic()
    with one.streaming(
        LONG_PROMPT if phase == "prefill" else PROMPT, timeout=Timeouts(total=total)
    ) as stream:
        if phase == "decode":
            read_tokens(stream, SEEN_BEFORE)
        one.wait_for_blocks(*holders, timeout=total)
        error = one.error_of(stream)
    took = time.monotonic() - began
    assert isinstance(error, TotalTimeout), repr(error)
    assert total - 0.5 <= took <= total + 1.0, f"a deadline of {total} s took {took:.2f} s"
    assert bool(stream.token_ids) == (phase == "decode"), "the deadline came in the wrong phase"
    return began + total


# --- what is left behind --------------------------------------------------------------------------------


def members(session: int) -> set[int]:
    """Live processes of a session: `sps2 up` leads one, and none of its children leaves it."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] not in "ZX":
                    found.add(int(entry.name))
    return found


def command_of(pid: int) -> str:
    """A process's command line; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


SHARED_FOLDERS = (Path("/tmp"), Path("/dev/shm"))  # noqa: S108 - to look at, not to write to


@dataclass
class Traces:
    """What a deployment might leave on the machine, noted while it lives and looked for after its end."""

    session: int
    address: str
    pids: set[int]
    before: set[Path]
    """What was in the shared folders before it started."""
    cwd: Path
    held: set[Path] = field(default_factory=set)
    """Files in the shared folders that its processes had open or mapped."""

    @classmethod
    def of(cls, one: Target, before: set[Path], cwd: Path) -> "Traces":
        """Notes everything; while a stream runs, so that transfers and collectives are there."""
        session = one.deployment.process.pid
        pids = members(session)
        held = {path for pid in pids for path in files_of(pid)}
        return cls(session, one.deployment.address, pids, before, cwd, held)

    def gone(self, timeout: float) -> float:
        """Waits until no process is left, then checks ports and files; seconds until they were gone."""
        began = time.monotonic()
        try:
            wait_until(lambda: not members(self.session) and not self._alive(), timeout=timeout)
        except TimeoutError:
            left = {pid: command_of(pid) for pid in members(self.session) | self._alive()}
            raise AssertionError(f"still there after {timeout:g} s: {left}") from None
        took = time.monotonic() - began
        # The kernel takes a process's ports and memory back a moment after it is a zombie.
        for what, look in (
            ("port still taken", lambda: [] if port_free(self.address) else [self.address]),
            ("files left behind", lambda: [path for path in self.held if path.exists()]),
            ("shared memory left by", lambda: sorted(segment_owners() & self.pids)),
            ("shared memory files that nobody holds", lambda: sorted(self._forgotten())),
            ("files in the working directory", lambda: list(self.cwd.iterdir())),
        ):
            _wait_for_none(look, what)
        return took

    def _alive(self) -> set[int]:
        # Also those that might have left the session; a reused id would have to be one of ours by chance.
        return {pid for pid in self.pids if Path(f"/proc/{pid}").exists() and "sps2" in command_of(pid)}

    def _forgotten(self) -> set[Path]:
        """New shared memory files that nobody has open; others on the machine hold theirs."""
        new = {path for path in shared_files() - self.before if path.parent == SHARED_FOLDERS[1]}
        held = {path for pid in all_pids() for path in files_of(pid)} if new else set()
        return {path for path in new - held if path.exists()}


def _wait_for_none(look: Callable[[], Sequence[object]], what: str, timeout: float = 5.0) -> None:
    try:
        wait_until(lambda: not look(), timeout=timeout, interval=0.1)
    except TimeoutError:
        raise AssertionError(f"{what}: {look()}") from None


def shared_files() -> set[Path]:
    """What lies in /tmp and /dev/shm."""
    return {path for folder in SHARED_FOLDERS for path in folder.iterdir()}


def all_pids() -> list[int]:
    """Every process that can be seen."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def files_of(pid: int) -> set[Path]:
    """Files in the shared folders that a process has open or mapped; none when it has ended."""
    found = set()
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.add(str(link.readlink()))
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            found.add(line.partition("/")[1] + line.partition("/")[2])
    return {
        Path(name)
        for name in found
        if name.startswith(tuple(f"{folder}/" for folder in SHARED_FOLDERS))
        and not name.endswith(" (deleted)")
        and not name.startswith((f"{ROOT}/", f"{sys.prefix}/"))  # a checkout may lie in /tmp itself
    }


def segment_owners() -> set[int]:
    """Process ids that made the System V shared memory segments there are."""
    segments = Path("/proc/sysvipc/shm").read_text(encoding="ascii").splitlines()[1:]
    return {int(line.split()[4]) for line in segments}


def port_free(address: str) -> bool:
    """Whether a server could listen there."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return False
    return True
