"""Logging: JSON lines, bound fields, and nothing that users wrote."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import structlog

from sps2_service.channel import open_channel
from sps2_service.errors import Unavailable
from sps2_service.server import ServiceServer
from sps2_service.telemetry import FORBIDDEN_FIELDS, bind_request, bound_request, configure_logging
from support.echo_service import SERVICE, Echo, EchoServicer, EchoStub

CANARY = "canary-5d1c"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """A stream that logging goes to; the process's own set-up comes back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_with_bound_fields(stream: io.StringIO) -> None:
    configure_logging("router", stream=stream)
    log = structlog.get_logger("sps2.test")
    with bound_request("req-1", attempt=2):
        log.info("admitted", num_tokens=7)
    log.debug("too quiet")
    log.warning("after")
    first, second = lines(stream)
    expected = {
        "service": "router",
        "request_id": "req-1",
        "attempt": 2,
        "event": "admitted",
        "num_tokens": 7,
    }
    assert expected.items() <= first.items()
    assert {"level": "info", "logger": "sps2.test"}.items() <= first.items()
    assert first["timestamp"].endswith("Z")
    assert "request_id" not in second


def test_a_logger_made_before_the_set_up_follows_it(stream: io.StringIO) -> None:
    log = structlog.get_logger("early")
    configure_logging("router", stream=stream)
    log.info("hello")
    assert lines(stream)[0]["event"] == "hello"


def test_libraries_log_the_same_way(stream: io.StringIO) -> None:
    configure_logging("router", stream=stream)
    logging.getLogger("some.library").warning("took %d ms", 12)
    (line,) = lines(stream)
    assert {"event": "took 12 ms", "service": "router", "level": "warning"}.items() <= line.items()


async def test_bound_fields_follow_tasks(stream: io.StringIO) -> None:
    configure_logging("router", stream=stream)
    log = structlog.get_logger()

    async def serve(request_id: str) -> None:
        with bound_request(request_id):
            await asyncio.sleep(0)
            log.info("served", expected=request_id)

    await asyncio.gather(*(serve(f"req-{n}") for n in range(5)))
    assert all(line["request_id"] == line["expected"] for line in lines(stream))


def test_what_logs_through_logging_says_whose_request_it_is(stream: io.StringIO) -> None:
    configure_logging("prefill-0/0 engine", stream=stream)
    fields = {"request_id": "req-1", "attempt": 2}
    logging.getLogger("sps2_engine").info("given up", extra={**fields, "other": CANARY})
    (line,) = lines(stream)
    assert {"event": "given up", "service": "prefill-0/0 engine", **fields}.items() <= line.items()
    assert "other" not in line


async def test_a_refusal_says_which_request_was_refused(stream: io.StringIO) -> None:
    configure_logging("router", stream=stream)

    def refuse(request_id: str) -> None:
        bind_request(request_id, 3)
        raise Unavailable("NO_ROOM", "later")

    server = ServiceServer()
    server.add(EchoServicer(refuse), SERVICE)
    address = await server.start("127.0.0.1:0")
    async with open_channel(address) as channel:
        stub = EchoStub(channel)
        for request_id in ("req-1", "req-2"):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.unary(Echo(text=request_id), timeout=5)
    await server.stop(0)
    refused = [line for line in lines(stream) if line["event"] == "refused"]
    assert [(one["request_id"], one["attempt"]) for one in refused] == [("req-1", 3), ("req-2", 3)]


@pytest.mark.parametrize("json_lines", [True, False])
def test_nothing_that_users_wrote_is_logged(stream: io.StringIO, json_lines: bool) -> None:
    configure_logging("router", json=json_lines, stream=stream)
    log = structlog.get_logger()
    for name in FORBIDDEN_FIELDS:
        log.info("a mistake", **{name: CANARY})
    log.info("raw bytes", payload=CANARY.encode())

    def fail(prompt: str) -> None:
        raise ValueError(len(prompt))

    try:
        fail(CANARY)
    except ValueError:
        log.exception("with a local variable")
    assert "with a local variable" in stream.getvalue()
    assert "ValueError" in stream.getvalue()
    assert CANARY not in stream.getvalue().replace("fail(CANARY)", "")


def test_unknown_level() -> None:
    with pytest.raises(ValueError, match="unknown log level 'loud'"):
        configure_logging("router", level="loud")
