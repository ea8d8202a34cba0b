"""How fast a deployment works, from two looks at its counters. Pure: knows neither clock nor network."""

from typing import Any

RATES = ("steps_per_s", "posted_bytes_per_s")
"""Steps (decode) or layer slices (prefill), and bytes of tensors sent to other ranks, each second."""


def with_rates(before: dict[str, Any] | None, now: dict[str, Any], passed_s: float) -> dict[str, Any]:
    """A document of `status_document` with the rates of each rank since another one, `passed_s` seconds before.

    Rates are 0 without another look, and for a rank that has started anew in between: its counters have too.
    """
    known = {} if before is None else _ranks(before)
    pools = {
        role: [
            {
                **group,
                "ranks": [_rated(known.get(rank["worker_id"]), rank, passed_s) for rank in group["ranks"]],
            }
            for group in groups
        ]
        for role, groups in now["pools"].items()
    }
    return {**now, "pools": pools}


def _ranks(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups = (group for pool in document["pools"].values() for group in pool)
    return {rank["worker_id"]: rank for group in groups for rank in group["ranks"]}


def _rated(before: dict[str, Any] | None, now: dict[str, Any], passed_s: float) -> dict[str, Any]:
    rates = dict.fromkeys(RATES, 0.0)
    if before is not None and passed_s > 0:
        gained = [later - earlier for earlier, later in zip(_counts(before), _counts(now), strict=True)]
        if min(gained) >= 0:
            rates = {name: one / passed_s for name, one in zip(RATES, gained, strict=True)}
    return now | rates


def _counts(rank: dict[str, Any]) -> tuple[float, float]:
    return rank["steps_done"], sum(rank["bytes_posted"].values())
