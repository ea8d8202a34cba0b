"""The life of a service process: start, serve, drain on SIGTERM or SIGINT, stop, exit code."""

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from sps2_service.announce import announce
from sps2_service.config import ServiceConfig
from sps2_service.metrics import MetricsEndpoint
from sps2_service.process import ParentGoneError, die_with_parent
from sps2_service.server import CannotListenError, ServiceServer
from sps2_service.telemetry import configure_logging

EXIT_OK = 0
EXIT_FAILED = 1

log = structlog.get_logger(__name__)


class BackgroundEndedError(RuntimeError):
    """The loop that should run as long as the service does has ended."""


class ExpectedEndError(RuntimeError):
    """Raised by a background loop that ends the service for a reason that one line tells."""


def prepare_process(service: str, config: ServiceConfig) -> None:
    """First thing in a service's `main`: logging, and the tie to the parent that `config` asks for.

    Raises:
        SystemExit: the parent has ended already.
    """
    configure_logging(service, level=config.log_level, json=config.log_json)
    if config.parent_pid is not None:
        try:
            die_with_parent(signal.SIGTERM, config.parent_pid)
        except ParentGoneError as error:
            raise SystemExit(f"{service}: {error}") from error


async def run_service(
    server: ServiceServer,
    config: ServiceConfig,
    metrics: CollectorRegistry,
    *,
    on_started: Callable[[str], Awaitable[None]] | None = None,
    background: Callable[[], Coroutine[Any, Any, None]] | None = None,
    drain: Callable[[], Awaitable[None]] | None = None,
    ready_when_started: bool = True,
    leave: asyncio.Event | None = None,
    drain_margin_s: float = 0.0,
) -> int:
    """Serves until SIGTERM, SIGINT, `leave` or the end of `background`; the process's exit code.

    Order: bind, `on_started`, health SERVING, announce; on a signal `drain`, then stop. A signal while
    starting goes straight to the drain, a second signal cuts the drain short.

    Args:
        server: With all services added, not started.
        config: Where to listen, and how long drain and stop may take.
        metrics: What is served on `config.metrics_port`, from the binding to the stop.
        on_started: Gets the bound address; loads and registers. Its failure ends the service.
        background: The service's own loop, started before `on_started` and cancelled after the stop. Ending
            by itself is a failure, and nothing is drained then.
        drain: Deregisters and waits for the running work. It says NOT_SERVING itself, when that is right
            (`server.set_serving(False)`); at the stop health says so in any case.
        ready_when_started: Health says SERVING right after `on_started`; False leaves that to the caller.
        leave: Set from within, it does what a first signal does; a signal after it is still the first.
        drain_margin_s: Seconds beyond `config.drain_s` that `drain` may take, where it keeps to that budget itself.

    Returns:
        0 after a complete drain; 1 when starting, the background or the drain failed or was cut short.
    """
    first, second = leave or asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = iter((first, second))

    def on_signal() -> None:
        next(signals, second).set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal)
    work: asyncio.Task[None] | None = None
    endpoint = MetricsEndpoint(metrics, config.metrics_port)
    try:
        address = await server.start(config.listen)
        log.info("listening", address=address)
        endpoint.start()
        work = asyncio.create_task(background(), name="background") if background else None
        if on_started is None or await _finished(on_started(address), first, work):
            if ready_when_started:
                await server.set_serving(True)
            announce(config.announce_fd, address)
            log.info("serving", address=address)
            # What there is now stays. The garbage collector would look through all of it again and again, some
            # 20 ms each time, while calls wait.
            gc.collect()
            gc.freeze()
            await _finished(asyncio.Event().wait(), first, work)
        log.info("draining", at_most_s=config.drain_s)
        limit_s = config.drain_s + drain_margin_s
        if drain is not None and not await _finished(asyncio.wait_for(drain(), limit_s), second, work):
            log.warning("the drain was cut short by a second signal")
            return EXIT_FAILED
    except CannotListenError as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - a traceback would add nothing
        return EXIT_FAILED
    except BackgroundEndedError as error:
        log.error("the service ends", reason=str(error))  # noqa: TRY400 - the cause is in the reason
        return EXIT_FAILED
    except Exception:
        log.exception("the service failed")
        return EXIT_FAILED
    else:
        return EXIT_OK
    finally:
        await server.stop(config.grace_s)
        if work is not None:
            await _cancel(work)
        # On a thread: whoever asks it now still gets its answer from this loop.
        await asyncio.to_thread(endpoint.stop)
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signum)
        log.info("stopped")


async def _finished(step: Awaitable[Any], interrupt: asyncio.Event, work: asyncio.Task[None] | None) -> bool:
    """True when `step` finished, False when `interrupt` came first; the step is cancelled then.

    Raises:
        BackgroundEndedError: `work` ended first.
    """
    task = asyncio.ensure_future(step)
    interrupted = asyncio.ensure_future(interrupt.wait())
    try:
        await asyncio.wait(
            [task, interrupted, *([work] if work else [])], return_when=asyncio.FIRST_COMPLETED
        )
        if task.done():
            await task
            return True
        if work is not None and work.done():
            cause = None if work.cancelled() else work.exception()
            if cause is not None and not isinstance(cause, ExpectedEndError):
                log.error("the background loop failed", exc_info=cause)
            raise BackgroundEndedError(str(cause or "the background loop ended")) from cause
        return False
    finally:
        await _cancel(task, interrupted)


async def _cancel(*tasks: asyncio.Future[Any], patience_s: float = 5.0) -> None:
    """Cancels and waits; a task that resists for longer than `patience_s` is left behind with a warning."""
    for task in tasks:
        task.cancel()
    done, pending = await asyncio.wait(tasks, timeout=patience_s)
    for task in done:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("ended with an error", error=type(error).__name__)
    if pending:
        log.warning("tasks ignore cancellation", count=len(pending))
