"""A pytest plugin: imports triton for its interpreter, before anything else can import it without.

Triton reads TRITON_INTERPRET when a kernel is declared, and declares its own library when it is imported: whoever
comes first (transformers does, through torch's compiler) decides for the process. The variable is set for that moment
only, since the ranks that tests start must not inherit it.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager


def has_triton() -> bool:
    """Whether triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


@contextmanager
def interpreting() -> Iterator[None]:
    """Kernels that are declared within run in triton's interpreter."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if has_triton():
    with interpreting():
        importlib.import_module("triton.language")
