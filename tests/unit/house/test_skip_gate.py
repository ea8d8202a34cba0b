"""The skip gate, run as pytest itself would run it."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.skip_gate import AllowedSkip, load_allowed

ENTRY = '[[skip]]\ntests = "{tests}"\nreason = "{reason}"\nwhy = "{why}"\n'


def run_pytest(folder: Path, body: str, skips: str, ci: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_one.py").write_text(body)
    (folder / "skips.toml").write_text(skips)
    (folder / "conftest.py").write_text(
        "from pathlib import Path\nimport support.skip_gate as gate\n"
        "gate.SKIPS_FILE = Path(__file__).with_name('skips.toml')\npytest_plugins = ['support.skip_gate']\n"
    )
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {Path(__file__).parents[2]}\n")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=50, check=False, env={"CI": ci}, cwd=folder
    )


SKIPPING = (
    "import pytest\n@pytest.mark.skip(reason='needs the moon')\ndef test_it(): pass\ndef test_b(): pass\n"
)
WHOLE_MODULE = "import pytest\npytest.skip('needs the moon', allow_module_level=True)\n"
INSIDE = "import pytest\ndef test_it(): pytest.skip('needs the moon')\ndef test_b(): pass\n"
XFAIL = "import pytest\n@pytest.mark.xfail\ndef test_it(): assert False\n"
LISTED = ENTRY.format(tests="test_one", reason="^needs the moon$", why="no moon in CI")


@pytest.mark.parametrize(
    ("body", "skips", "ci", "code"),
    [
        (SKIPPING, "", "true", 1),
        (INSIDE, "", "true", 1),
        (SKIPPING, LISTED, "true", 0),
        (INSIDE, LISTED, "true", 0),
        (SKIPPING, "", "", 0),
        (XFAIL, "", "true", 0),
    ],
)
def test_exit_code(tmp_path: Path, body: str, skips: str, ci: str, code: int) -> None:
    run = run_pytest(tmp_path, body, skips, ci)
    assert run.returncode == code, run.stdout + run.stderr
    assert ("skip not listed" in run.stdout) == (body != XFAIL and skips == "")


def test_a_module_that_skips_itself_is_counted(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, WHOLE_MODULE, "", "true")
    assert run.returncode != 0
    assert "FAILED: skip not listed in tests/skips.toml" in run.stdout


def test_an_entry_must_explain_itself(tmp_path: Path) -> None:
    path = tmp_path / "skips.toml"
    path.write_text(ENTRY.format(tests="a", reason="b", why=""))
    with pytest.raises(ValueError, match="entry 1 needs exactly"):
        load_allowed(path)


def test_an_entry_covers_its_tests_and_reason_only(tmp_path: Path) -> None:
    path = tmp_path / "skips.toml"
    path.write_text(ENTRY.format(tests="::test_gpu", reason="^needs a GPU$", why="none there"))
    (entry,) = load_allowed(path)
    assert isinstance(entry, AllowedSkip)
    assert entry.covers("tests/x.py::test_gpu[1]", "needs a GPU")
    assert not entry.covers("tests/x.py::test_cpu", "needs a GPU")
    assert not entry.covers("tests/x.py::test_gpu", "needs a GPU and luck")
