"""Watches a request from a second client until it decodes, then cancels it: on whichever router it is."""

import asyncio
import os
import sys
import uuid

from sps2_client import AsyncClient, Cancelled

SERVER = os.environ.get("SPS2_SERVER", "127.0.0.1:50051")


async def read(client: AsyncClient, request_id: str) -> None:
    """Reads a long answer, and says how it ended."""
    try:
        await client.generate("Once upon a time", request_id=request_id, max_tokens=4000, ignore_eos=True)
    except Cancelled as error:
        sys.stdout.write(f"cancelled after {len(error.received.token_ids)} tokens\n")


async def main() -> int:
    """0; an error of one ends all."""
    request_id = f"example-{uuid.uuid4().hex}"
    async with AsyncClient(SERVER) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(read(client, request_id))
        async for progress in client.watch(request_id):
            done = f"{progress.prefill_fraction:.0%} of the prompt, {progress.num_tokens} tokens"
            sys.stdout.write(f"{progress.phase}: {done}\n")
            if progress.phase == "decoding" and progress.num_tokens >= 8:
                await client.cancel(request_id)
                break
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
