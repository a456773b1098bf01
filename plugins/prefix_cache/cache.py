"""State of the prefix cache in a lane, shared by all plans and options of the plugin."""

from __future__ import annotations

from collections.abc import Sequence

from pitlane import Pool
from pitlane.plugins.prefix_cache.disk import Disk
from pitlane.plugins.prefix_cache.index import BlockIndex


class Cache:
    """The blocks in memory, and the saved documents. disk: None until a plan saves documents."""

    def __init__(self, pool: Pool) -> None:
        self.disk: Disk | None = None
        self._indexes = {is_exact: BlockIndex(pool) for is_exact in (True, False)}

    def open_disk(self, quota_bytes: int) -> None:
        """Open the store of saved prefixes on its own thread."""
        if self.disk is None:
            self.disk = Disk(quota_bytes)

    def index(self, is_exact: bool) -> BlockIndex:
        """The blocks in memory. KV loaded from int8 has a separate index, so no exact plan gets approximate KV."""
        return self._indexes[is_exact]

    def evict(self, num_blocks: Sequence[int]) -> None:
        """Free up to `num_blocks` of each KV group: the least recently used blocks, exact plans' blocks first."""
        for index in self._indexes.values():
            num_blocks = index.evict(list(num_blocks))

    def close(self) -> None:
        """Finish reading and writing."""
        if self.disk is not None:
            self.disk.close()
