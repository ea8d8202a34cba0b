"""Asks several prompts at once over one connection."""

import asyncio
import os
import sys

from sps2_client import AsyncClient

SERVER = os.environ.get("SPS2_SERVER", "127.0.0.1:50051")
PROMPTS = ("The sea", "The mountain", "The river", "The city")


async def main() -> int:
    """0; an error of one ends all."""
    async with AsyncClient(SERVER) as client:
        answers = await asyncio.gather(*(client.generate(one, max_tokens=8) for one in PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        sys.stdout.write(f"{prompt}{answer.text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
