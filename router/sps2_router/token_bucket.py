"""Tokens per minute: what may be used now, and when more may be. Pure: time is an argument, in seconds."""

MINUTE_S = 60.0


class TokenBucket:
    """Fills at its rate up to what a minute brings; is full at first.

    A request of more than it can hold is let in when it is full, and leaves it in debt, so that the rate holds over
    time and no request is refused forever.
    """

    def __init__(self) -> None:
        self._used = 0.0
        """Tokens that are missing from a full one."""
        self._at = 0.0

    def wait_s(self, num_tokens: int, per_minute: int, now: float) -> float:
        """Seconds until so many may be taken; 0: now. `per_minute` may change from call to call."""
        self._fill(per_minute, now)
        room = per_minute - min(num_tokens, per_minute)
        return max(0.0, (self._used - room) * MINUTE_S / per_minute)

    def take(self, num_tokens: int) -> None:
        """Uses so many; negative gives them back."""
        self._used += num_tokens

    def _fill(self, per_minute: int, now: float) -> None:
        self._used = max(0.0, self._used - (now - self._at) * per_minute / MINUTE_S)
        self._at = now
