"""One routing policy per file behind `base.Policy`; which one runs is a flag of the router."""

from collections.abc import Callable, Mapping

from sps2_router.policies.base import Policy
from sps2_router.policies.least_loaded import LeastLoaded
from sps2_router.policies.prefix_aware import PrefixAware
from sps2_router.policies.round_robin import RoundRobin

POLICIES: Mapping[str, Callable[[], Policy]] = {
    "prefix_aware": PrefixAware,
    "least_loaded": LeastLoaded,
    "round_robin": RoundRobin,
}
"""By the name that the flag gives them."""
