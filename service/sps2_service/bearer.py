"""Bearer tokens: which tenant a call comes from. Tokens are known by their SHA-256 alone.

The file has a line for each token, `#` begins a comment:

    TENANT  SHA256-OF-TOKEN  [operator]  [until=2030-01-31T00:00:00+00:00]

An operator may also call ClusterService and end other tenants' requests. Several lines may name one tenant, so that
tokens can be exchanged. `printf %s "$TOKEN" | sha256sum` makes the second word; tokens are to be random and long.
"""

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from sps2_service.caller import Caller, current_caller
from sps2_service.errors import PermissionDenied, Unauthenticated
from sps2_service.followed_file import FollowedFile, parse_lines
from sps2_service.interceptors import guarded

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]

EXEMPT = "/grpc.health.v1.Health/"
SCHEME = "Bearer "


@dataclass(frozen=True)
class TokenEntry:
    """One line."""

    digest: bytes
    """SHA-256 of the token."""
    caller: Caller
    """Whose it is."""
    until: datetime | None = None
    """When it ends to be valid; None: never."""


def parse_tokens(text: str) -> tuple[TokenEntry, ...]:
    """The entries of a token file.

    Raises:
        LinesError: a line is wrong.
    """
    return parse_lines(text, _entry)


def _entry(words: Sequence[str]) -> TokenEntry:
    if len(words) < 2 or not re.fullmatch(r"[0-9a-fA-F]{64}", words[1]):
        raise ValueError(
            "is not TENANT SHA256 [operator] [until=TIME]; the SHA-256 has 64 hexadecimal digits"
        )
    tenant, digest, *rest = words
    until = None
    for word in rest:
        if word.startswith("until="):
            try:
                until = datetime.fromisoformat(word.removeprefix("until="))
            except ValueError:
                raise ValueError("until= needs a time such as 2030-01-31T00:00:00+00:00") from None
            until = until if until.tzinfo else until.replace(tzinfo=UTC)
        elif word != "operator":
            raise ValueError("has a word that is neither `operator` nor `until=TIME`")
    return TokenEntry(bytes.fromhex(digest), Caller(tenant, operator="operator" in rest), until)


class Tokens:
    """The tokens of a file, which is read again whenever it has changed."""

    def __init__(self, path: Path) -> None:
        """Raises LinesError."""
        self._file = FollowedFile(path, parse_tokens)

    def caller_of(self, token: str) -> Caller:
        """Whose a token is. Takes the same time whichever entry it matches.

        Raises:
            Unauthenticated: nobody's, or no longer.
        """
        digest, found = hashlib.sha256(token.encode()).digest(), None
        for entry in self._file.value():
            if hmac.compare_digest(entry.digest, digest):
                found = entry
        if found is None:
            raise Unauthenticated("TOKEN_UNKNOWN", "the token is not known here")
        if found.until is not None and datetime.now(UTC) >= found.until:
            raise Unauthenticated("TOKEN_EXPIRED", f"the token ended on {found.until:%Y-%m-%d %H:%M %Z}")
        return found.caller


class BearerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs only
    """Lets a call in whose `authorization: Bearer TOKEN` is known, and health; sets `current_caller` for it."""

    def __init__(self, tokens: Tokens, operators_only: Sequence[str]) -> None:
        """`operators_only`: beginnings of the methods (`/sps2.v1.ClusterService/`) that only operators may call."""
        self._tokens = tokens
        self._operators_only = tuple(operators_only)

    async def intercept_service(  # type: ignore[override] # the stubs do not know that there may be no handler
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """Called by gRPC once for each call; what it raises is the call's status."""
        method, handler = handler_call_details.method, await continuation(handler_call_details)
        if handler is None or method.startswith(EXEMPT):
            return handler
        caller = self._tokens.caller_of(_token(handler_call_details.invocation_metadata))
        if method.startswith(self._operators_only) and not caller.operator:
            raise PermissionDenied("NOT_AN_OPERATOR", f"{method} is for operators")

        def enter(_: object) -> None:
            current_caller.set(caller)

        return guarded(handler, enter)


def _token(metadata: Any) -> str:
    values = [value for key, value in metadata or () if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str) or not values[0].startswith(SCHEME):
        raise Unauthenticated(
            "TOKEN_MISSING", "send one token, as metadata `authorization: Bearer TOKEN`"
        ) from None
    return values[0].removeprefix(SCHEME)
