"""Configuration from flags, environment and file."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from sps2_service.config import ServiceConfig, load_config, setting, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ServiceConfig):
    """A service for tests."""

    model: Path = setting()
    """Folder of the model,
    which may be anywhere."""
    max_queued_tokens: int = setting(1000, minimum=1, maximum=10**9)
    """Tokens that may wait; 100% of them."""
    ratio: float = setting(0.5, minimum=0, maximum=1)
    """A share."""
    policy: Literal["fifo", "sjf"] = "fifo"
    """Order of the queue."""
    warm: bool = True
    """Warm up first."""
    peers: tuple[str, ...] = ()
    """Other replicas."""
    tls_key: Path | None = None
    """Private key."""
    token: str | None = setting(None, secret=True)
    """Bearer token."""

    def __post_init__(self) -> None:
        if self.policy == "sjf" and not self.warm:
            raise ValueError("--policy sjf needs --warm")


def load(*flags: str, **environ: str) -> Config:
    return load_config(Config, flags, environ, prog="python -m test", examples=["--model models/demo"])


def refused(capsys: pytest.CaptureFixture[str], *flags: str, **environ: str) -> str:
    with pytest.raises(SystemExit) as caught:
        load(*flags, **environ)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_defaults() -> None:
    config = load("--model", "m")
    assert config == Config(model=Path("m"))
    assert config.listen == "127.0.0.1:0"


@pytest.mark.parametrize("given", ["9090", "host:", ":9090", "host:port", "host:65536"])
@pytest.mark.parametrize("field", ["metrics_port", "listen"])
def test_addresses(field: str, given: str) -> None:
    assert ServiceConfig(metrics_port="[::1]:0").metrics_port == "[::1]:0"
    values: dict[str, Any] = {field: given}
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} '{given}' is not HOST:PORT"):
        ServiceConfig(**values)


def test_flags_go_before_the_environment() -> None:
    environ = {"SPS2_MODEL": "env", "SPS2_RATIO": "0.25", "SPS2_WARM": "off", "SPS2_PEERS": "a:1, b:2,"}
    config = load("--model", "flag", "--max-queued-tokens", "7", **environ)
    assert (config.model, config.max_queued_tokens, config.ratio) == (Path("flag"), 7, 0.25)
    assert (config.warm, config.peers) == (False, ("a:1", "b:2"))
    assert load("--warm", **environ).warm is True
    assert load("--no-warm", SPS2_MODEL="m").warm is False


def test_an_optional_value_can_be_taken_back() -> None:
    assert load("--model", "m", "--tls-key", "k").tls_key == Path("k")
    assert load("--model", "m", "--tls-key", "", SPS2_TLS_KEY="k").tls_key is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model is required: Folder of the model, which may be anywhere."),
        (
            ["--model", "m", "--max-queued-tokens", "many"],
            "--max-queued-tokens 'many': must be a whole number",
        ),
        (["--model", "m", "--max-queued-tokens", "0"], "--max-queued-tokens '0': must be at least 1"),
        (["--model", "m", "--ratio", "1.5"], "--ratio '1.5': must be at most 1"),
        (["--model", "m", "--ratio", "nan"], "--ratio 'nan': must be a finite number"),
        (["--model", "m", "--policy", "lifo"], "--policy 'lifo': must be one of fifo, sjf"),
        (["--model", "m", "--policy", "sjf", "--no-warm"], "--policy sjf needs --warm"),
        (["--model", "m", "--unknown", "1"], "unrecognized arguments: --unknown 1"),
        (["--mod", "m"], "unrecognized arguments: --mod m"),
    ],
)
def test_wrong_flags(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert refused(capsys, *flags) == f"python -m test: error: {message}"


def test_wrong_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, SPS2_MODEL="m", SPS2_WARM="maybe").endswith(
        "SPS2_WARM 'maybe': must be true or false"
    )
    assert refused(capsys, SPS2_MODEL="m", SPS2_RATIO="").endswith("SPS2_RATIO '': must be a number")


def test_help_tells_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A service for tests." in text
    assert "Folder of the model, which may be anywhere. (required; SPS2_MODEL)" in text
    assert "Tokens that may wait; 100% of them. (default: 1000; SPS2_MAX_QUEUED_TOKENS)" in text
    assert "Order of the queue. One of fifo, sjf. (default: fifo; SPS2_POLICY)" in text
    assert "HOST:PORT to serve gRPC on; port 0 picks a free one." in text
    assert "examples: python -m test --model models/demo" in text
    assert "from the environment or the file only: SPS2_TOKEN: Bearer token." in text
    assert "--token" not in text


def test_print_config_masks_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--model", "m", "--print-config", SPS2_TOKEN="hunter2")
    assert caught.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["model"], printed["token"], printed["max_queued_tokens"]) == ("m", "***", 1000)
    assert shown(Config(model=Path("m")))["token"] is None


def test_every_common_field_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(ServiceConfig, ["--help"], {})
    text = capsys.readouterr().out
    for field in dataclasses.fields(ServiceConfig):
        assert "--" + field.name.replace("_", "-") in text
