"""A decode engine whose rank is fenced says no to new rows, and holds them all the same until they are released."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sps2.internal.v1 import engine_pb2
from sps2.internal.v1.placement_pb2 import Attempt
from sps2_decode_worker.loop import DecodeRole
from sps2_engine.mesh import WHOLE_MODEL


class Link:
    """Keeps what the engine reports."""

    def __init__(self) -> None:
        self.events: list[engine_pb2.EngineEvent] = []

    def send(self, event: engine_pb2.EngineEvent) -> None:
        self.events.append(event)


class Receiver:
    """Counts the reservations that it takes up."""

    num_reserved = 0

    def hold(self, *_: object) -> list[int]:
        return []

    def reserve(self, *_: object) -> list[object]:
        self.num_reserved += 1
        return []


@pytest.mark.parametrize(
    ("told", "answer"),
    [(None, "attempt_failed"), (-0.001, "attempt_failed"), (60.0, "rows_reserved")],
    ids=["never told", "over", "held"],
)
def test_new_rows_need_a_lease(told: float | None, answer: str) -> None:
    link, receiver = Link(), Receiver()
    options: Any = SimpleNamespace(name="decode-0/1", share=WHOLE_MODEL)
    role = DecodeRole(options, torch.device("cpu"), torch.float32, link)  # type: ignore[arg-type]
    role._receiver = receiver  # type: ignore[assignment]
    if told is not None:
        hold = engine_pb2.HoldLease(holds_until_s=time.monotonic() + told)
        role.notice(engine_pb2.EngineCommand(hold_lease=hold))
    reserve = engine_pb2.ReserveRow(row=5, attempt=Attempt(request_id="r", number=1))
    role.execute(engine_pb2.EngineCommand(step_plan=engine_pb2.StepPlan(reserve=[reserve])))
    (event,) = link.events
    assert (event.WhichOneof("event"), receiver.num_reserved) == (answer, 1)
    if answer == "attempt_failed":
        assert (event.attempt_failed.reason, event.attempt_failed.row) == ("FENCED", 5)
        assert "decode-0/1" in event.attempt_failed.message
