"""The profiles that are compared: this room's own by name, and files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sps2_bench.csa import Ladder, Layout, Profile, ProfileError, exact_layout, load_profile

EXACT = "exact"
MIN_SHARDS = 8
"""The hierarchies below have levels of 2, 4 and N shards."""
FILE_SUFFIX = ".json"


@dataclass(frozen=True)
class Candidate:
    """Attention under its name."""

    name: str
    ladder: Ladder
    """Without rungs: dense attention."""
    local_name: str = ""
    """The local-only profile with the same tail and sinks, to be beaten; "" for dense attention."""

    def layout(self, num_tokens: int, num_ranks: int = 1) -> Layout:
        """Its layout of a prompt; only the shards of dense attention depend on the ranks."""
        return self.ladder.resolve(num_tokens) or exact_layout(num_tokens, num_ranks)

    @property
    def is_local(self) -> bool:
        """Whether each shard sees itself alone (and tail and sinks)."""
        return self.name == self.local_name

    def local(self) -> "Candidate":
        """What it must beat: itself without levels."""
        rungs = tuple(replace(rung, levels=((1, 1),), dense_queries=False) for rung in self.ladder.rungs)
        return Candidate(
            self.local_name, replace(self.ladder, name=self.local_name, rungs=rungs), self.local_name
        )


def _of_profile(name: str, profile: Profile) -> Candidate:
    """One profile, whatever the prompt's length."""
    local_name = f"local-t{profile.tail}-s{profile.sinks}"
    return Candidate(name, Ladder(name, (profile,), min_shard_tokens=1), local_name)


def _of_file(path: str, lengths: Sequence[int]) -> Candidate:
    ladder = load_profile(path)
    for length in lengths:
        if ladder.resolve(length) is None:
            raise ProfileError(
                f"{path} is dense at {length} tokens: there is nothing to compare; lower its min_shard_tokens"
            )
    return Candidate(ladder.name, ladder, f"local-{ladder.name}")


def choose(names: Sequence[str], lengths: Sequence[int], num_shards: int, tail: int) -> list[Candidate]:
    """Candidates by name or file, with dense attention first and the local-only ones that they must beat last.

    Args:
        names: of the catalogue, or paths of JSON files (`docs/profiles.md`).
        lengths: of the prompts; a file must be sparse at all of them.
        num_shards: N of the catalogue's profiles.
        tail: of the catalogue's profiles.

    Raises:
        ValueError: a name that is not known, a file that cannot be used, or two profiles of one name.
    """
    known = catalogue(num_shards, tail)
    chosen = []
    for name in names:
        if name.endswith(FILE_SUFFIX):
            chosen.append(_of_file(name, lengths))
        elif name in known:
            chosen.append(known[name])
        else:
            raise ValueError(f"{name!r} is none of {', '.join(known)}, nor a {FILE_SUFFIX} file")
    listed = [one.name for one in chosen]
    locals_ = {one.local_name: one.local() for one in chosen if one.name != EXACT}
    for name in [*listed, *locals_]:
        if [*listed, *locals_].count(name) > 1:
            raise ValueError(f"two profiles are called {name!r}")
    return [known[EXACT], *[one for one in chosen if one.name != EXACT], *locals_.values()]


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
    profiles = {"paper": Profile(num_shards, ((1, 1), (everyone, 8)))}
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
    exact = {EXACT: Candidate(EXACT, Ladder(EXACT))}
    return exact | {name: _of_profile(name, profile) for name, profile in profiles.items()}
