"""`sps2 up`: a whole deployment on this machine, until Ctrl-C."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sps2_cli.exits import ExitCode
from sps2_cli.local.deployment import Deployment, InterruptedStartError, StartError
from sps2_cli.local.interrupts import Interrupts
from sps2_cli.local.plan import Commands, Cores, Pool, UpOptions
from sps2_cli.local.redis import RedisMissingError
from sps2_cli.local.reporter import Reporter
from sps2_cli.options import DEFAULT_ADDRESS, Json
from sps2_layout.profile_file import ProfileError, load_profile
from sps2_layout.profiles import DEFAULT

START_STOP_TIMEOUT_S = 5.0
"""Patience with processes that have no work yet."""

MODEL_OPTION = typer.Option(
    help="Checkpoint folder.", show_default="models/demo of the project", exists=True, file_okay=False
)


class Device(StrEnum):
    """Where ranks compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """Element type of weights and their products."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class Exchange(StrEnum):
    """What prefill ranks exchange in attention."""

    AUTO = "auto"
    HEADS = "heads"
    KV = "kv"


class Policy(StrEnum):
    """How the router picks groups."""

    PREFIX_AWARE = "prefix_aware"
    LEAST_LOADED = "least_loaded"
    ROUND_ROBIN = "round_robin"


class Sharing(StrEnum):
    """Which prompts all ranks of a prefill group share."""

    AUTO = "auto"
    ALL = "all"


class PrefixFetch(StrEnum):
    """What prefill groups fetch of each other's cached KV."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Transport(StrEnum):
    """How KV travels from prefill to decode ranks."""

    AUTO = "auto"
    NIXL = "nixl"
    GRPC = "grpc"


def pool(text: str) -> Pool:
    """A pool from the command line."""
    try:
        return Pool.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def listen_address(text: str) -> str:
    """HOST:PORT from the command line."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise typer.BadParameter(f"{text!r} is not HOST:PORT")
    return text


def attention_profile(text: str) -> str:
    """An attention profile from the command line: a name, or a file that can be used."""
    try:
        load_profile(text)
    except ProfileError as error:
        raise typer.BadParameter(str(error)) from error
    return text


def cores(text: str) -> Cores:
    """Cores from the command line, of those that this process may use."""
    try:
        found = Cores.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if absent := sorted(set(found.numbers) - os.sched_getaffinity(0)):
        raise typer.BadParameter(f"there is no core {', '.join(map(str, absent))} here")
    return found


def demo_model() -> Path | None:
    """The project's demo model, when this runs from a checkout."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / "models/demo/config.json").is_file():
            return root / "models/demo"
    return None


def up(
    model: Annotated[
        Path | None,
        MODEL_OPTION,
    ] = None,
    prefill: Annotated[
        Pool, typer.Option(parser=pool, metavar="GxR", help="Prefill groups x ranks in each.")
    ] = "1x2",  # type: ignore[assignment] # typer parses defaults too
    decode: Annotated[
        Pool, typer.Option(parser=pool, metavar="GxR", help="Decode groups x ranks in each.")
    ] = "1x2",  # type: ignore[assignment]
    listen: Annotated[
        str,
        typer.Option(
            parser=listen_address, metavar="HOST:PORT", help="Where the router listens; port 0: any."
        ),
    ] = DEFAULT_ADDRESS,
    redis: Annotated[
        str | None,
        typer.Option(envvar="SPS2_REDIS", metavar="URL", help="A running Redis.", show_default="starts one"),
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            callback=attention_profile,
            metavar="exact|paper|default|FILE",
            help="Attention of requests that name none; FILE is JSON, see docs/profiles.md.",
        ),
    ] = DEFAULT.name,
    policy: Annotated[
        Policy,
        typer.Option(
            help="How groups are picked: soonest done, what is cached counted; least to do; in turns."
        ),
    ] = Policy.PREFIX_AWARE,
    max_queue_s: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds that a request may wait for its prefill; refused at once if it looks like over half.",
        ),
    ] = 300.0,
    device: Annotated[Device, typer.Option(help="Where ranks compute.")] = Device.AUTO,
    dtype: Annotated[Dtype, typer.Option(help="Weights; auto: bf16 where it is fast.")] = Dtype.FP32,
    exchange: Annotated[
        Exchange,
        typer.Option(
            help="What prefill ranks exchange: shares of the heads, or keys and values of all heads."
        ),
    ] = Exchange.AUTO,
    sharing: Annotated[
        Sharing,
        typer.Option(
            help="Prompts that all ranks of a prefill group share: all, or auto: those that gain by it; "
            "each other one is computed by a rank alone."
        ),
    ] = Sharing.AUTO,
    prefix_fetch: Annotated[
        PrefixFetch,
        typer.Option(
            help="Beginnings of prompts that a prefill group fetches from one that has their KV cached: "
            "auto: those that come sooner than they are computed."
        ),
    ] = PrefixFetch.AUTO,
    prefill_tp: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="T",
            help="Prefill ranks that split every layer; 1x4 with 2: 2 slices of the prompt x 2 parts of a layer.",
        ),
    ] = 1,
    decode_tp: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="T",
            help="Decode ranks that split every layer; 1x4 with 2: 2 holders of KV x 2 parts of a layer.",
        ),
    ] = 1,
    kv_transport: Annotated[Transport, typer.Option(help="How KV travels.")] = Transport.AUTO,
    kv_tokens: Annotated[int, typer.Option(min=64, help="Tokens of KV for each rank.")] = 65_536,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each rank.", show_default="cores / ranks")
    ] = None,
    debug_invariants: Annotated[
        bool, typer.Option("--debug-invariants", help="Decode ranks check their KV blocks at every step.")
    ] = False,
    prefill_cpus: Annotated[
        Cores | None,
        typer.Option(parser=cores, metavar="CORES", help="Pin the prefill pool to cores, as in 0-3,8."),
    ] = None,
    decode_cpus: Annotated[
        Cores | None,
        typer.Option(parser=cores, metavar="CORES", help="Pin the decode pool to cores."),
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Log files in place of stderr.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show logs only of a process that failed.")] = False,
    restart: Annotated[bool, typer.Option(help="Start again what dies.")] = True,
    ready_timeout: Annotated[float, typer.Option(min=1, help="Seconds until all must be ready.")] = 120.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that each kind of process gets to finish.")
    ] = 40.0,
    metrics_port_base: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=60_000,
            metavar="PORT",
            help="Serve Prometheus metrics: the directory on this port, the others on those behind it; "
            "`ready --json` names them.",
            show_default="none",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Runs a whole deployment on this machine: Redis, directory, router and all ranks.

    Prints `ready` with its addresses once every group takes work. Ctrl-C drains: running answers are
    finished, then everything ends; a second Ctrl-C ends it at once. Nothing outlives this command. It exits
    with 0 after a clean drain, 1 when the start failed or something had to be killed, 130 when it was
    interrupted before it was ready or during the drain.

    For example:

    ```
    sps2 up
    sps2 up --model ~/models/qwen3-0.6b --prefill 1x4 --decode 2x2 --listen 0.0.0.0:50051
    sps2 up --prefill 1x8 --profile default
    sps2 up --prefill 1x4 --prefill-tp 2 --decode 1x2 --decode-tp 2
    sps2 up --prefill 1x1 --decode 1x1 --prefill-cpus 0-11 --decode-cpus 12-15
    sps2 up --profile my-ladder.json
    sps2 up --metrics-port-base 9090
    sps2 up --json --quiet --listen 127.0.0.1:0
    ```
    """
    folder = model or demo_model()
    if folder is None:
        raise typer.BadParameter("no demo model here: give --model DIR")
    try:
        options = UpOptions(
            model=folder,
            prefill=prefill,
            decode=decode,
            listen=listen,
            redis=redis,
            profile=profile,
            policy=policy.value,
            max_queue_s=max_queue_s,
            device=device.value,
            dtype=dtype.value,
            exchange=exchange.value,
            sharing=sharing.value,
            prefix_fetch=prefix_fetch.value,
            prefill_tp=prefill_tp,
            decode_tp=decode_tp,
            kv_transport=kv_transport.value,
            kv_tokens=kv_tokens,
            threads=threads,
            cores=len(os.sched_getaffinity(0)),
            prefill_cpus=prefill_cpus or Cores(),
            decode_cpus=decode_cpus or Cores(),
            debug_invariants=debug_invariants,
            log_dir=log_dir,
            quiet=quiet,
            restart=restart,
            ready_timeout=ready_timeout,
            drain_timeout=drain_timeout,
            metrics_port_base=metrics_port_base,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(run_up(options, Commands(), Reporter(as_json=as_json)))


def run_up(options: UpOptions, commands: Commands, reporter: Reporter) -> ExitCode:
    """Starts, serves until a signal, drains; the exit code. On the main thread only."""
    if options.log_dir is not None:
        options.log_dir.mkdir(parents=True, exist_ok=True)
    with Interrupts() as interrupts:
        deployment = Deployment(options, commands, reporter, interrupts)
        drain_timeout = START_STOP_TIMEOUT_S
        code = ExitCode.FAILED
        try:
            deployment.start()
            drain_timeout = options.drain_timeout
            _say_ready(deployment, reporter)
            deployment.supervise()
            reporter.note("draining; Ctrl-C again ends everything at once")
            code = ExitCode.DONE
        except (StartError, RedisMissingError, OSError) as error:
            context = error.context if isinstance(error, StartError) else ()
            reporter.fail(str(error), context)
        except InterruptedStartError:
            reporter.note("interrupted before it was ready")
            code = ExitCode.INTERRUPTED
        finally:
            clean = deployment.stop(drain_timeout)
        if interrupts.now:
            code = ExitCode.INTERRUPTED
        elif code is ExitCode.DONE and not clean:
            code = ExitCode.FAILED
    if code is not ExitCode.FAILED:
        reporter.event("stopped", "stopped", clean=clean)
    return code


def _say_ready(deployment: Deployment, reporter: Reporter) -> None:
    processes = deployment.processes
    reporter.event(
        "ready",
        f"ready {deployment.address} (redis {deployment.redis_address}, {len(processes)} processes)",
        address=deployment.address,
        redis=deployment.redis_address,
        processes=processes,
    )
