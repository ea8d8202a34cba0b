"""Streams an answer as it is made, and says what it took."""

import os
import sys

from sps2_client import Client, SPS2Error, TextDelta, Timeouts

SERVER = os.environ.get("SPS2_SERVER", "127.0.0.1:50051")


def main() -> int:
    """0, or 1 when the service has refused or failed."""
    limits = Timeouts(total=120, first_token=60, between_tokens=30)
    with Client(SERVER) as client:
        try:
            with client.stream("Once upon a time", max_tokens=16, timeout=limits) as stream:
                for event in stream:
                    if isinstance(event, TextDelta):
                        sys.stdout.write(event.text)
                        sys.stdout.flush()
        except SPS2Error as error:
            sys.stderr.write(f"{error} (after {error.received.text!r}; retry after {error.retry_after})\n")
            return 1
        answer = stream.final()
    usage = answer.usage
    sys.stdout.write(
        f"\n[{answer.finish_reason}] {usage.prompt_tokens} + {usage.output_tokens} tokens, "
        f"first after {usage.timings.ttft:.3f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
