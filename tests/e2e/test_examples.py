"""The examples do what they say, against a whole deployment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.deployment import LocalDeployment

pytestmark = pytest.mark.e2e

EXAMPLES = {
    "stream.py": r"tokens, first after",
    "chat.py": "no conversation with this model",
    "many_at_once.py": "The mountain",
    "watch_and_cancel.py": "cancelled after",
}


def test_no_example_is_left_out(repo_root: Path) -> None:
    assert {path.name for path in (repo_root / "examples").glob("*.py")} == EXAMPLES.keys()
    page = (repo_root / "examples" / "README.md").read_text()
    assert all(f"`{name}`" in page for name in EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(demo: LocalDeployment, repo_root: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", repo_root / "examples" / name],
        env={**os.environ, "SPS2_SERVER": demo.address},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert EXAMPLES[name] in done.stdout
