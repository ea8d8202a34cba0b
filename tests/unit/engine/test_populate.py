"""An arena gets its pages while others write to it, and keeps what they wrote."""

import mmap
import os

import torch

from sps2_engine.runtime.populate import populate_in_background
from support.memory import memory


def test_pages_are_there_and_untouched() -> None:
    arena = torch.frombuffer(mmap.mmap(-1, 64 << 20), dtype=torch.uint8).view(2, 32 << 20)  # pages nobody had
    before = memory(os.getpid(), "VmRSS")
    arena[0, ::1000] = 7
    thread = populate_in_background([arena[0], arena[1][5:]])
    arena[1, ::1000] = 9
    thread.join(60)
    assert not thread.is_alive()
    assert memory(os.getpid(), "VmRSS") - before > 48 << 20
    assert arena[0, ::1000].eq(7).all()
    assert arena[1, ::1000].eq(9).all()
