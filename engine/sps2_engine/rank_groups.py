"""The groups that a rank of a mesh belongs to, and how they form.

All ranks agree with all; a rank exchanges attention with those that hold the same part of the model, and sums its
layers with those that compute the same tokens. Knows nothing of stores and backends: forming one group is an argument.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from torch.distributed.distributed_c10d import PrefixStore, Store

from sps2_engine.collectives import Communicator, SoloCommunicator, SummingCommunicator
from sps2_engine.layers.tensor_ranks import ALONE, ConnectedRanks, TensorRanks
from sps2_engine.mesh import Mesh

FormGroup = Callable[[Store, int, int], SummingCommunicator]
"""From a store of the group's own, a rank in it and its size, at least 2: forms it, or raises GroupError."""


@dataclass(frozen=True)
class RankGroups:
    """One rank's groups."""

    everyone: Communicator
    """The whole mesh."""
    sequence: Communicator
    """The ranks with the same tensor index, by the order of their tokens."""
    tensor: TensorRanks
    """The ranks with the same sequence index, by the order of their parts of the model."""

    @classmethod
    def solo(cls, bytes_posted: Counter[str] | None = None) -> Self:
        """Those of a rank alone."""
        alone = SoloCommunicator(bytes_posted)
        return cls(alone, alone, ALONE)

    def close(self) -> None:
        """Leaves them; peers that wait for this rank fail at once."""
        self.everyone.close()
        self.sequence.close()
        self.tensor.close()


def form_rank_groups(mesh: Mesh, rank: int, store: Store, form: FormGroup) -> RankGroups:
    """Forms the groups of one rank of a mesh of more than one rank.

    A group that would be the whole mesh is the whole mesh.

    Raises:
        GroupError: not all ranks came in time.
    """
    everyone = form(store, rank, mesh.size)
    sequence: Communicator = SoloCommunicator(everyone.bytes_posted)
    tensor = ALONE
    if mesh.tp == 1:
        sequence = everyone
    elif mesh.sp > 1:
        own = PrefixStore(f"sequence-{mesh.tensor_index(rank)}", store)
        sequence = form(own, mesh.sequence_index(rank), mesh.sp)
    if mesh.sp == 1:
        tensor = ConnectedRanks(everyone)
    elif mesh.tp > 1:
        own = PrefixStore(f"tensor-{mesh.sequence_index(rank)}", store)
        tensor = ConnectedRanks(form(own, mesh.tensor_index(rank), mesh.tp))
    return RankGroups(everyone, sequence, tensor)
