"""Compiles a C source of `native/` when it is first needed, by the machine's C compiler, and loads it.

Nothing is kept on disk: it takes a third of a second on an idle core, and a library that another user or version
left behind is never loaded.
"""

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-fopenmp", "-Wno-psabi")
WIDE_VECTORS = "-mprefer-vector-width=512"
"""For x86, where gcc else takes half of a register."""
LANES = 16
"""Floats of a vector: what sizes must be multiples of."""
COMPILE_TIMEOUT_S = 120.0

_log = logging.getLogger(__name__)


def load_native(source: str, sizes: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library of a source; None, with a line in the log, where it cannot be compiled or loaded.

    Args:
        source: name of a file in `native/`.
        sizes: what the compiler is told besides, as in "-DHEAD_DIM=64".
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _build(FOLDER / source, sizes, Path(folder))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s is not compiled, torch's operators instead: %s", source, error)
        return None


def _build(source: Path, sizes: Sequence[str], folder: Path) -> ctypes.CDLL:
    """The files may go once the library is loaded.

    Raises:
        OSError: there is no compiler, or what it made does not load.
        SubprocessError: it failed, with what it said.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (gcc)")
    wide = (WIDE_VECTORS,) if os.uname().machine == "x86_64" else ()
    made, linked = folder / "made.o", folder / "linked.so"
    # Linked without -fopenmp: its symbols are found in the OpenMP that torch has loaded. A second one would have a
    # second set of threads, and the two would wait for the same cores.
    for command in (
        [compiler, *FLAGS, *wide, *sizes, "-c", str(source), "-o", str(made)],
        [compiler, "-shared", str(made), "-o", str(linked), "-lm"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        if done.returncode:
            raise subprocess.SubprocessError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
    return ctypes.CDLL(str(linked))
