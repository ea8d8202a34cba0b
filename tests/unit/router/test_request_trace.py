"""The phases of an attempt: without gaps, as far as it has come."""

import pytest

from sps2_router.handshake import Handshake, Phase
from sps2_router.request_trace import Part, parts


@pytest.mark.parametrize(
    ("handshake", "expected"),
    [
        (None, [("queue", 1, 9)]),
        (Handshake(5), [("queue", 1, 9)]),
        (Handshake(5, phase=Phase.PREFILLING, prefill_started_at=3), [("queue", 1, 3), ("prefill", 3, 9)]),
        (
            Handshake(5, phase=Phase.TRANSFERRING, prefill_started_at=3, first_token_at=4),
            [("queue", 1, 3), ("prefill", 3, 4), ("transfer", 4, 9)],
        ),
        (
            Handshake(5, phase=Phase.FINISHED, prefill_started_at=3, first_token_at=4),
            [("queue", 1, 3), ("prefill", 3, 9)],
        ),
        (
            Handshake(5, phase=Phase.COMMITTED, prefill_started_at=3, first_token_at=4, committed_at=6),
            [("queue", 1, 3), ("prefill", 3, 4), ("transfer", 4, 6), ("decode", 6, 9)],
        ),
    ],
)
def test_phases_meet(handshake: Handshake | None, expected: list[tuple[str, float, float]]) -> None:
    assert parts(1, handshake, 9) == [Part(*part) for part in expected]
