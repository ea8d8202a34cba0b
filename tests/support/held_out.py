"""Prose that the demo model has never seen."""

import subprocess
import sys
from pathlib import Path

import pytest

# Its trainer knows which spans of the books those are; it runs by itself, since tests do not import scripts.
HELD_OUT = """
import sys
from pathlib import Path
from scripts.demo_model.text import Corpus
Path(sys.argv[2]).write_text("\\n\\n".join(Corpus.load(Path(sys.argv[1])).held_out), encoding="utf-8")
"""


def write_held_out(repo_root: Path, folder: Path) -> Path:
    """The file in that folder with it. Skips the test where the books are absent."""
    books = repo_root.parent / "shared" / "data" / "text"
    if not books.is_dir():
        pytest.skip("the demo model's books are absent")
    text = folder / "held_out.txt"
    subprocess.run([sys.executable, "-c", HELD_OUT, books, text], cwd=repo_root, check=True, timeout=60)
    return text
