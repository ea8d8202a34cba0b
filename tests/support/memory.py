"""Memory of other processes, as the kernel counts it."""

import re
from pathlib import Path

MIB = 1024 * 1024
RESET_PEAK = "5"  # proc(5), /proc/PID/clear_refs


def memory(pid: int, name: str) -> int:
    """Bytes of a line of /proc/PID/status: "VmRSS" (now) or "VmHWM" (the peak)."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None, f"process {pid} has no {name}"
    return int(found[1]) * 1024


def reset_peak(pid: int) -> None:
    """From now on the peak is that of what follows."""
    Path(f"/proc/{pid}/clear_refs").write_text(RESET_PEAK)
