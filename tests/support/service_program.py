"""A service process whose behaviour a test chooses by flags; its stdout tells the order of events."""

import asyncio
import dataclasses
import sys

from sps2_service.config import ServiceConfig, load_config
from sps2_service.metrics import service_registry
from sps2_service.run import ExpectedEndError, prepare_process, run_service
from sps2_service.server import ServiceServer
from support.echo_service import SERVICE, EchoServicer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ServiceConfig):
    """A service for tests."""

    start_s: float = 0.0
    """Seconds that starting takes."""
    drain_takes_s: float = 0.0
    """Seconds that draining takes."""
    background: str = "forever"
    """forever, or how it ends: returns, raises, expected."""
    ready_when_started: bool = True
    """Whether health says SERVING by itself."""
    leaves_after_s: float | None = None
    """It drains of its own accord, so many seconds after it has started."""
    fail_start: bool = False
    """Whether starting fails."""


def say(text: str) -> None:
    """Tells the test."""
    print(text, flush=True)  # noqa: T201 - the test reads it


async def main(config: Config) -> int:
    """Serves; prints what happens."""
    server = ServiceServer()

    async def answer(text: str) -> str:
        say("called")
        await asyncio.sleep(float(text))
        return text

    server.add(EchoServicer(answer), SERVICE)

    leave = asyncio.Event()

    async def on_started(address: str) -> None:
        if config.leaves_after_s is not None:
            asyncio.get_running_loop().call_later(config.leaves_after_s, leave.set)
        say(f"started {address}")
        await asyncio.sleep(config.start_s)
        if config.fail_start:
            raise OSError("no weights")

    async def background() -> None:
        if config.background == "raises":
            raise RuntimeError("engine lost")
        if config.background == "expected":
            raise ExpectedEndError("the lease went to another process")
        if config.background == "forever":
            try:
                await asyncio.sleep(3600)
            finally:
                say("background cancelled")

    async def drain() -> None:
        await server.set_serving(False)
        say("drain begins")
        await asyncio.sleep(config.drain_takes_s)
        say("drain ends")

    return await run_service(
        server,
        config,
        service_registry("test"),
        on_started=on_started,
        background=background,
        drain=drain,
        ready_when_started=config.ready_when_started,
        leave=leave,
    )


if __name__ == "__main__":
    loaded = load_config(Config)
    prepare_process("test", loaded)
    sys.exit(asyncio.run(main(loaded)))
