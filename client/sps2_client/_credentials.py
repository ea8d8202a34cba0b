"""How a client is secured and who it says that it is: TLS files, and a token for each call."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc

Token: TypeAlias = str | Callable[[], str] | None
"""A bearer token, or what gives one for each call (it may be exchanged meanwhile), or none."""


@dataclass(frozen=True, slots=True)
class TLS:
    """TLS to the router."""

    ca: Path | str | None = None
    """Certificates (PEM) of who signs the router's; None: those that gRPC brings along."""
    cert: Path | str | None = None
    """Certificate chain of this client, PEM, where the router asks for one."""
    key: Path | str | None = None
    """Its private key, PEM."""
    server_name: str = ""
    """Name that the router's certificate must have; empty: the host of its address."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("give cert and key, or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel. Raises OSError when a file cannot be read."""
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))

    def options(self) -> list[tuple[str, int | str]]:
        """What a channel is told beside its credentials."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def metadata(token: Token) -> tuple[tuple[str, str], ...]:
    """What goes with a call."""
    found = token() if callable(token) else token
    return () if found is None else (("authorization", f"Bearer {found}"),)


def _read(path: Path | str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
