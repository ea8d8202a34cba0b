"""Names of a prompt's blocks: two blocks of one name have the same tokens before and in them. Pure.

Knows nothing about attention: how a block's KV was made is for those who hold it to say.
"""

import hashlib
import struct
from collections.abc import Sequence

BLOCK_TOKENS = 64
HASH_BYTES = 32
_NO_PARENT = bytes(HASH_BYTES)
_TOKENS = struct.Struct(f"<{BLOCK_TOKENS}i")


def block_hashes(token_ids: Sequence[int], model_hash: str, tenant_salt: bytes) -> list[bytes]:
    """The chain hashes of a prompt's full blocks, in order; tokens behind the last full block have none.

    The i-th is SHA-256(model hash | tenant salt | hash i-1 | the block's tokens), 32 bytes. Model hash and salt each
    follow their length in bytes (uint32), the first block follows 32 zero bytes, tokens are int32; all little-endian.

    Args:
        token_ids: of the prompt, each in [0, 2^31).
        model_hash: of the model that makes the KV.
        tenant_salt: of those who may share blocks.
    """
    head = hashlib.sha256(_sized(model_hash.encode()) + _sized(tenant_salt))
    hashes: list[bytes] = []
    parent = _NO_PARENT
    for begin in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = head.copy()
        block.update(parent + _TOKENS.pack(*token_ids[begin : begin + BLOCK_TOKENS]))
        parent = block.digest()
        hashes.append(parent)
    return hashes


def _sized(part: bytes) -> bytes:
    return struct.pack("<I", len(part)) + part
