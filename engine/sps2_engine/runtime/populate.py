"""Has the kernel give an arena its pages before they are written to, so that no step waits for them.

A first write to a page of 2 MiB takes 0.1 to 5 ms (it is zeroed, and found for a virtual machine first): several steps
of decode. What nobody would wait for is done in a thread of the lowest priority, next to whatever the rank does.
"""

import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Sequence

from torch import Tensor

_log = logging.getLogger(__name__)

MADV_POPULATE_WRITE = 23
"""Of Linux 5.14 and newer; leaves what is in the pages as it is, so that others may write to them meanwhile."""
CHUNK_BYTES = 2 << 20


def populate_in_background(tensors: Sequence[Tensor]) -> threading.Thread:
    """Starts the thread, which ends with its work or with the process.

    Args:
        tensors: on the CPU, contiguous; they live until it has ended.
    """
    thread = threading.Thread(target=_populate, args=(list(tensors),), name="populate", daemon=True)
    thread.start()
    return thread


def _populate(tensors: list[Tensor]) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for tensor in tensors:
        begin, end = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, tensor.data_ptr() + tensor.nbytes
        for at in range(begin, end, CHUNK_BYTES):
            if madvise(at, min(CHUNK_BYTES, end - at), MADV_POPULATE_WRITE):
                reason = errno.errorcode.get(ctypes.get_errno(), "?")
                _log.info("KV pages are given as they are written to: madvise says %s", reason)
                return
