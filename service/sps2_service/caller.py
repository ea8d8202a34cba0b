"""Who makes a call: the identity that authentication has found, for whatever serves the call.

Knows nothing about tokens; `bearer` finds identities.
"""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """An identity."""

    tenant: str = ""
    """Who is served; empty where the service asks for no tokens."""
    operator: bool = False
    """Whether it may see and change the cluster, and end requests of every tenant."""

    def may_touch(self, tenant: str) -> bool:
        """Whether a tenant's requests are its own, or its to look after."""
        return self.operator or self.tenant == tenant


ANYBODY = Caller(operator=True)
"""Every caller of a service that asks for no tokens."""

current_caller: ContextVar[Caller] = ContextVar("sps2_caller", default=ANYBODY)
"""The caller of the call that the running task serves."""
