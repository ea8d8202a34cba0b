"""The ranks among whom every layer is split: what they hold parts of is summed, or put together.

Knows nothing about which layer it is, nor where the weights' parts lie (`sps2_engine.mesh`).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sps2_engine.collectives import SummingCommunicator

KIND = "tensor"
"""Name of the byte counter."""


class TensorRanks(Protocol):
    """What parallel layers ask of each other. All ranks call the same methods in the same order."""

    @property
    def size(self) -> int:
        """Parts that every layer is split into; a layer that is whole asks nothing."""
        ...

    def sum(self, x: Tensor) -> None:
        """Adds up x, contiguous and of one shape on all ranks, in place; every rank gets the same bits.

        Raises:
            GroupError: a rank died or the group's timeout passed.
        """
        ...

    def gather_columns(self, columns: Tensor, widths: Sequence[int]) -> Tensor:
        """Puts the columns of all ranks side by side: [rows, widths[rank]] -> [rows, sum(widths)], on every rank.

        Raises:
            GroupError: as `sum`.
        """
        ...

    def close(self) -> None:
        """Leaves the group; peers that wait for this rank fail at once."""
        ...


class WithoutPeers:
    """One rank by itself: for a model that is whole; of a part it makes partial sums, fit only to warm up."""

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def sum(self, x: Tensor) -> None:
        """What is here is all there is."""

    def gather_columns(self, columns: Tensor, widths: Sequence[int]) -> Tensor:
        """See `TensorRanks.gather_columns`; the columns of absent ranks are zero."""
        return torch.nn.functional.pad(columns, (0, sum(widths) - columns.shape[1]))

    def close(self) -> None:
        """Nothing to leave."""


ALONE: TensorRanks = WithoutPeers()
"""For models that are whole."""


class ConnectedRanks:
    """Tensor ranks over a communicator."""

    def __init__(self, communicator: SummingCommunicator) -> None:
        self._communicator = communicator
        self.size = communicator.size

    def sum(self, x: Tensor) -> None:
        """See `TensorRanks.sum`."""
        self._communicator.all_reduce(x, KIND)

    def gather_columns(self, columns: Tensor, widths: Sequence[int]) -> Tensor:
        """See `TensorRanks.gather_columns`."""
        own, rows, dtype = self._communicator.rank, len(columns), columns.dtype
        part = columns.contiguous().view(torch.uint8).flatten()
        sent, received = (
            [0 if peer == own else rows * width * dtype.itemsize for peer, width in enumerate(of)]
            for of in ([columns.shape[1]] * self.size, widths)
        )
        arrived = self._communicator.all_to_all(part.repeat(self.size - 1), sent, received, KIND).wait()
        whole = columns.new_empty(rows, sum(widths))
        arrivals = zip(torch.split(whole, list(widths), dim=1), torch.split(arrived, received), strict=True)
        for peer, (place, one) in enumerate(arrivals):
            place.copy_(columns if peer == own else one.view(dtype).view(place.shape))
        return whole

    def close(self) -> None:
        """See `TensorRanks.close`."""
        self._communicator.close()
