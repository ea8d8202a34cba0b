import pytest
import typer

from sps2_bench.options import parse_counts, parse_names, parse_settings


def test_counts_take_suffixes() -> None:
    assert parse_counts("512, 2k,1M") == (512, 2048, 1024 * 1024)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "k", "2kk", "1,,2", "²"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_counts(text)


def test_names_are_known_and_once() -> None:
    assert parse_names("b,a,b", ("a", "b")) == ("b", "a")
    with pytest.raises(typer.BadParameter, match="'c' is none of a, b"):
        parse_names("a,c", ("a", "b"))


def test_settings_change_defaults() -> None:
    defaults = {"hidden": 512, "layers": 8}
    assert parse_settings("layers=4,hidden=1k", defaults) == {"hidden": 1024, "layers": 4}
    assert defaults["layers"] == 8
    for text in ("layers", "layers=", "depth=3", "layers=x"):
        with pytest.raises(typer.BadParameter):
            parse_settings(text, defaults)
