"""Whether cached KV of another group is fetched, or computed here. Pure, torch-free.

Compute is counted in FLOPs at documented rates (`costs`), transfer in bytes at a rate that the operator gives: a rank
that measured its link would have its group choose otherwise from one minute to the next.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from sps2_layout.attention import Attention
from sps2_layout.layout import Span
from sps2_prefill_worker.planning import PromptPlanner

FetchChoice: TypeAlias = Literal["auto", "always", "never"]
"""Which cached beginnings a group fetches: those that cost more to compute, all, or none."""
LATENCY_S = 0.02
"""Of a fetch, however small: two calls, and a command to each rank on either side."""
SLACK = 4
"""A fetch that takes so many times what it should is given up."""
LEAST_TIMEOUT_S = 2.0
"""The first fetch of a rank opens its staging rings, the first from a holder a connection to each of its ranks."""


@dataclass(frozen=True)
class FetchCosts:
    """How a group chooses."""

    choice: FetchChoice = "auto"
    bytes_per_s: float = 1e9
    """At which KV comes from one group to another, all ranks together."""

    def worth(self, planner: PromptPlanner, attention: Attention, tokens: Span) -> bool:
        """Whether these tokens of a prompt, whose beginning is here, come sooner than they are computed.

        What comes under a sparse mask is taken to cost its matrix products only, so that doubt means computing.
        """
        if self.choice == "auto":
            return self._transfer_s(planner, tokens) < planner.compute_s(attention, tokens)
        return self.choice == "always"

    def token_cost(self, planner: PromptPlanner) -> float:
        """What a fetched token costs in computed ones, at most 1, by their matrix products; 0 where none is fetched."""
        compute_s = planner.costs.linear_s(1, planner.rates) / planner.mesh.sp
        transfer_s = planner.costs.kv_token_bytes / self.bytes_per_s
        if self.choice == "never":
            return 0.0
        return min(1.0, transfer_s / compute_s) if compute_s else 1.0

    def timeout_s(self, planner: PromptPlanner, tokens: Span) -> float:
        """After which a fetch is given up."""
        return LEAST_TIMEOUT_S + SLACK * self._transfer_s(planner, tokens)

    def _transfer_s(self, planner: PromptPlanner, tokens: Span) -> float:
        return LATENCY_S + len(tokens) * planner.costs.kv_token_bytes / self.bytes_per_s


BY_COST = FetchCosts()
