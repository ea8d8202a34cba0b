"""run_service as a process sees it: signals, exit codes, the announced address, health."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from sps2_service.channel import open_channel
from support.echo_service import Echo, EchoStub
from support.metrics import scrape
from support.process import ManagedProcess

pytestmark = pytest.mark.service

PROGRAM = [sys.executable, "-P", "-m", "support.service_program"]


@pytest.fixture
def service(processes: Callable[..., ManagedProcess], repo_root: Path) -> Callable[..., ManagedProcess]:
    def start(*flags: str, **options: Any) -> ManagedProcess:
        env = {"PYTHONPATH": str(repo_root / "tests")}
        command = [*PROGRAM, *flags]
        return processes(command, name="service", env=env, **options)

    return start


def events(process: ManagedProcess) -> list[str]:
    """What happened, in order: what the program says, and the `event` of its JSON log lines."""
    return [json.loads(line)["event"] if line.startswith("{") else line for line in process.lines]


def serving_address(process: ManagedProcess) -> str:
    process.wait_for_line('"event": "serving"')
    return process.wait_for_line(r"started (.*)").group(1)


async def health(address: str) -> int:
    async with open_channel(address) as channel:
        check: Any = channel.unary_unary(
            "/grpc.health.v1.Health/Check", None, health_pb2.HealthCheckResponse.FromString
        )
        status: int = (await check(b"", timeout=5)).status
        return status


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_exits_with_0(service: Callable[..., ManagedProcess], signum: int) -> None:
    process = service()
    assert await health(serving_address(process)) == health_pb2.HealthCheckResponse.SERVING
    process.send(signum)
    assert process.wait() == 0
    said = events(process)[-5:]
    assert said == ["draining", "drain begins", "drain ends", "background cancelled", "stopped"]


async def test_running_calls_finish_during_drain_and_grace(service: Callable[..., ManagedProcess]) -> None:
    process = service("--drain-takes-s", "0.2", "--grace-s", "10")
    async with open_channel(serving_address(process)) as channel:
        call = EchoStub(channel).unary(Echo(text="1.0"), timeout=20)
        await asyncio.to_thread(process.wait_for_line, "called")
        process.send(signal.SIGTERM)
        assert (await call).text == "1.0"
    assert process.wait() == 0


async def test_calls_that_outlast_the_grace_are_cut(service: Callable[..., ManagedProcess]) -> None:
    process = service("--grace-s", "0.2")
    async with open_channel(serving_address(process)) as channel:
        call = EchoStub(channel).unary(Echo(text="60"), timeout=20)
        await asyncio.to_thread(process.wait_for_line, "called")
        process.send(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert process.wait() == 0


async def test_health_while_starting(service: Callable[..., ManagedProcess]) -> None:
    process = service("--start-s", "60")
    address = process.wait_for_line(r"started (.*)").group(1)
    assert await health(address) == health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_signal_while_starting(service: Callable[..., ManagedProcess]) -> None:
    process = service("--start-s", "60")
    process.wait_for_line("started")
    process.send(signal.SIGTERM)
    assert process.wait() == 0
    assert "serving" not in events(process)
    assert "drain ends" in events(process)


def test_a_second_signal_cuts_the_drain_short(service: Callable[..., ManagedProcess]) -> None:
    process = service("--drain-takes-s", "60")
    serving_address(process)
    process.send(signal.SIGTERM)
    process.wait_for_line("drain begins")
    process.send(signal.SIGTERM)
    assert process.wait() == 1
    assert "the drain was cut short by a second signal" in events(process)


def test_a_signal_while_it_leaves_of_its_own_accord_is_the_first(
    service: Callable[..., ManagedProcess],
) -> None:
    process = service("--leaves-after-s", "0", "--drain-takes-s", "1")
    process.wait_for_line("drain begins")
    process.send(signal.SIGTERM)
    assert process.wait() == 0
    assert "drain ends" in events(process)


def test_a_drain_that_takes_too_long_is_a_failure(service: Callable[..., ManagedProcess]) -> None:
    process = service("--drain-takes-s", "60", "--drain-s", "0.2")
    serving_address(process)
    process.send(signal.SIGTERM)
    assert process.wait() == 1


@pytest.mark.parametrize(
    ("flags", "event", "traceback"),
    [
        (["--background", "raises"], "the background loop failed", True),
        (["--background", "returns"], "the service ends", False),
        (["--background", "expected"], "the service ends", False),
        (["--fail-start"], "the service failed", True),
    ],
)
def test_what_ends_by_itself_is_a_failure(
    service: Callable[..., ManagedProcess], flags: list[str], event: str, traceback: bool
) -> None:
    process = service(*flags)
    assert process.wait() == 1
    assert event in events(process)
    assert ("Traceback" in process.output) == traceback


async def test_a_service_may_say_itself_when_it_is_ready(service: Callable[..., ManagedProcess]) -> None:
    process = service("--no-ready-when-started")
    assert await health(serving_address(process)) == health_pb2.HealthCheckResponse.NOT_SERVING


def test_an_address_in_use_is_one_line(service: Callable[..., ManagedProcess]) -> None:
    first = service()
    second = service("--listen", serving_address(first))
    assert second.wait() == 1
    assert "Traceback" not in second.output
    assert "cannot listen on 127.0.0.1:" in second.output


def test_metrics_are_served_until_it_stops(service: Callable[..., ManagedProcess]) -> None:
    process = service("--metrics-port", "127.0.0.1:0", "--drain-takes-s", "1")
    serving_address(process)
    address = process.wait_for_line('"address": "([^"]+)", "event": "metrics are served"').group(1)
    assert scrape(address).total("sps2_build_info") == 1
    other = service("--metrics-port", address)
    assert other.wait() == 1
    assert "Traceback" not in other.output
    assert f"cannot listen on {address} (--metrics-port)" in other.output
    process.send(signal.SIGTERM)
    process.wait_for_line("drain begins")
    assert scrape(address).total("sps2_build_info") == 1
    assert process.wait() == 0


def test_the_address_is_announced_once_it_serves(service: Callable[..., ManagedProcess]) -> None:
    reader, writer = os.pipe()
    process = service("--start-s", "0.3", "--announce-fd", str(writer), pass_fds=[writer])
    os.close(writer)
    with os.fdopen(reader) as announced:
        assert announced.read() == f"{serving_address(process)}\n"


def test_no_service_survives_its_parent(processes: Callable[..., ManagedProcess], repo_root: Path) -> None:
    parent = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([*sys.argv[1:], '--parent-pid', str(os.getpid())])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    env = {"PYTHONPATH": str(repo_root / "tests")}
    process = processes([sys.executable, "-P", "-c", parent, *PROGRAM], name="parent", env=env)
    serving_address(process)
    process.popen.kill()
    # Its own SIGKILL reached the parent only; the service drains and says so through the shared pipe.
    process.wait_for_line("drain ends", timeout=10)
