"""Names of spans: documented, and none of them one that log lines may not have."""

from pathlib import Path

from sps2_service import span_names
from sps2_service.telemetry import FORBIDDEN_FIELDS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tracing.md"
NAMES = {name: value for name, value in vars(span_names).items() if name.isupper()}


def test_every_name_is_documented_once() -> None:
    page = PAGE.read_text()
    assert len(set(NAMES.values())) == len(NAMES)
    assert [value for value in NAMES.values() if value not in page] == []


def test_no_name_is_of_what_users_write() -> None:
    assert not {value.rpartition(".")[2] for value in NAMES.values()} & FORBIDDEN_FIELDS
