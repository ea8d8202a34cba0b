"""One gRPC server with what every service has: limits, rich errors, health, reflection, graceful stop.

Knows nothing about the services it carries. The process around it is `run.run_service`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sps2_service.channel import MAX_MESSAGE_BYTES
from sps2_service.config import ServiceConfig
from sps2_service.interceptors import StatusInterceptor
from sps2_service.tls import PeerNamesInterceptor, Tls
from sps2_service.trace_context import TraceInterceptor

MAX_METADATA_BYTES = 8 * 1024
LIVENESS = "liveness"
"""Name under which health answers SERVING from start to stop: whether the process lives, not whether it can serve.
A liveness probe asks it; the empty name would have a rank killed for waiting for the rest of its group."""
MAX_HEALTH_CALLS = 64
"""At once on a health port: watches hold theirs."""


class CannotListenError(OSError):
    """The address is taken, malformed, or not this machine's."""


@dataclass(frozen=True)
class ServerOptions:
    """Limits of a server; a client that exceeds one gets RESOURCE_EXHAUSTED."""

    max_message_bytes: int = MAX_MESSAGE_BYTES
    """Per message, after decompression, either way."""
    max_metadata_bytes: int = MAX_METADATA_BYTES
    """All metadata of a call together, as HTTP/2 counts it (32 bytes more for each entry)."""
    min_ping_interval_s: float = 0.5
    """Clients may ping a silent connection this often; a gRPC default server ends it after a few pings."""
    keepalive_s: float = 10.0
    """A silent client is pinged this often, so that the calls of one that is gone end."""
    keepalive_timeout_s: float = 5.0
    """A ping unanswered for this long ends the connection and its calls."""
    max_connection_age_s: float | None = None
    """Connections are closed after this time (calls may finish), so that clients see new replicas."""
    max_connection_age_grace_s: float = 3600.0
    """What running calls get after max_connection_age_s."""
    max_concurrent_rpcs: int | None = None
    """More calls than this at once are refused with RESOURCE_EXHAUSTED."""

    def arguments(self) -> list[tuple[str, Any]]:
        """The same as gRPC server arguments."""
        arguments = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # Between a soft and a hard limit gRPC refuses at random; equal limits refuse always.
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.max_metadata_bytes),
            ("grpc.http2.min_ping_interval_without_data_ms", round(self.min_ping_interval_s * 1000)),
            ("grpc.http2.max_ping_strikes", 2),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", round(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.keepalive_timeout_s * 1000)),
            ("grpc.http2.ping_timeout_ms", round(self.keepalive_timeout_s * 1000)),
            ("grpc.http2.max_pings_without_data", 0),
            # Otherwise a second server on the same port would silently get half of the connections.
            ("grpc.so_reuseport", 0),
        ]
        if self.max_connection_age_s is not None:
            arguments.append(("grpc.max_connection_age_ms", round(self.max_connection_age_s * 1000)))
            arguments.append(
                ("grpc.max_connection_age_grace_ms", round(self.max_connection_age_grace_s * 1000))
            )
        return arguments


def add_service(server: grpc.aio.Server, servicer: object, service: ServiceDescriptor) -> None:
    """Registers a servicer; `service` is one of `..._pb2.DESCRIPTOR.services_by_name`.

    Each method is an `async def`, or an async generator where the response is streamed. The StatusInterceptor
    of a ServiceServer parses the requests, so that malformed ones become INVALID_ARGUMENT.

    Raises:
        TypeError: the servicer lacks a method of the service.
    """
    missing = [
        method.name for method in service.methods if not callable(getattr(servicer, method.name, None))
    ]
    if missing:
        raise TypeError(f"{type(servicer).__name__} lacks {', '.join(missing)} of {service.full_name}")
    handlers = {method.name: _handler(servicer, method) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _handler(servicer: object, method: MethodDescriptor) -> "grpc.RpcMethodHandler[Any, Any]":
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.client_streaming, method.server_streaming]
    handler: grpc.RpcMethodHandler[Any, Any] = make(
        getattr(servicer, method.name),
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )
    return handler


class ServiceServer:
    """A grpc.aio server and its health: NOT_SERVING until `set_serving(True)`, and again from `stop` on.

    Under the name LIVENESS health is SERVING from `start` on.

    Made inside a running event loop. Order of use: `add` each service, `start`, `set_serving(True)`, `stop`.
    """

    def __init__(
        self,
        *,
        tls: Tls | None = None,
        peers: tuple[str, ...] = (),
        with_reflection: bool = False,
        health_port: int = 0,
        options: ServerOptions = ServerOptions(),
        interceptors: Sequence["grpc.aio.ServerInterceptor[Any, Any]"] = (),
    ) -> None:
        """`interceptors` may raise ServiceError to refuse a call.

        `tls` None serves plaintext; `peers` are the names of which a caller's certificate must have one.
        `health_port`, if not 0, has nothing but health, in plaintext, for probes that speak no TLS.
        """
        named = [PeerNamesInterceptor(peers)] if peers else []
        self.grpc_server = grpc.aio.server(
            interceptors=[StatusInterceptor(), *named, *interceptors],
            options=options.arguments(),
            maximum_concurrent_rpcs=options.max_concurrent_rpcs,
        )
        self._tls = tls
        self._with_reflection = with_reflection
        self._names = [""]  # the empty name is the server as a whole
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined] # not in the stubs
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        self._health_port = health_port
        self._health_server = self._make_health_server(options) if health_port else None

    def add(self, servicer: object, service: ServiceDescriptor) -> None:
        """Registers a servicer, see `add_service`, and its name with health and reflection."""
        add_service(self.grpc_server, servicer, service)
        self._names.append(service.full_name)

    async def start(self, listen: str) -> str:
        """Binds `HOST:PORT` (port 0: any free one) or `unix:PATH` and serves; the address as bound.

        Raises:
            CannotListenError: the address cannot be bound.
        """
        await self.set_serving(False)
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        if self._with_reflection:
            names = [*self._names[1:], health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
            reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], self.grpc_server)
        try:
            if self._tls is None:
                port = self.grpc_server.add_insecure_port(listen)
            else:
                port = self.grpc_server.add_secure_port(listen, self._tls.server_credentials())
        except RuntimeError as error:
            raise CannotListenError(
                f"cannot listen on {listen}: is the address in use or malformed?"
            ) from error
        host = listen.rpartition(":")[0]
        await self._start_health(host)
        await self.grpc_server.start()
        return listen if listen.startswith("unix:") else f"{host}:{port}"

    async def set_serving(self, serving: bool) -> None:
        """Sets what grpc.health.v1 says about the server and each of its services; no effect after `stop`."""
        status = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace: float) -> None:
        """NOT_SERVING for good; no new calls; running ones get `grace` seconds before they are cancelled."""
        await self._health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace)
        if self._health_server is not None:
            await self._health_server.stop(0)

    def _make_health_server(self, options: ServerOptions) -> grpc.aio.Server:
        """The same answers as under TLS, from a server that carries nothing else."""
        server = grpc.aio.server(
            interceptors=[StatusInterceptor()],
            options=options.arguments(),
            maximum_concurrent_rpcs=MAX_HEALTH_CALLS,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return server

    async def _start_health(self, host: str) -> None:
        if self._health_server is None:
            return
        where = f"{host}:{self._health_port}"
        try:
            self._health_server.add_insecure_port(where)
        except RuntimeError as error:
            raise CannotListenError(f"cannot listen on {where} (--health-port): is it in use?") from error
        await self._health_server.start()


def server_for(
    config: ServiceConfig,
    options: ServerOptions = ServerOptions(),
    interceptors: Sequence["grpc.aio.ServerInterceptor[Any, Any]"] = (),
) -> ServiceServer:
    """A server with what every service can be told."""
    return ServiceServer(
        tls=config.tls,
        peers=config.tls_peers,
        with_reflection=config.reflection,
        health_port=config.health_port,
        options=options,
        interceptors=[*interceptors, *([TraceInterceptor()] if config.trace_endpoint else [])],
    )
