"""Short commands of the node (ip, nsenter, mount), run off the loop."""

import asyncio

TIMEOUT_S = 60.0


class CommandError(RuntimeError):
    """A command of the node failed; the message holds what it said."""


async def run(*command: str, stdin: str = "") -> None:
    """Runs a command to its end.

    Raises:
        CommandError: it failed.
        TimeoutError: it takes longer than a minute.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, _ = await process.communicate(stdin.encode())
    if process.returncode:
        raise CommandError(f"{' '.join(command)}: exit {process.returncode}\n{stdin}{output.decode()}")
