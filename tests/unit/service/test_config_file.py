"""The configuration file, and all four services' configurations from flags, environment and file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sps2_service.config import ServiceConfig, load_config, setting, shown
from sps2_service.config_fields import fields_of
from support.rank_commands import CONFIGS

RANK = {"group": "g", "rank": 1, "group_size": 2, "model": "m", "directory": "d:1", "leader": "l:1"}
REQUIRED: dict[str, dict[str, Any]] = {
    "sps2_router": {"model": "m", "directory": "d:1"},
    "sps2_kv_directory": {},
    "sps2_prefill_worker": RANK,
    "sps2_decode_worker": RANK,
}
"""What each service must be told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ServiceConfig):
    """A service for tests."""

    model: Path = setting()
    """Folder of the model."""
    max_queued_tokens: int = setting(1000, minimum=1)
    """Tokens that may wait."""
    ratio: float = 0.5
    """A share."""
    peers: tuple[str, ...] = ()
    """Other replicas."""
    token: str | None = setting(None, secret=True)
    """Bearer token."""


def load(content: object, tmp_path: Path, *flags: str, **environ: str) -> Config:
    file = tmp_path / "config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_config(Config, ["--config-file", str(file), *flags], environ)


def printed(
    cls: type[ServiceConfig], flags: list[str], capsys: pytest.CaptureFixture[str], **environ: str
) -> str:
    with pytest.raises(SystemExit) as caught:
        load_config(cls, [*flags, "--print-config"], environ)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    content = {"model": "file", "max_queued_tokens": 1, "ratio": 0.1, "peers": ["a:1", "b:2"], "token": "t"}
    config = load(content, tmp_path, "--model", "flag", SPS2_MODEL="env", SPS2_MAX_QUEUED_TOKENS="2")
    assert (config.model, config.max_queued_tokens, config.ratio) == (Path("flag"), 2, 0.1)
    assert (config.peers, config.token) == (("a:1", "b:2"), "t")


def test_the_file_is_named_by_flag_or_variable(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(json.dumps({"model": name}))
    environ = {"SPS2_CONFIG_FILE": str(tmp_path / "one")}
    assert load_config(Config, [], environ).model == Path("one")
    assert load_config(Config, ["--config-file", str(tmp_path / "two")], environ).model == Path("two")
    assert load_config(Config, ["--config-file", "", "--model", "m"], environ).model == Path("m")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": "m", "max_queued": 1}, "max_queued: there is no such setting"),
        ({"model": "m", "max_queued_tokens": 0}, "max_queued_tokens '0': must be at least 1"),
        ({"model": "m", "max_queued_tokens": 1.5}, "max_queued_tokens '1.5': must be a whole number"),
        ({"model": "m", "reflection": 1.0}, "reflection '1.0': must be true or false"),
        ({"model": "m", "ratio": None}, "ratio: must be a text, a number, true or false, or a list of texts"),
        ({"model": "m", "peers": [1]}, "peers: must be a text, a number, true or false, or a list of texts"),
        ({"model": "m", "token": "***"}, "token: *** stands for a secret that was not printed; give it"),
        ('{"model": "m", "model": "n"}', "model: given twice"),
        ('{"model": "m", "ratio": NaN}', "ratio 'nan': must be a finite number"),
        ("model: m", "Expecting value: line 1 column 1 (char 0)"),
        ("[]", "not a JSON object"),
    ],
)
def test_what_is_wrong_is_named(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load(content, tmp_path)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"config.json: {message}")


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(Config, [], {"SPS2_CONFIG_FILE": str(tmp_path / "none")})
    assert capsys.readouterr().err.endswith("none: No such file or directory\n")


@pytest.mark.parametrize("service", CONFIGS)
def test_every_service_reads_what_it_printed(
    service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each field not at its default where that can be; secrets are masked, and come from the environment again."""
    cls, file = CONFIGS[service], tmp_path / "config.json"
    secrets = {field.variable: "hunter2" for field in fields_of(cls) if field.bounds.secret}
    given = REQUIRED[service] | {"log_level": "debug", "drain_s": 1, "reflection": True, "listen": "h:1"}
    file.write_text(json.dumps(given))
    named = ["--config-file", str(file)]
    first = load_config(cls, named, secrets)
    text = printed(cls, named, capsys, **secrets)
    assert "hunter2" not in text
    assert json.loads(text).keys() == {field.name for field in fields_of(cls)}
    assert json.loads(text).items() >= given.items()
    file.write_text(text)
    assert load_config(cls, named, secrets) == first
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.listen = "h:2"  # type: ignore[misc]


@pytest.mark.parametrize("service", CONFIGS)
def test_every_service_has_the_same_order_and_refuses_by_name(
    service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cls, file = CONFIGS[service], tmp_path / "config.json"
    file.write_text(json.dumps(REQUIRED[service] | {"drain_s": 1, "grace_s": 1, "health_port": 1}))
    named = ["--config-file", str(file)]
    config = load_config(cls, [*named, "--drain-s", "3"], {"SPS2_DRAIN_S": "2", "SPS2_GRACE_S": "2"})
    assert (config.drain_s, config.grace_s, config.health_port) == (3, 2, 1)
    file.write_text(json.dumps(REQUIRED[service] | {"drian_s": 1}))
    with pytest.raises(SystemExit):
        load_config(cls, named, {})
    assert capsys.readouterr().err.endswith(f"{file}: drian_s: there is no such setting\n")


def test_a_hash_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", "m", "--directory", "d:1", "--model-hash", "0A"]
    with pytest.raises(SystemExit):
        load_config(CONFIGS["sps2_router"], given, {})
    assert capsys.readouterr().err.endswith("--model-hash '0A' is not 64 hexadecimal digits in lower case\n")


@pytest.mark.parametrize(
    ("service", "field"),
    [
        (service, field.name)
        for service, cls in CONFIGS.items()
        for field in fields_of(cls)
        if field.name in {"directory", "leader", "advertise", "listen"}
    ],
)
def test_addresses_are_checked_at_the_start(
    service: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {f"SPS2_{key.upper()}": str(value) for key, value in REQUIRED[service].items()}
    with pytest.raises(SystemExit):
        load_config(CONFIGS[service], [f"--{field}", "elsewhere"], environ)
    assert capsys.readouterr().err.endswith(f"--{field} 'elsewhere' is not HOST:PORT\n")


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:hunter2@h:1/0",
        "redis://:hunter2@h",
        "redis://u:hunt@er2@h",
        "redis://h/0?password=hunter2&db=1",
    ],
)
def test_passwords_of_urls_are_masked_and_a_mask_is_no_password(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cls, file = CONFIGS["sps2_kv_directory"], tmp_path / "config.json"
    text = json.dumps(shown(load_config(cls, ["--redis", url], {})))
    assert "hun" not in text
    assert "***" in text
    file.write_text(text)
    with pytest.raises(SystemExit):
        load_config(cls, ["--config-file", str(file)], {})
    assert f"{file}: redis: *** stands for a secret" in capsys.readouterr().err
    again = load_config(cls, ["--config-file", str(file)], {"SPS2_REDIS": url})
    assert again == load_config(cls, ["--redis", url], {})
