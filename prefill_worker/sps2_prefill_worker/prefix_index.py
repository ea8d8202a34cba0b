"""What others are told of a prefill group's cache: the ranks what to read and keep, the directory what is found."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Protocol

from sps2.internal.v1 import engine_pb2
from sps2.internal.v1.placement_pb2 import AttentionLayout
from sps2_layout.attention import Attention
from sps2_layout.wire import pack_attention
from sps2_prefill_worker.prefix_cache import Admitted, Changes, Match


class HeldPrefixes(Protocol):
    """The directory client's part: returns at once, tells in the background."""

    def hold(self, attention: AttentionLayout, keys: list[bytes]) -> None:
        """These blocks are found here."""
        ...

    def drop(self, attention: AttentionLayout, keys: list[bytes]) -> None:
        """They are not any more."""
        ...

    def drop_all(self) -> None:
        """None is: the epoch is over."""
        ...


class PrefixIndex:
    """Tells the directory; without one, nobody."""

    def __init__(self, held: HeldPrefixes | None) -> None:
        self._held = held

    def tell(self, changes: Changes) -> None:
        """What has changed in the book."""
        if self._held is not None:
            for attention, keys in _by_attention(changes.evicted):
                self._held.drop(attention, keys)
            for attention, keys in _by_attention(changes.recorded):
                self._held.hold(attention, keys)

    def drop_all(self) -> None:
        """The book is gone."""
        if self._held is not None:
            self._held.drop_all()


NO_INDEX = PrefixIndex(None)


def fill_cached(run: engine_pb2.RunPrefill, admitted: Admitted, evicted: Sequence[int]) -> None:
    """Tells a rank what it gives up first, what it reads of what is cached, and what it keeps."""
    run.evict.extend(evicted)
    if admitted.match.parts:
        run.cached.CopyFrom(cached_prefix(admitted.match))
    if admitted.run is not None:
        run.keep.run, run.keep.token_end = admitted.run.number, admitted.run.end


def cached_prefix(match: Match) -> engine_pb2.CachedPrefix:
    """What is found of a text, run by run."""
    cached = engine_pb2.CachedPrefix(tokens_by_rank=match.tokens_by_rank())
    for part, span in match.parts:
        cached.parts.add(run=part.number, token_begin=span.begin, token_end=span.end)
    return cached


def _by_attention(
    entries: Iterable[tuple[Attention, bytes]],
) -> Iterable[tuple[AttentionLayout, list[bytes]]]:
    """Changes come prompt by prompt, so that those of one attention follow each other."""
    for attention, some in groupby(entries, key=lambda entry: entry[0]):
        yield pack_attention(attention), [key for _, key in some]
