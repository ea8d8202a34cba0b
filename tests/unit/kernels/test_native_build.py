"""What is compiled is kept for the next process, where nobody else may put anything."""

import subprocess
from pathlib import Path
from typing import Never

import pytest

from sps2_kernels.native_build import load_native
from sps2_kernels.row_ops import SOURCE


def test_compiles_once_and_again_when_what_it_depends_on_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_native(SOURCE) is not None

    def no_compiler(*_arguments: object, **_options: object) -> Never:
        raise FileNotFoundError("it was not to be asked")

    monkeypatch.setattr(subprocess, "run", no_compiler)
    assert load_native(SOURCE) is not None
    assert not caplog.records
    changed = tmp_path / SOURCE.name
    changed.write_bytes(SOURCE.read_bytes() + b"\n")
    assert load_native(changed) is None
    assert load_native(SOURCE, ["-DSIZE=1"]) is None
    assert "it was not to be asked" in caplog.text


def test_what_is_broken_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "sps2" / "native"
    kept.mkdir(parents=True, mode=0o700)
    assert load_native(SOURCE, ["-DBROKEN=1"]) is not None
    (library,) = kept.iterdir()
    whole = library.read_bytes()
    library.unlink()  # not written over: it is mapped here
    library.write_bytes(b"half")
    assert load_native(SOURCE, ["-DBROKEN=1"]) is not None
    assert library.read_bytes() == whole


@pytest.mark.parametrize("problem", ["writable by others", "not a folder"])
def test_works_without_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    folder = tmp_path / "sps2" / "native"
    folder.parent.mkdir()
    if problem == "not a folder":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_native(SOURCE) is not None
    assert folder.is_file() or not list(folder.iterdir())
