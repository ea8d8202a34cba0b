"""The committed stubs are what the generator writes from the committed protos."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(120)
def test_committed_stubs_match_the_protos(repo_root: Path) -> None:
    check = subprocess.run(
        [sys.executable, repo_root / "scripts" / "generate_protos.py", "--check"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert check.returncode == 0, check.stderr


def test_a_changed_stub_is_noticed(repo_root: Path, tmp_path: Path) -> None:
    generator = [sys.executable, str(repo_root / "scripts" / "generate_protos.py"), "--output", str(tmp_path)]
    subprocess.run(generator, check=True, timeout=50)
    stub = next((tmp_path / "sps2").rglob("*_pb2.py"))
    stub.write_text(stub.read_text() + "# edited\n")
    check = subprocess.run([*generator, "--check"], capture_output=True, text=True, timeout=50, check=False)
    assert check.returncode == 1
    assert stub.relative_to(tmp_path).as_posix() in check.stderr


def test_the_api_page_says_what_the_protos_say(repo_root: Path) -> None:
    generator = [sys.executable, str(repo_root / "scripts" / "generate_api_docs.py"), "--check"]
    check = subprocess.run(generator, capture_output=True, text=True, timeout=50, check=False)
    assert check.returncode == 0, check.stderr
