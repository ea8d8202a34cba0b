"""Runs a command that ends, by SIGKILL, when the process that started it ends.

child.py PARENT_PID [--cpus N,N...] COMMAND... ; with --cpus it and all that it starts run on these cores alone.

A tiny program of its own, in place of a `preexec_fn`: code between fork and exec is unsafe in a process that
has threads (gRPC's), and redis-server cannot be asked to do this itself. Executed by its path, with an
isolated interpreter, so it imports nothing of ours.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
CPUS_FLAG = "--cpus"
EXIT_CANNOT_RUN = 127


def main(arguments: list[str]) -> int:
    """Ties this process to its parent, then becomes the command; returns only when that fails."""
    parent_pid, command = int(arguments[0]), arguments[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.stderr.write(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}\n")
        return EXIT_CANNOT_RUN
    # Asked after prctl: a parent that ended before it will never be reported.
    if os.getppid() != parent_pid:
        return EXIT_CANNOT_RUN
    try:
        if command[0] == CPUS_FLAG:
            os.sched_setaffinity(0, [int(cpu) for cpu in command[1].split(",")])
            command = command[2:]
        os.execvp(command[0], command)  # noqa: S606 - replacing this process is the point
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error.strerror}\n")
    return EXIT_CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
