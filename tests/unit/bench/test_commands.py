"""Commands that are refused before anything is started."""

import pytest
from typer.testing import CliRunner

from sps2_bench.app import app


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "prefill", "--lengths", "no"),
        ("bench", "prefill", "--ranks", "4096"),
        ("bench", "prefill", "--profiles", "quick"),
        ("bench", "prefill", "--dtypes", "fp8"),
        ("bench", "prefill", "--random-model", "hidden=64,depth=3"),
        ("bench", "prefill", "--random-model", "heads=3,kv_heads=2"),
        ("bench", "decode", "--contexts", "no"),
        ("bench", "decode", "--ranks", "4096"),
        ("bench", "decode", "--move", "weights"),
        ("bench", "decode", "--random-model", "hidden=64,depth=3"),
        ("bench", "kernels", "--dtype", "fp8"),
        ("bench", "nothing"),
        ("eval", "accuracy", "--model", "/nowhere"),
        ("eval", "accuracy", "--shards", "12"),
        ("eval", "accuracy", "--profiles", "paper,nowhere.json"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize(
    "command", [("bench", "prefill"), ("bench", "decode"), ("bench", "kernels"), ("eval", "accuracy")]
)
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.stdout
