"""`python -m sps2_bench.interference.streamer`: the control, an unrelated process that reads memory without end."""

import threading
import time

import torch

from sps2_bench.processes import Message, serve

MIB = 1 << 20
PASS_ELEMENTS = 16 * MIB
"""Read between two looks for the end."""


class Streamer:
    """Answers {"on": true} at once and reads from then on; {"on": false} ends it and tells {"bytes_per_s"}."""

    def __init__(self, settings: Message) -> None:
        torch.set_num_threads(len(settings["cpus"]))
        # Written once, so that every page is there; read in order, so that no cache below this size helps.
        self._memory = torch.ones(settings["mib"] * MIB // 4)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._bytes_per_s = 0.0

    def __call__(self, message: Message) -> Message:
        """Starts or ends the reading."""
        if message["on"]:
            self._stop.clear()
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        return {"bytes_per_s": self._bytes_per_s}

    def _read(self) -> None:
        started, num_bytes = time.perf_counter(), 0
        while True:
            for begin in range(0, len(self._memory), PASS_ELEMENTS):
                part = self._memory[begin : begin + PASS_ELEMENTS]
                part.sum()
                num_bytes += part.nbytes
                if self._stop.is_set():
                    self._bytes_per_s = num_bytes / (time.perf_counter() - started)
                    return


if __name__ == "__main__":
    serve(Streamer)
