"""What a writer does to blocks that are no longer its own: stopped, forgotten, and continued.

Returns figures; the acceptance suite calls the same function as the tests.
"""

import signal
from collections.abc import Mapping
from dataclasses import dataclass

from support.kv_cluster import BLOCK_TOKENS, Request, Shape, cluster


@dataclass(frozen=True)
class StoppedWriterFigures:
    """What `stopped_writer` saw."""

    changed_elements: int
    """Elements of the reused blocks that are not the second request's. Must be 0."""
    arena_unchanged: bool
    """Whether no byte of the whole arena changed after the writer went on."""
    late_bytes_in_ring: int
    """Late tokens found in the stopped writer's ring (one-sided transport; None of them is in a block)."""
    late_slabs_refused: int
    """Slabs of the forgotten attempt that the target turned away. Must not be 0."""
    writer_result: str
    """How the late transfer ended at the writer."""


def stopped_writer(
    transport: str, shape: Shape | None = None, env: Mapping[str, str] | None = None
) -> StoppedWriterFigures:
    """Stops a writer, forgets its attempt, gives its blocks to another request, and lets the writer go on.

    The writer is stopped between two layers with the order to send the rest already in its hands; so what it
    writes afterwards is written under a fence that no longer holds. `env` may choose how UCX moves bytes
    (UCX_TLS).
    """
    with cluster(transport, num_sources=2, shape=shape, env=env) as both:
        target, (late, other) = both.targets[0], both.sources
        first = Request(both, 1, 4 * BLOCK_TOKENS, 1, 1, {}).expect().begin().ready([0])
        per_layer = first.num_tokens * both.shape.token_bytes
        target.until("stats", "bytes_accepted", per_layer)

        late.process.send(signal.SIGSTOP)
        late.tell("ready", key=first.id, layers=list(range(1, both.shape.num_layers)))
        first.forget()

        second = Request(both, 2, 4 * BLOCK_TOKENS, 1, 1, {})
        second.sources = [(other, [(0, second.num_tokens)])]
        second.expect().begin().ready()
        assert "bytes_sent" in second.results()[0]
        assert second.complete() == [True]
        before = target.ask("digest")["digest"]
        refused_before = target.ask("stats")["refused"]

        late.process.send(signal.SIGCONT)
        late.answer()
        result = late.ask("wait", key=first.id)
        refused = target.until("stats", "refused", refused_before + 1) - refused_before
        in_ring = 0
        if transport == "nixl":
            tokens = range(first.num_tokens)
            in_ring = sum(
                target.ask("count_in_ring", source=late.incarnation, salt=1, layer=1, token=token)["count"]
                for token in tokens
            )
        return StoppedWriterFigures(
            changed_elements=second.wrong_elements(),
            arena_unchanged=target.ask("digest")["digest"] == before,
            late_bytes_in_ring=in_ring * both.shape.token_bytes // 2,
            late_slabs_refused=refused,
            writer_result=result.get("reason", "delivered"),
        )
