"""This process's memory as the kernel counts it."""

import ctypes
import re
from pathlib import Path

RESET_PEAK = "5"
"""What proc(5) has for /proc/PID/clear_refs."""


def forget_peak() -> None:
    """Gives freed memory back and starts the peak anew, so that an earlier, longer prompt is not counted."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")


def rss() -> int:
    """Resident bytes now."""
    return _status("VmRSS")


def peak_rss() -> int:
    """Most resident bytes since the peak was forgotten."""
    return _status("VmHWM")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None, name
    return int(found[1]) * 1024
