"""docs/metrics.md names what the services export, with types and labels, and nothing else."""

import re
from pathlib import Path

import pytest

from sps2_decode_worker.metrics import STEP_BUCKETS
from sps2_kv_directory.metrics import RPC_BUCKETS
from sps2_router.metrics import LONG_BUCKETS, SHORT_BUCKETS
from support.metrics import SERVICES, Declared, declared

HEADINGS = {
    "router": "Router",
    "directory": "Directory",
    "prefill": "Prefill ranks",
    "decode": "Decode ranks",
}
ROW = re.compile(r"\| `(sps2_\w+)` \| (\w+) \|([^|]*)\| [^|]+ \| [^|]+ \|")


@pytest.fixture(scope="module")
def document(repo_root: Path) -> str:
    return (repo_root / "docs" / "metrics.md").read_text()


def documented(document: str, heading: str) -> dict[str, Declared]:
    """The rows of a section's table."""
    section = re.split(r"^## ", document, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{heading}\n"))
    return {
        name: Declared(kind, tuple(sorted(filter(None, re.split(r",\s*", labels.strip())))))
        for name, kind, labels in ROW.findall(text)
    }


@pytest.mark.parametrize("service", SERVICES)
async def test_what_is_documented_is_exported(service: str, document: str) -> None:
    exported = await declared(service)
    build = exported.pop("sps2_build_info")
    identity = ("group", "rank") if service in {"prefill", "decode"} else ()
    assert build == Declared("gauge", (*identity, "service", "version"))
    assert exported == documented(document, HEADINGS[service])


@pytest.mark.parametrize("bounds", [SHORT_BUCKETS, LONG_BUCKETS, STEP_BUCKETS, RPC_BUCKETS])
def test_bounds_of_buckets(bounds: tuple[float, ...], document: str) -> None:
    assert f"| {', '.join(f'{bound:g}' for bound in bounds)} |" in document
