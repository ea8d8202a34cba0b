"""Token ids to vectors, and vectors to logits, with tables that may be split by token ids."""

import torch
from torch import Tensor
from torch.nn import functional

from sps2_engine.layers.linear import Linear
from sps2_engine.layers.tensor_ranks import TensorRanks
from sps2_engine.mesh import TensorShare
from sps2_engine.weights import WeightSource, table_dtype, wide_dtype


class Vocabulary:
    """The embedding and the output matrix, each [token ids, hidden], or a tensor rank's rows of them.

    Args:
        source: where the tensors come from.
        vocab_size: token ids of the model.
        hidden_size: values of a vector.
        share: which rows are held.
        tied: whether the output matrix is the embedding; one that the checkpoint holds is used all the same.
    """

    def __init__(
        self, source: WeightSource, vocab_size: int, hidden_size: int, share: TensorShare, *, tied: bool
    ) -> None:
        parts = [TensorShare(index, share.tp).vocabulary(vocab_size) for index in range(share.tp)]
        self._rows = parts[share.index]
        self._widths = [len(part) for part in parts]
        self._wide = wide_dtype(source.dtype)
        self._shape = len(self._rows), hidden_size
        self.embedding = self._read(source, "model.embed_tokens.weight")
        """[rows, hidden]."""
        self.head = self._read_head(source, tied=tied)

    def embed(self, token_ids: Tensor, ranks: TensorRanks) -> Tensor:
        """Token ids [tokens] int64, each below vocab_size -> vectors [tokens, hidden] in fp32 or wider."""
        if self._rows.is_all:
            return functional.embedding(token_ids, self.embedding).to(self._wide)
        rows = token_ids - self._rows.span.begin
        elsewhere = (rows < 0) | (rows >= len(self._rows))
        x = functional.embedding(rows.masked_fill_(elsewhere, 0), self.embedding).to(self._wide)
        x.masked_fill_(elsewhere[:, None], 0.0)
        ranks.sum(x)  # one of them has the row, so that nothing is rounded
        return x

    def logits(self, hidden: Tensor, ranks: TensorRanks) -> Tensor:
        """Hidden states [n, hidden] -> fp32 [n, vocab], on every rank."""
        logits = self.head(hidden).float()
        return logits if self._rows.is_all else ranks.gather_columns(logits, self._widths)

    def _read(self, source: WeightSource, name: str) -> Tensor:
        dtype = table_dtype(source.dtype, source.device)
        table = torch.empty(self._shape, dtype=dtype, device=source.device)
        source.fill(name, table, self._rows)
        return table

    def _read_head(self, source: WeightSource, *, tied: bool) -> Linear:
        """One matrix where the two are equal: it is the widest of all."""
        if tied and not source.has("lm_head.weight"):
            return Linear(self.embedding)
        weight = self._read(source, "lm_head.weight")
        return Linear(self.embedding if tied and torch.equal(weight, self.embedding) else weight)
