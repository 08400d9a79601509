"""Content hashes of full blocks. A block's hash covers its tokens and, through its parent's hash, all tokens before it.

    H(0) = blake2b(root(cache keys) | tokens of block 0)
    H(i) = blake2b(H(i - 1)         | tokens of block i)

The root holds the request's cache keys, a tenant's salt among them, so requests with different keys never share a block, and
tenants cannot probe each other's prompts by timing. 128 bits: a collision would serve one prompt's KV to another, so the hash
is cryptographic.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_DIGEST_SIZE = 16


def root_hash(cache_keys: Sequence[str]) -> bytes:
    """The parent of every first block of requests with these cache keys."""
    root = blake2b(digest_size=_DIGEST_SIZE, person=b"pagoda-prefix")
    for key in cache_keys:
        encoded = key.encode()
        root.update(len(encoded).to_bytes(8, "little") + encoded)  # with its length: ("a", "b") is not ("ab",)
    return root.digest()


def extend_hashes(hashes: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int) -> None:
    """Append to `hashes` the hashes of the full blocks of `token_ids` that it does not have yet, in place.

    Costs only the new blocks, so a growing request pays for each token once.
    """
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        parent = blake2b(parent + tokens, digest_size=_DIGEST_SIZE).digest()
        hashes.append(parent)
