"""How the commands reach a router: TLS and token, from the options before the command, or the environment.

The variables of TLS are those of the services, so that `sps2 up` and what it starts agree.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from sps2_client import TLS, AsyncClient, Client, Token


@dataclass(frozen=True)
class Connection:
    """What every client of one command is made with."""

    tls: TLS | None = None
    """None: plaintext."""
    token_file: Path | None = None
    """Read for each call: it may be exchanged."""
    token: str | None = None
    """The token itself, where there is no file."""

    @classmethod
    def of(cls, values: Mapping[str, str]) -> "Connection":
        """That of the environment's variables."""
        ca, file = values.get("SPS2_TLS_CA"), values.get("SPS2_TOKEN_FILE")
        tls = TLS(
            ca,
            values.get("SPS2_TLS_CERT") or None,
            values.get("SPS2_TLS_KEY") or None,
            values.get("SPS2_TLS_SERVER_NAME", ""),
        )
        return cls(tls if ca else None, Path(file) if file else None, values.get("SPS2_TOKEN") or None)

    @property
    def provider(self) -> Token:
        """The token as clients take it."""
        if self.token_file is None:
            return self.token
        file = self.token_file
        return lambda: file.read_text("utf-8").strip()


def connection() -> Connection:
    """That of the running command; outside of one, that of the environment."""
    context = click.get_current_context(silent=True)
    found = context.find_root().obj if context is not None else None
    return found if isinstance(found, Connection) else Connection.of(os.environ)


def open_client(server: str, **options: Any) -> Client:
    """A client of a router; `options` are further ones of `Client`."""
    how = connection()
    return Client(server, tls=how.tls, token=how.provider, **options)


def open_async_client(server: str) -> AsyncClient:
    """The same on asyncio."""
    how = connection()
    return AsyncClient(server, tls=how.tls, token=how.provider)


File = Path | None


def connect_options(
    context: typer.Context,
    tls_ca: Annotated[
        File, typer.Option(help="Certificates of who signs the router's; turns TLS on.", envvar="SPS2_TLS_CA")
    ] = None,
    tls_cert: Annotated[
        File, typer.Option(help="Certificate to show to the router.", envvar="SPS2_TLS_CERT")
    ] = None,
    tls_key: Annotated[File, typer.Option(help="Its private key.", envvar="SPS2_TLS_KEY")] = None,
    tls_server_name: Annotated[
        str,
        typer.Option(
            help="Name of the router's certificate.",
            envvar="SPS2_TLS_SERVER_NAME",
            show_default="the host called",
        ),
    ] = "",
    token_file: Annotated[
        File,
        typer.Option(help="File with the bearer token; or give it in SPS2_TOKEN.", envvar="SPS2_TOKEN_FILE"),
    ] = None,
) -> None:
    """Takes the options before the command."""
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together")
    for path in (tls_ca, tls_cert, tls_key, token_file):
        if path is not None and not path.is_file():
            raise typer.BadParameter(f"no such file: {path}")
    tls = None if tls_ca is None else TLS(tls_ca, tls_cert, tls_key, tls_server_name)
    context.obj = Connection(tls, token_file, os.environ.get("SPS2_TOKEN") or None)
