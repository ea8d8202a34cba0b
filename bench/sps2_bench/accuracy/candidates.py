"""The profiles that are compared. Pure."""

from dataclasses import dataclass

from sps2_bench.csa import Layout, Profile, exact_layout

EXACT = "exact"
MIN_SHARDS = 8
"""The hierarchies below have levels of 2, 4 and N shards."""


@dataclass(frozen=True)
class Candidate:
    """A profile under its name."""

    name: str
    profile: Profile | None
    """None is dense attention."""

    def layout(self, num_tokens: int, num_ranks: int = 1) -> Layout:
        """Its layout of a prompt; only the shards of dense attention depend on the ranks."""
        return self.profile.resolve(num_tokens) if self.profile else exact_layout(num_tokens, num_ranks)

    @property
    def is_local(self) -> bool:
        """Whether each shard sees itself alone (and tail and sinks)."""
        return self.profile is not None and len(self.profile.levels) == 1

    @property
    def local_name(self) -> str:
        """The local-only profile with the same tail and sinks, to be beaten; "" for dense attention."""
        return f"local-t{self.profile.tail}-s{self.profile.sinks}" if self.profile else ""


def catalogue(num_shards: int, tail: int) -> dict[str, Candidate]:
    """Every profile by name: dense attention, the paper's, and what widens it.

    Args:
        num_shards: N, a power of two.
        tail: last tokens of a prompt that see everything, except in the paper's.

    Raises:
        ValueError: too few shards for the hierarchies.
    """
    if num_shards < MIN_SHARDS or num_shards & (num_shards - 1):
        raise ValueError(
            f"the number of shards must be a power of two from {MIN_SHARDS} on, not {num_shards}"
        )
    everyone, sinks = num_shards, 4
    profiles: dict[str, Profile | None] = {EXACT: None}
    profiles["paper"] = Profile(num_shards, ((1, 1), (everyone, 8)))
    for stride in (2, 4, 8):
        levels = ((1, 1), (everyone, stride))
        profiles[f"sampled-{stride}"] = Profile(num_shards, levels, tail=tail)
    for stride in (2, 4, 8, 16):
        levels = ((1, 1), (everyone, stride))
        profiles[f"dense-{stride}"] = Profile(num_shards, levels, dense_queries=True, tail=tail)
    dense_8 = ((1, 1), (everyone, 8))
    profiles["dense-8-sinks"] = Profile(num_shards, dense_8, dense_queries=True, sinks=sinks, tail=tail)
    sampled_4 = ((1, 1), (everyone, 4))
    profiles["sampled-4-sinks"] = Profile(num_shards, sampled_4, sinks=sinks, tail=tail)
    profiles["sampled-8-sinks"] = Profile(num_shards, dense_8, sinks=sinks, tail=tail)
    near = ((1, 1), (2, 1), (everyone, 8))
    profiles["near-dense-8"] = Profile(num_shards, near, dense_queries=True, tail=tail)
    pyramid = ((1, 1), (2, 2), (4, 4), (everyone, 8))
    profiles["pyramid-sampled"] = Profile(num_shards, pyramid, tail=tail)
    profiles["pyramid-dense"] = Profile(num_shards, pyramid, dense_queries=True, tail=tail)
    return {name: Candidate(name, profile) for name, profile in profiles.items()}


def with_companions(candidates: list[Candidate], num_shards: int) -> list[Candidate]:
    """Dense attention, the candidates, and a local-only profile for each tail and sinks among them."""
    companions = {
        one.local_name: Candidate(
            one.local_name, Profile(num_shards, ((1, 1),), sinks=one.profile.sinks, tail=one.profile.tail)
        )
        for one in candidates
        if one.profile
    }
    others = [one for one in candidates if one.name != EXACT]
    return [Candidate(EXACT, None), *others, *companions.values()]
