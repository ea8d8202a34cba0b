"""Prometheus metrics of one process: its registry, and the HTTP endpoint that serves it. Knows no service.

A service declares what it exports in a file of its own room. Counters and histograms are told where the event happens;
what is there as state already is read where it lives, on the event loop, when somebody asks (`LoopReader`).
"""

import asyncio
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler

import structlog
from prometheus_client import (
    CollectorRegistry,
    Gauge,
    Metric,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from sps2_service.server import CannotListenError

if TYPE_CHECKING:  # exists for type checkers alone
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

LOOP_TIMEOUT_S = 5.0
"""Of an event loop that stands still for longer nothing can be read: the scrape fails, as it should."""
CLIENT_TIMEOUT_S = 10.0
"""A connection that sends no request for so long is closed: each holds a thread."""
STOP_POLL_S = 0.2

log = structlog.get_logger(__name__)


def service_registry(service: str, **identity: str) -> CollectorRegistry:
    """The registry of a process, with what every service exports.

    Args:
        service: Its kind: "router", "directory", "prefill", "decode".
        identity: Further labels of sps2_build_info, fixed for the life of the process.
    """
    # Twice the series of each histogram and counter, for a time that nothing here asks for. Of the whole library.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    labels = {"version": version("sps2"), "service": service, **identity}
    build = Gauge("sps2_build_info", "What runs here; 1.", labels, registry=registry)
    build.labels(**labels).set(1)
    return registry


class LoopReader(Collector):
    """Series that are read on the event loop, which alone may touch the state behind them, once for each scrape.

    Made on that loop; asked from any other thread.
    """

    def __init__(self, read: Callable[[], Coroutine[Any, Any, Iterable[Metric]]]) -> None:
        """`read` returns the families as they are now, within LOOP_TIMEOUT_S."""
        self._read = read
        self._loop = asyncio.get_running_loop()

    def collect(self) -> Iterable[Metric]:
        """See `Collector.collect`. Raises TimeoutError when the loop does not get to it."""
        reading = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
        try:
            return reading.result(LOOP_TIMEOUT_S)
        finally:
            reading.cancel()


class MetricsEndpoint:
    """Serves a registry over HTTP from threads of its own; every path is the metrics."""

    def __init__(self, registry: CollectorRegistry, listen: str) -> None:
        """`listen`: HOST:PORT (port 0: any free one), or empty: nothing is served."""
        self._app = make_wsgi_app(registry)
        self._listen = listen
        self.address = ""
        """As bound; empty before `start`."""
        self._server: _Server | None = None

    def start(self) -> None:
        """Binds and serves.

        Raises:
            CannotListenError: the address cannot be bound.
        """
        if not self._listen:
            return
        host, _, port = self._listen.rpartition(":")
        make = _Server6 if ":" in host else _Server
        try:
            self._server = make((host.strip("[]"), int(port)), _Handler)
        except (OSError, OverflowError) as error:
            raise CannotListenError(
                f"cannot listen on {self._listen} (--metrics-port): is it in use or malformed? ({error})"
            ) from error
        self._server.set_app(self._answer)
        serve, every = self._server.serve_forever, (STOP_POLL_S,)
        threading.Thread(target=serve, args=every, name="metrics", daemon=True).start()
        self.address = f"{host}:{self._server.server_port}"
        log.info("metrics are served", address=self.address)

    def stop(self) -> None:
        """Takes no more connections; takes up to STOP_POLL_S. Does nothing where nothing was started."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _answer(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> "Iterable[bytes]":
        """One scrape. Whatever goes wrong with it is told to who asks, and to the log."""
        try:
            answer: Iterable[bytes] = self._app(environ, start_response)
        except Exception:
            log.exception("a scrape failed")
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"the metrics could not be read; see the log\n"]
        return answer


class _Server(ThreadingWSGIServer):
    def server_bind(self) -> None:
        """As the base class does it, without asking DNS for this host's name, which nobody reads and may take long."""
        socketserver.TCPServer.server_bind(self)
        host, self.server_port = self.socket.getsockname()[:2]
        self.server_name = str(host)
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone, or never asked, is no news; the base class would print a traceback."""
        log.debug("a client of the metrics left", error=type(sys.exception()).__name__)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by the base class
        """A scrape is no news."""
