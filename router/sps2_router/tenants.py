"""What each tenant may use: its share and its limits, from a file.

The file has a line for each tenant, `#` begins a comment, and every word behind the name may be left out:

    TENANT  [weight=2]  [max-queued-tokens=100000]  [max-live-requests=16]  [tokens-per-minute=600000]

The tenant `*` stands for each that has no line. Tenants are those of the tokens (`sps2_service.bearer`); where no
tokens are asked for, all callers are one tenant, which has no line of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sps2_service.followed_file import FollowedFile, LinesError, parse_lines

ANY = "*"
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0


@dataclass(frozen=True)
class TenantLimits:
    """Of one tenant, at one router."""

    weight: float = 1.0
    """Its share where tenants wait, beside those of others; see `fair_queue`."""
    max_queued_tokens: int | None = None
    """Prompt tokens that wait for their prefill; one request alone always fits."""
    max_live_requests: int | None = None
    """Requests between arrival and end."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers; as many may be used at once after a quiet minute."""


NO_LIMITS = TenantLimits()


class Tenants:
    """The limits of a file, which is read again whenever it has changed; without a file nobody has any."""

    def __init__(self, path: Path | None) -> None:
        """Raises LinesError."""
        self._file = FollowedFile(path, parse_tenants) if path else None

    def limits(self, tenant: str) -> TenantLimits:
        """Those of one."""
        if self._file is None:
            return NO_LIMITS
        entries = self._file.value()
        return entries.get(tenant) or entries.get(ANY, NO_LIMITS)

    def weight(self, tenant: str) -> float:
        """Its share."""
        return self.limits(tenant).weight


def parse_tenants(text: str) -> Mapping[str, TenantLimits]:
    """The limits by tenant.

    Raises:
        LinesError: a line is wrong, or a tenant has two.
    """
    entries: dict[str, TenantLimits] = {}
    for tenant, limits in parse_lines(text, _entry):
        if tenant in entries:
            raise LinesError(f"tenant {tenant!r} has two lines")
        entries[tenant] = limits
    return entries


def _entry(words: Sequence[str]) -> tuple[str, TenantLimits]:
    tenant, *rest = words
    given: dict[str, Any] = {}
    for word in rest:
        key, _, value = word.partition("=")
        if key not in _PARSERS or key in given:
            raise ValueError(
                f"has the word {word!r}; each of {', '.join(_PARSERS)} may be given once, as in KEY=1"
            )
        given[key] = _PARSERS[key](key, value)
    return tenant, TenantLimits(**{key.replace("-", "_"): value for key, value in given.items()})


def _whole(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{key} needs a whole number of at least 1")
    return int(value)


def _weight(key: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise ValueError(f"{key} needs a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")
    return weight


_PARSERS = {
    "weight": _weight,
    "max-queued-tokens": _whole,
    "max-live-requests": _whole,
    "tokens-per-minute": _whole,
}
