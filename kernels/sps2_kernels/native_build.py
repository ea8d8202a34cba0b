"""Compiles a C source when it is first needed, by the machine's C compiler, and loads it.

What is compiled is kept in `$XDG_CACHE_HOME/sps2/native` (`~/.cache`) under a name that tells all it depends on, so
that the ranks of a host compile once. A folder that others may write to is not used.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-fopenmp", "-Wno-psabi")
WIDE_VECTORS = "-mprefer-vector-width=512"
"""For x86, where gcc else takes half of a register."""
LANES = 16
"""Floats of a vector: what sizes must be multiples of."""
COMPILE_TIMEOUT_S = 120.0

_log = logging.getLogger(__name__)


def load_native(source: Path, sizes: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library of a source; None, with a line in the log, where it cannot be compiled or loaded.

    Args:
        source: the file.
        sizes: what the compiler is told besides, as in "-DHEAD_DIM=64".
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = _command(source, sizes)
            kept = _kept(source, command)
            if kept is not None and (library := _loaded(kept)) is not None:
                return library
            linked = _build(command, Path(folder))
            library = ctypes.CDLL(str(linked))
            if kept is not None:
                _keep(linked, kept)
            return library
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s is not compiled, what torch has does its work: %s", source.name, error)
        return None


def _loaded(kept: Path) -> ctypes.CDLL | None:
    """What was kept; None where nothing was, or what was is broken: then it is compiled and kept again."""
    try:
        return ctypes.CDLL(str(kept))
    except OSError as error:
        _log.debug("%s: %s", kept.name, error)
        return None


def _command(source: Path, sizes: Sequence[str]) -> list[str]:
    """Compiles; the output is to be named behind it.

    Raises:
        FileNotFoundError: there is no compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (gcc)")
    wide = (WIDE_VECTORS,) if os.uname().machine == "x86_64" else ()
    return [compiler, *FLAGS, *wide, *sizes, "-c", str(source), "-o"]


def _build(command: Sequence[str], folder: Path) -> Path:
    """A library in a folder.

    Raises:
        OSError: the compiler does not start.
        SubprocessError: it failed, with what it said.
    """
    made, linked = folder / "made.o", folder / "linked.so"
    # Linked without -fopenmp: its symbols are found in the OpenMP that torch has loaded. A second one would have a
    # second set of threads, and the two would wait for the same cores.
    for one in ([*command, str(made)], [command[0], "-shared", str(made), "-o", str(linked), "-lm"]):
        done = subprocess.run(one, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        if done.returncode:
            raise subprocess.SubprocessError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return linked


def _kept(source: Path, command: Sequence[str]) -> Path | None:
    """Where the library is kept; None where there is no folder that is the user's alone."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sps2" / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError):  # it has no home
        return None
    if state.st_uid != os.geteuid() or state.st_mode & 0o022:
        return None
    told = hashlib.sha256(repr(command).encode() + source.read_bytes() + _machine(command[0]))
    return folder / f"{source.stem}-{told.hexdigest()[:32]}.so"


def _machine(compiler: str) -> bytes:
    """What "native" and the compiler's name stand for."""
    with contextlib.suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
        lines = [line for line in cpu.splitlines() if line.startswith(("model", "flags", "Features", "CPU"))]
        state = Path(compiler).stat()
        return repr((lines, state.st_size, state.st_mtime_ns)).encode()
    return b""


def _keep(linked: Path, kept: Path) -> None:
    """Ranks that compile at the same time each put a whole file there."""
    own = kept.with_suffix(f".{os.getpid()}")
    try:
        shutil.copyfile(linked, own)
        own.replace(kept)
    except OSError as error:
        own.unlink(missing_ok=True)
        _log.info("%s is not kept: %s", kept.name, error)
