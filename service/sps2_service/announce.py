"""How a service tells the process that started it where it listens: one line on an inherited descriptor.

With port 0 the kernel picks a free port, so there is no gap in which another process could take it.
"""

import os


def announce(fd: int | None, address: str) -> None:
    """Writes "HOST:PORT" and a newline to `fd` and closes it; does nothing when `fd` is None.

    A starter that has gone away meanwhile is no reason to fail: the service serves all the same.
    """
    if fd is None:
        return
    try:
        os.write(fd, f"{address}\n".encode())
    except BrokenPipeError:
        pass
    finally:
        os.close(fd)
