"""Configuration from frozen dataclasses: a field is a flag and a variable, its docstring the help.

    @dataclass(frozen=True, kw_only=True)
    class RouterConfig(ServiceConfig):
        max_queued_tokens: int = setting(1_000_000, minimum=1)
        \"\"\"Tokens that may wait; more are refused.\"\"\"

    config = load_config(RouterConfig, prog="python -m sps2_router", examples=["--listen 0.0.0.0:50051"])

This field is `--max-queued-tokens`, SPS2_MAX_QUEUED_TOKENS, or `max_queued_tokens` in the file that `--config-file`
names; the flag wins, then the variable. A field's type is str, int, float, bool (`--flag` / `--no-flag`), Path,
Literal[...] of texts, tuple[str, ...] (comma-separated), or one of these with `| None` (given as the empty text).
What relates fields to each other is checked in `__post_init__`, which raises ValueError.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from sps2_service.config_fields import ENV_PREFIX, Bounds, Field, fields_of
from sps2_service.config_file import MASK, masked, read_config_file
from sps2_service.tls import Tls

T = TypeVar("T")
C = TypeVar("C")

# Greedy: a password may have / and @ in it.
_PASSWORD_IN_URL = re.compile(r"(://[^/@:]*:).*@")
_PASSWORD_IN_QUERY = re.compile(r"([?&]password=)[^&]*")
_FILE_VARIABLE = f"{ENV_PREFIX}CONFIG_FILE"
_HOST_PORT = re.compile(r".+:\d{1,5}")
_REQUIRED: Any = dataclasses.MISSING


def setting(
    default: T = _REQUIRED,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    secret: bool = False,
) -> T:
    """A field that needs more than a default; without `default` it must be given.

    Args:
        default: The value when neither flag nor environment nor file gives one.
        minimum: Smallest allowed number.
        maximum: Largest allowed number.
        secret: Never shown by `--print-config`, and no flag: those show in `ps`.
    """
    field: T = dataclasses.field(default=default, metadata={"bounds": Bounds(minimum, maximum, secret)})
    return field


def check_address(flag: str, value: str) -> None:
    """Raises ValueError unless the value is HOST:PORT; for `__post_init__`."""
    if not _HOST_PORT.fullmatch(value) or int(value.rpartition(":")[2]) > 65535:
        raise ValueError(f"{flag} {value!r} is not HOST:PORT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What every service can be told."""

    listen: str = "127.0.0.1:0"
    """HOST:PORT to serve gRPC on; port 0 picks a free one."""
    announce_fd: int | None = setting(None, minimum=0)
    """Inherited file descriptor to which the bound HOST:PORT is written once the service is ready."""
    parent_pid: int | None = setting(None, minimum=1)
    """End when this process, which must be the parent, ends."""
    drain_s: float = setting(30.0, minimum=0)
    """Seconds for running work to finish after SIGTERM."""
    grace_s: float = setting(5.0, minimum=0)
    """Seconds that calls still running after the drain get before they are cancelled."""
    reflection: bool = False
    """Serve gRPC reflection, for grpcurl and the like."""
    tls_cert: Path | None = None
    """Certificate chain of this service, PEM; with --tls-key and --tls-ca all gRPC is TLS."""
    tls_key: Path | None = None
    """Private key of --tls-cert, PEM."""
    tls_ca: Path | None = None
    """Certificates (PEM) of who signs those of the other services, and of callers."""
    tls_client_certs: bool = True
    """Under TLS: callers must show a certificate of --tls-ca."""
    tls_peers: tuple[str, ...] = ()
    """Names of which a caller's certificate must have one; empty: any certificate of --tls-ca will do."""
    tls_server_name: str = ""
    """Name that the certificates of called services must have; empty: the host that is called."""
    health_port: int = setting(0, minimum=0, maximum=65535)
    """A further port of the same host with gRPC health alone, in plaintext, for probes that speak no TLS; 0: none."""
    metrics_port: str = ""
    """HOST:PORT to serve Prometheus metrics on, over plaintext HTTP; port 0 picks a free one, which the log names;
    empty: none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe lines that are logged."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """Log lines on stderr; auto is text on a terminal and JSON elsewhere."""
    otlp_endpoint: str = ""
    """http://HOST:PORT or https://HOST:PORT of the OpenTelemetry collector (OTLP over gRPC) that gets traces; empty:
    OTEL_EXPORTER_OTLP_ENDPOINT, and without that there are none."""
    trace_sample_ratio: float = setting(1.0, minimum=0, maximum=1)
    """Share of the requests that are traced, of those whose callers say nothing about it."""

    def __post_init__(self) -> None:
        files = {"--tls-cert": self.tls_cert, "--tls-key": self.tls_key, "--tls-ca": self.tls_ca}
        if None in files.values() and set(files.values()) != {None}:
            raise ValueError("give all of --tls-cert, --tls-key and --tls-ca, or none")
        for flag, path in files.items():
            if path is not None and not path.is_file():
                raise ValueError(f"{flag} {path}: no such file")
        if self.tls_peers and not (self.tls_cert and self.tls_client_certs):
            raise ValueError("--tls-peers needs TLS with client certificates")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"--otlp-endpoint {self.otlp_endpoint} must begin with http:// or https://")
        check_address("--listen", self.listen)
        if self.metrics_port:
            check_address("--metrics-port", self.metrics_port)

    @property
    def log_json(self) -> bool | None:
        """Whether log lines are JSON; None: unless stderr is a terminal."""
        return {"auto": None, "json": True, "text": False}[self.log_format]

    @property
    def trace_endpoint(self) -> str:
        """Where traces go, by the flag or by OpenTelemetry's own variable; empty: nowhere."""
        return self.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")

    @property
    def tls(self) -> Tls | None:
        """What the flags say of TLS; None for plaintext."""
        if self.tls_cert is None or self.tls_key is None or self.tls_ca is None:
            return None
        return Tls(
            self.tls_cert, self.tls_key, self.tls_ca, self.tls_server_name, client_certs=self.tls_client_certs
        )


def load_config(
    cls: type[C],
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    prog: str | None = None,
    examples: Sequence[str] = (),
) -> C:
    """Makes a `cls` from flags, environment and file, in this order.

    Exits with status 2 and one line on stderr when a value is wrong, and with 0 after `--help` or
    `--print-config` (JSON on stdout).

    Args:
        cls: A frozen dataclass; its docstring describes the program.
        argv: The flags; None: those of this process.
        environ: The environment; None: that of this process.
        prog: How the program is called.
        examples: Flags shown under `--help`, each behind `prog`.
    """
    fields = fields_of(cls)
    parser = _parser(cls, fields, prog, examples)
    flags = vars(parser.parse_args(argv))
    try:
        config = cls(**_values(fields, flags, os.environ if environ is None else environ))
    except ValueError as error:
        parser.error(str(error))
    if flags["print_config"]:
        sys.stdout.write(json.dumps(shown(config), indent=2) + "\n")
        parser.exit(0)
    return config


def shown(config: object) -> dict[str, Any]:
    """The configuration as JSON values, secrets masked, passwords of URLs too; for `--print-config` and the log."""
    result: dict[str, Any] = {}
    for field in fields_of(type(config)):
        value = getattr(config, field.name)
        if field.bounds.secret and value is not None:
            value = MASK
        elif isinstance(value, str):
            value = _PASSWORD_IN_QUERY.sub(rf"\1{MASK}", _PASSWORD_IN_URL.sub(rf"\1{MASK}@", value))
        result[field.name] = str(value) if isinstance(value, Path) else value
    return result


def _parser(
    cls: type[Any], fields: list[Field], prog: str | None, examples: Sequence[str]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=cls.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in fields:
        if not field.bounds.secret:
            action: Any = argparse.BooleanOptionalAction if field.kind is bool else "store"
            parser.add_argument(field.flag, dest=field.name, action=action, default=None, help=_help(field))
    parser.add_argument(
        "--config-file",
        help=f"JSON file as --print-config prints it; flags and variables go before it ({_FILE_VARIABLE})",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the configuration as JSON and exit"
    )
    secrets = [f"  {field.variable}: {field.help}" for field in fields if field.bounds.secret]
    epilog = ["from the environment or the file only:", *secrets] if secrets else []
    epilog += ["examples:", *(f"  {parser.prog} {one}" for one in examples)] if examples else []
    parser.epilog = "\n".join(epilog)
    return parser


def _help(field: Field) -> str:
    choices = f" One of {', '.join(field.choices)}." if field.choices else ""
    default = "required" if field.required else f"default: {field.default}"
    return f"{field.help}{choices} ({default}; {field.variable})".replace("%", "%%")


def _values(fields: list[Field], flags: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """The values that were given; the rest is left to the dataclass's defaults."""
    path = flags["config_file"]
    if path is None:
        path = environ.get(_FILE_VARIABLE, "")
    file = read_config_file(Path(path), fields) if path else {}
    values: dict[str, Any] = {}
    for field in fields:
        flag = flags.get(field.name)
        if isinstance(flag, bool):
            values[field.name] = flag
        elif flag is not None:
            values[field.name] = field.parse(flag, field.flag)
        elif field.variable in environ:
            values[field.name] = field.parse(environ[field.variable], field.variable)
        elif field.name in file:
            values[field.name] = _of_file(field, file[field.name], path)
        elif field.required:
            raise ValueError(
                f"{field.variable if field.bounds.secret else field.flag} is required: {field.help}"
            )
    return values


def _of_file(field: Field, text: str, path: str) -> Any:
    if masked(text):
        raise ValueError(f"{path}: {field.name}: {MASK} stands for a secret that was not printed; give it")
    return field.parse(text, f"{path}: {field.name}")
