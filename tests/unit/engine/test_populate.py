"""An arena gets its pages while others write to it, and keeps what they wrote."""

import os

import torch

from sps2_engine.runtime.populate import populate_in_background
from support.memory import memory


def test_pages_are_there_and_untouched() -> None:
    before = memory(os.getpid(), "VmRSS")
    arena = torch.empty(2, 16 << 20, dtype=torch.uint8)
    arena[0, ::1000] = 7
    thread = populate_in_background([arena[0], arena[1][5:]])
    arena[1, ::1000] = 9
    thread.join(60)
    assert not thread.is_alive()
    assert memory(os.getpid(), "VmRSS") - before > 28 << 20
    assert arena[0, ::1000].eq(7).all()
    assert arena[1, ::1000].eq(9).all()
