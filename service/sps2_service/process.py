"""What a service process owes its parent: it never outlives it. Linux only.

`python -m sps2_service.process PARENT_PID COMMAND...` becomes COMMAND and dies with its parent, also while it
is stopped: for starting children from a process with threads, where nothing may run between fork and exec.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


class ParentGoneError(RuntimeError):
    """The process that started this one has already ended."""


def die_with_parent(signum: int = signal.SIGTERM, parent_pid: int | None = None) -> None:
    """Asks the kernel to send `signum` to this process when its parent ends, also by SIGKILL.

    Called first thing in `main`. The parent here is the *thread* that forked this process: a starter forks
    from its main thread, or from another that lives as long as it does. Children of this process do not
    inherit the setting.

    Args:
        signum: SIGTERM to drain first, SIGKILL for what must go at once.
        parent_pid: Who should be the parent, as passed down by it. Without it, a parent that died before this
            call is recognised only by its orphan having gone to init.

    Raises:
        ParentGoneError: the parent ended before the kernel was asked, so no signal would ever come.
        OSError: the kernel refused.
    """
    if not sys.platform.startswith("linux"):
        raise OSError("parent-death signals exist on Linux only")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    # Asked after prctl: a parent that dies from here on is reported by the signal.
    check_parent(parent_pid)


def check_parent(parent_pid: int | None = None) -> None:
    """Raises ParentGoneError unless the parent is `parent_pid`, or, without it, anybody but init."""
    actual = os.getppid()
    if actual != parent_pid if parent_pid is not None else actual == 1:
        raise ParentGoneError(f"the parent process {parent_pid or ''} is gone (adopted by {actual})")


def tied_command(command: list[str]) -> list[str]:
    """The same command, as a child of this process that SIGKILL takes with it."""
    return [sys.executable, "-P", "-m", "sps2_service.process", str(os.getpid()), *command]


def main() -> None:
    """Ties this process to its parent and becomes the command."""
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    try:
        die_with_parent(signal.SIGKILL, parent_pid)
    except ParentGoneError as error:
        raise SystemExit(str(error)) from error
    os.execv(command[0], command)  # noqa: S606 - the caller's own command, no shell


if __name__ == "__main__":
    main()
