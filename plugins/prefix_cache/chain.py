"""The state of one sequence in the prefix cache, and the identity of a block.

Identity of a block: SHA-256 over (parent's identity, token ids). The root is the lane's fingerprint and the request's salt.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pitlane import Pool

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane.storage.types import SavedPrefix

Pending = Future[Mapping[str, "Tensor"] | None]


@dataclass(slots=True, eq=False)
class Chain:
    """The plugin's state of a sequence: identities of its full blocks, its hits, loads and exports.

    saved: matching saved prefixes, longest first; None before the look-up. `[0, num_exported)` are the tokens whose export was
    asked for, `[0, num_saved)` the tokens in `pieces`. awaited: identity of a block -> futures of the sequences that wait until
    this sequence seals the block.
    """

    pool: Pool
    salt: str
    hashes: list[bytes] = field(default_factory=list)
    use: int = 0
    awaited: dict[bytes, list[Pending]] = field(default_factory=dict)
    saved: list[SavedPrefix] | None = None
    pieces: list[Mapping[str, Tensor]] = field(default_factory=list)
    num_exported: int = 0
    num_saved: int = 0
    memory_tokens: int = 0
    disk_tokens: int = 0
    discarded: list[str] = field(default_factory=list)

    def upto(self, token_ids: SequenceOf[int], count: int) -> list[bytes]:
        """Identities of the first `count` blocks."""
        size = self.pool.block_size
        for index in range(len(self.hashes), count):
            self.hashes.append(block_hash(self.parent(index), token_ids[index * size : (index + 1) * size]))
        return self.hashes[:count]

    def parent(self, index: int) -> bytes:
        """Identity of the block before block `index`."""
        return self.hashes[index - 1] if index else f"{self.pool.fingerprint}/{self.salt}".encode()

    def prefix_hash(self, token_ids: SequenceOf[int], end: int) -> str:
        """Identity of the tokens `[0, end)`. The last block may be partial."""
        count = end // self.pool.block_size
        self.upto(token_ids, count)
        return block_hash(self.parent(count), token_ids[count * self.pool.block_size : end]).hex()

    def tell(self, key: bytes) -> None:
        """Wake the sequences that wait for a block: they match again."""
        for waiting in self.awaited.pop(key, ()):
            waiting.set_result(None)


def block_hash(parent: bytes, token_ids: SequenceOf[int]) -> bytes:
    """Identity of the block of tokens that follows `parent`."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()
