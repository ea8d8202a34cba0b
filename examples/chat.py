"""Holds a conversation of two turns through the model's own chat template."""

import os
import sys

from sps2_client import ChatMessage, Client, FailedPrecondition

SERVER = os.environ.get("SPS2_SERVER", "127.0.0.1:50051")
QUESTIONS = ("What is the capital of France?", "And of Spain?")


def main() -> int:
    """0; also for a model that was not made for conversations."""
    messages: list[ChatMessage] = [{"role": "system", "content": "Answer in one sentence."}]
    with Client(SERVER) as client:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            try:
                answer = client.generate(messages=messages, max_tokens=32)
            except FailedPrecondition as error:
                sys.stdout.write(f"no conversation with this model: {error.message}\n")
                return 0
            messages.append({"role": "assistant", "content": answer.text})
            sys.stdout.write(f"{question}\n  {answer.text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
