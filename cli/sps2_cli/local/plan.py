"""Which processes a local deployment has and how each is called. Pure: it starts nothing."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self, TypeAlias
from urllib.parse import urlsplit, urlunsplit

Role: TypeAlias = Literal["prefill", "decode"]
Kind: TypeAlias = Literal["redis", "directory", "router", "worker"]

ANY_PORT = "127.0.0.1:0"
DRAIN_MARGIN_S = 10.0
"""Of the patience with a process that ends: what it needs beside its drain."""
REDIS_PASSWORD_VARIABLE = "SPS2_REDIS_PASSWORD"  # noqa: S105 - its name; flags show in `ps`, so no flag
MAX_RANKS = 256


@dataclass(frozen=True)
class Pool:
    """Groups of equal size, as "GxR" on the command line."""

    groups: int
    """Number of groups."""
    ranks: int
    """Ranks in each."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """A pool from "GxR", for example "1x2".

        Raises:
            ValueError: not of that form, or out of bounds.
        """
        match = re.fullmatch(r"(\d{1,4})[xX](\d{1,4})", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not GxR (groups x ranks), for example 1x2")
        pool = cls(int(match[1]), int(match[2]))
        if not (pool.groups >= 1 and pool.ranks >= 1 and pool.total <= MAX_RANKS):
            raise ValueError(f"{text!r}: at least 1x1, at most {MAX_RANKS} ranks")
        return pool

    @property
    def total(self) -> int:
        """Ranks in all."""
        return self.groups * self.ranks

    def __str__(self) -> str:
        return f"{self.groups}x{self.ranks}"


@dataclass(frozen=True)
class Cores:
    """CPU cores by number, as "0-3,8" on the command line."""

    numbers: tuple[int, ...] = ()
    """Ascending; none stands for all."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Cores from a list of numbers and ranges.

        Raises:
            ValueError: not of that form.
        """
        numbers: set[int] = set()
        for part in text.split(","):
            match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
            if match is None or int(match[2] or match[1]) < int(match[1]):
                raise ValueError(f"{text!r} is no list of cores, for example 0-3,8")
            numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
        return cls(tuple(sorted(numbers)))

    def __len__(self) -> int:
        return len(self.numbers)

    def __str__(self) -> str:
        return ",".join(map(str, self.numbers))


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What `sps2 up` was asked for."""

    model: Path
    """Checkpoint folder."""
    prefill: Pool = Pool(1, 2)
    """The prefill pool."""
    decode: Pool = Pool(1, 2)
    """The decode pool."""
    listen: str = "127.0.0.1:50051"
    """HOST:PORT of the router; port 0 picks a free one."""
    redis: str | None = None
    """URL of a running Redis; None starts one."""
    device: str = "auto"
    """ "auto", "cpu" or "cuda"."""
    profile: str = "exact"
    """Attention of requests that name none: exact, paper, default, or a JSON file."""
    policy: str = "prefix_aware"
    """How the router picks groups."""
    max_queue_s: float = 300.0
    """Seconds that a request may wait for its prefill."""
    exchange: str = "auto"
    """What prefill ranks exchange: "auto", "heads" or "kv"."""
    sharing: str = "auto"
    """Prompts that all ranks of a prefill group share: "auto" or "all"."""
    prefix_fetch: str = "auto"
    """What prefill groups fetch of each other's cached KV: "auto", "always" or "never"."""
    prefill_tp: int = 1
    """Prefill ranks that split every layer between them; the rest of a group's ranks split the prompt."""
    decode_tp: int = 1
    """Decode ranks that split every layer between them; over the rest of a group's ranks KV is spread."""
    dtype: str = "fp32"
    """Element type of weights and KV."""
    kv_transport: str = "auto"
    """ "auto", "nixl" or "grpc"."""
    kv_tokens: int = 65_536
    """Tokens of KV that each rank can hold."""
    debug_invariants: bool = False
    """Decode ranks check their KV blocks after every plan."""
    threads: int | None = None
    """CPU threads of each rank; None: its share of the cores."""
    cores: int = 1
    """Cores that the ranks of pools without cores of their own share."""
    prefill_cpus: Cores = Cores()
    """Cores that the prefill pool is pinned to."""
    decode_cpus: Cores = Cores()
    """Cores that the decode pool is pinned to."""
    log_dir: Path | None = None
    """Where each process's log goes; None: stderr."""
    quiet: bool = False
    """Keep logs in memory and show them only when a process fails."""
    restart: bool = True
    """Start again what dies."""
    metrics_port_base: int | None = None
    """Port of the first process that serves metrics, the others' follow; None: none does."""
    ready_timeout: float = 120.0
    """Seconds until every group must be ready."""
    drain_timeout: float = 40.0
    """Seconds that each kind of process gets to finish its work."""

    def __post_init__(self) -> None:
        for role, pool in _pools(self):
            tp = self.tp_of(role)
            if pool.ranks % tp:
                raise ValueError(
                    f"{pool.ranks} {role} ranks cannot be cut into tensor groups of {tp}: "
                    f"make --{role} a multiple of {tp}, for example 1x{2 * tp}"
                )

    def pool_of(self, role: Role) -> Pool:
        """A pool as it was asked for; `sps2 scale` changes the number of its groups, never their shape."""
        return self.prefill if role == "prefill" else self.decode

    @property
    def drain_budget(self) -> float:
        """Seconds that the requests of a group get to finish when it drains."""
        return max(0.0, self.drain_timeout - DRAIN_MARGIN_S)

    @property
    def model_name(self) -> str:
        """Name that requests use: that of the folder."""
        return self.model.resolve().name

    def cpus_of(self, role: Role) -> Cores:
        """Cores that a pool is pinned to."""
        return self.prefill_cpus if role == "prefill" else self.decode_cpus

    def tp_of(self, role: Role) -> int:
        """Tensor ranks of the groups of a pool."""
        return self.prefill_tp if role == "prefill" else self.decode_tp

    def threads_of(self, role: Role) -> int:
        """CPU threads of each rank of a pool."""
        if self.threads is not None:
            return self.threads
        if cpus := self.cpus_of(role):
            return max(1, len(cpus) // self.pool_of(role).total)
        return default_threads(self.cores, self.prefill, self.decode)

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """Every rank, as it registers itself."""
        pools: tuple[tuple[Role, Pool], ...] = (("prefill", self.prefill), ("decode", self.decode))
        return tuple(
            f"{role}-{group}/{rank}"
            for role, pool in pools
            for group in range(pool.groups)
            for rank in range(pool.ranks)
        )


def default_threads(cores: int, prefill: Pool, decode: Pool) -> int:
    """Threads of each rank when all ranks share `cores`."""
    return max(1, cores // (prefill.total + decode.total))


@dataclass(frozen=True)
class Commands:
    """How each service is started; tests put stand-ins here."""

    directory: tuple[str, ...] = (sys.executable, "-m", "sps2_kv_directory")
    router: tuple[str, ...] = (sys.executable, "-m", "sps2_router")
    prefill: tuple[str, ...] = (sys.executable, "-m", "sps2_prefill_worker")
    decode: tuple[str, ...] = (sys.executable, "-m", "sps2_decode_worker")


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """One process: what it is called and how it is started."""

    name: str
    """Its name in logs, unique in the deployment."""
    kind: Kind
    """What it is; decides the order of the shutdown."""
    command: tuple[str, ...]
    """Program and arguments, without `--listen` and `--announce-fd`."""
    listen: str | None = None
    """Value of `--listen`; the process then announces where it listens. None for redis."""
    metrics: str = ""
    """HOST:PORT on which it serves its metrics; empty: it serves none."""
    cpus: Cores = Cores()
    """Cores that it and its children run on."""
    group: str | None = None
    """Of a rank: its group."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables beside those of this process; may hold secrets."""
    stdin: str = field(default="", repr=False)
    """What it reads on stdin; may hold secrets."""

    def at(self, address: str) -> "ProcessSpec":
        """The same process on a fixed address, for its restart: others know it by that address."""
        return replace(self, listen=address)


def directory_spec(commands: Commands, redis_url: str) -> ProcessSpec:
    """The KV directory, with the password of `redis_url` moved from the flags to the environment."""
    url, password = split_password(redis_url)
    return ProcessSpec(
        name="directory",
        kind="directory",
        command=(*commands.directory, "--redis", url),
        listen=ANY_PORT,
        env={REDIS_PASSWORD_VARIABLE: password} if password else {},
    )


def split_password(url: str) -> tuple[str, str | None]:
    """A URL without its password, and the password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url, None
    user = f"{parts.username}@" if parts.username else ""
    place = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}{place}")), parts.password


def router_spec(options: UpOptions, commands: Commands, directory: str) -> ProcessSpec:
    """The router."""
    flags: dict[str, str | Path] = {
        "--directory": directory,
        "--profile": options.profile,
        "--policy": options.policy,
        "--max-queue-s": f"{options.max_queue_s:g}",
        "--model": options.model,
        "--model-name": options.model_name,
    }
    return ProcessSpec(
        name="router",
        kind="router",
        command=(*commands.router, *(str(part) for pair in flags.items() for part in pair)),
        listen=options.listen,
    )


def leader_specs(options: UpOptions, commands: Commands, directory: str) -> list[ProcessSpec]:
    """Rank 0 of every group."""
    return [
        leader_spec(options, commands, role, group, directory)
        for role, pool in _pools(options)
        for group in range(pool.groups)
    ]


def leader_spec(
    options: UpOptions, commands: Commands, role: Role, group: int, directory: str
) -> ProcessSpec:
    """Rank 0 of one group."""
    return _worker_spec(options, commands, role, group, 0, directory)


def follower_specs(
    options: UpOptions, commands: Commands, directory: str, leaders: Mapping[str, str]
) -> list[ProcessSpec]:
    """All other ranks; `leaders` maps the name of each rank 0 to its address."""
    return [
        spec
        for role, pool in _pools(options)
        for group in range(pool.groups)
        for spec in followers_of(options, commands, role, group, directory, leaders[f"{role}-{group}/0"])
    ]


def followers_of(
    options: UpOptions, commands: Commands, role: Role, group: int, directory: str, leader: str
) -> list[ProcessSpec]:
    """The other ranks of one group, whose rank 0 listens on `leader`."""
    return [
        _worker_spec(options, commands, role, group, rank, directory, leader)
        for rank in range(1, options.pool_of(role).ranks)
    ]


def _pools(options: UpOptions) -> tuple[tuple[Role, Pool], ...]:
    return (("prefill", options.prefill), ("decode", options.decode))


def _worker_spec(
    options: UpOptions,
    commands: Commands,
    role: Role,
    group: int,
    rank: int,
    directory: str,
    leader: str | None = None,
) -> ProcessSpec:
    program = commands.prefill if role == "prefill" else commands.decode
    flags: dict[str, str | int | Path] = {
        "--group": f"{role}-{group}",
        "--rank": rank,
        "--group-size": options.pool_of(role).ranks,
        "--model": options.model,
        "--model-name": options.model_name,
        "--directory": directory,
        "--device": options.device,
        "--dtype": options.dtype,
        "--kv-tokens": options.kv_tokens,
        "--threads": options.threads_of(role),
        "--kv-transport": options.kv_transport,
        "--tp": options.tp_of(role),
        "--drain-s": f"{options.drain_budget:g}",
    }
    if role == "prefill":
        flags["--exchange"] = options.exchange
        flags["--sharing"] = options.sharing
        flags["--prefix-fetch"] = options.prefix_fetch
    if leader is not None:
        flags["--leader"] = leader
    arguments = [str(part) for pair in flags.items() for part in pair]
    if role == "decode" and options.debug_invariants:
        arguments.append("--debug-invariants")
    return ProcessSpec(
        name=f"{role}-{group}/{rank}",
        kind="worker",
        group=f"{role}-{group}",
        command=(*program, *arguments),
        listen=ANY_PORT,
        cpus=options.cpus_of(role),
    )
