"""TLS between services, by files: a certificate with its key, and the CA that signs those of the others.

Files are read for each server and each channel, so a certificate that was exchanged counts for new channels. Ports of
collectives and of KV transfer are not covered: they belong into a network of their own.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from sps2_service.errors import PermissionDenied
from sps2_service.interceptors import guarded

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]

EXEMPT = "/grpc.health.v1.Health/"


@dataclass(frozen=True)
class Tls:
    """What one service shows and whom it believes."""

    cert: Path
    """Its own certificate chain, PEM; shown to callers, and to the services that it calls."""
    key: Path
    """The certificate's private key, PEM."""
    ca: Path
    """Certificates (PEM) of who signs those of the others."""
    server_name: str = ""
    """Name that the certificates of called services must have; empty: their host, as it was called."""
    client_certs: bool = True
    """Whether callers must show a certificate, too."""

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server's port. Raises OSError when a file cannot be read."""
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.cert.read_bytes())],
            root_certificates=self.ca.read_bytes(),
            require_client_auth=self.client_certs,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel to another service. Raises OSError when a file cannot be read."""
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes()
        )

    def channel_arguments(self) -> list[tuple[str, Any]]:
        """What a channel is told beside its credentials."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


class PeerNamesInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs only
    """Lets in whose certificate has one of some names (common name, or alternative name), and health."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = frozenset(name.encode() for name in names)

    async def intercept_service(  # type: ignore[override] # the stubs do not know that there may be no handler
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """Called by gRPC once for each call."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(EXEMPT):
            return handler
        return guarded(handler, self._check)

    def _check(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        shown = context.auth_context()
        names = {*shown.get("x509_common_name", ()), *shown.get("x509_subject_alternative_name", ())}
        if not names & self._names:
            raise PermissionDenied("PEER_NOT_ALLOWED", "the caller's certificate is not one of --tls-peers")
