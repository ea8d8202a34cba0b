"""What tensor ranks post, in closed form. Pure."""

from sps2_engine.mesh import TensorShare
from sps2_engine.models.config import ModelConfig

ELEMENT_BYTES = 4
"""Hidden states and logits are summed and gathered in fp32, whatever the weights are."""


def tensor_bytes(config: ModelConfig, share: TensorShare, num_rows: int, num_logits: int) -> int:
    """Bytes that one of T tensor ranks posts for a forward of some rows, and for logits of some of these.

    (1 + 2 L) 2 (T - 1) / T rows hidden b: the embedding and two sums in each layer, as in a ring; and (T - 1) logits
    of its share of the vocabulary.
    """
    others = share.tp - 1
    hidden = 2 * num_rows * config.hidden_size * ELEMENT_BYTES * others // share.tp
    logits = num_logits * len(share.vocabulary(config.vocab_size)) * ELEMENT_BYTES * others
    return (1 + 2 * config.num_layers) * hidden + logits
