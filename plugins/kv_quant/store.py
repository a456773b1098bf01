"""A KV store of quantized blocks, with a full-precision copy of every block that may still change.

Layout: `data [2, L, Hkv, num_slots, B]` holds the rows of the quantized blocks, `full [2, L, Hkv, F * 32, D]` the open blocks. A
block is open from its first token until it is sealed: then all of its tokens are committed. The slots of `full` have numbers of
their own, from block OPEN on. `arranged` (arrange.py) translates a batch: tokens write into open blocks, a token reads its own
block from `full` and earlier blocks from `data`. If later tokens of the same forward read a block that the forward completes, the
block is quantized layer by layer, by `write`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pitlane import BuildContext, KVGroup
from pitlane.kernels.attention_quant import BITS, FIRST_OPEN
from pitlane.plugins.kv_quant.formats import TOKENS, Format

OPEN = FIRST_OPEN // TOKENS  # number of the first open block
MIN_OPEN = 24  # open blocks at first: a step of 512 prompt tokens, and the blocks of 8 sequences that decode


class QuantizedKV:
    """counts: references of the pool to every block; a block without a reference needs no open copy. None = not known yet."""

    def __init__(self, group: KVGroup, num_blocks: int, block_size: int, context: BuildContext, rows: Format) -> None:
        assert block_size == TOKENS, f"blocks have {TOKENS} tokens, got {block_size}"
        assert num_blocks < OPEN, f"at most {OPEN} blocks have slots, got {num_blocks}"
        self.group, self.null_block, self.rows, self.dtype = group, num_blocks, rows, context.dtype
        self.format = format_name(rows.name)
        shape = (2, len(group.layers), group.num_kv_heads)
        size = (num_blocks + 1) * TOKENS
        self.data = torch.empty(*shape, size, rows.num_bytes, dtype=torch.uint8, device=context.device)
        self.full = torch.empty(*shape, MIN_OPEN * TOKENS, group.head_dim, dtype=context.dtype, device=context.device)
        self.counts: npt.NDArray[np.int32] | None = None
        self._open: dict[int, int] = {}  # block -> its index in `full`
        self._free = list(range(MIN_OPEN))
        self._unquantized: set[int] = set()  # open blocks whose rows in `data` are not those of their tokens
        self._closing: tuple[Tensor, Tensor] | None = None
        self._quantize_blocks = _kernel(context, rows)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + self.full.nbytes

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def is_closing(self) -> bool:
        """Whether `write` quantizes blocks in the next forward. A runner that writes KV itself leaves this forward to the core."""
        return self._closing is not None

    # ---- open blocks

    def open(self, block: int, is_new: bool) -> int:
        """Return the number of the open copy of a block. is_new: the first token of the block is about to be written."""
        index = self._open.get(block)
        if index is None:
            assert is_new, f"block {block} has tokens, and no full-precision copy"
            if not self._free:
                self._make_room()
            index = self._open[block] = self._free.pop()
        self._unquantized.add(block)
        return OPEN + index

    def close_in_forward(self, blocks: Sequence[int]) -> None:
        """Name the open blocks that the next forward completes: `write` quantizes them in every layer."""
        self._unquantized.difference_update(blocks)
        self._closing = self._pairs(blocks) if blocks else None

    def quantize_read(self, table: npt.NDArray[np.int32], written: set[int]) -> None:
        """Quantize the complete blocks of a block table that are not quantized yet. written: the blocks that are to be opened."""
        late = self._unquantized - written
        late = late.intersection(table.ravel().tolist()) if late else late
        if late:
            self._quantize(sorted(late), slice(None))

    def seal(self, block: int) -> None:
        """Free the open copy of a block. All of its tokens are committed."""
        if block in self._unquantized:
            self._quantize([block], slice(None))
        self.forget(block)

    def forget(self, block: int) -> None:
        """Free the open copy of a block without quantizing it."""
        index = self._open.pop(block, None)
        if index is not None:
            self._free.append(index)
        self._unquantized.discard(block)

    def _make_room(self) -> None:
        """Free the copies of blocks that went back to the pool; if there are none, double the room."""
        if self.counts is not None:
            counts = self.counts
            for block in [block for block in self._open if block >= len(counts) or counts[block] == 0]:
                self.forget(block)
        if self._free:
            return
        count = self.full.shape[3] // TOKENS
        self.full = torch.cat((self.full, torch.empty_like(self.full)), 3)
        self._free = list(range(count, 2 * count))

    def _pairs(self, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        indices = [self._open[block] for block in blocks]
        return torch.tensor(blocks, device=self.data.device), torch.tensor(indices, device=self.data.device)

    def _quantize(self, blocks: Sequence[int], layers: int | slice) -> None:
        self._encode(*self._pairs(blocks), layers)
        self._unquantized.difference_update(blocks)

    def _encode(self, blocks: Tensor, indices: Tensor, layers: int | slice) -> None:
        if self._quantize_blocks is not None:
            for layer in range(self.data.shape[1]) if isinstance(layers, slice) else (layers,):
                self._quantize_blocks(self.full[:, layer], self.data[:, layer], indices, blocks)
            return
        keys, values = self.full[:, layers].unflatten(-2, (-1, TOKENS)).index_select(-3, indices)
        self.data[:, layers].unflatten(-2, (-1, TOKENS)).index_copy_(-3, blocks, self.rows.encode(keys, values))

    # ---- a forward

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        slots = slots - FIRST_OPEN
        self.full[0, layer].index_copy_(1, slots, keys.transpose(0, 1))
        self.full[1, layer].index_copy_(1, slots, values.transpose(0, 1))
        if self._closing is not None:
            self._encode(*self._closing, layer)

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        """Rows of blocks [2, Hkv, num_slots, B], open blocks [2, Hkv, F * 32, D]."""
        return self.data[:, layer], self.full[:, layer]

    def view(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if start >= FIRST_OPEN:
            keys, values = self.full[:, layer, :, start - FIRST_OPEN : stop - FIRST_OPEN]
            return keys, values
        low = start // TOKENS * TOKENS
        late = [block for block in self._unquantized if low <= block * TOKENS < stop]
        if late:
            self._quantize(late, slice(None))
        rows = self.data[:, layer, :, low : -(-stop // TOKENS) * TOKENS].unflatten(2, (-1, TOKENS))
        keys, values = (x.flatten(1, 2)[:, start - low : stop - low] for x in self.rows.decode(rows, self.dtype))
        return keys, values

    def gather(self, layer: int, slots: Tensor, num_seqs: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            x.view(x.shape[0], num_seqs, -1, x.shape[2]).transpose(0, 1) for x in self._gathered(layer, slots)
        )
        return keys, values

    def _gathered(self, layer: int, slots: Tensor) -> Tensor:
        """Keys and values [2, Hkv, n, D] of slots [n]. Every run of slots in a block is decoded once."""
        is_open = slots >= FIRST_OPEN
        blocks, index = torch.unique_consecutive(slots[~is_open] // TOKENS, return_inverse=True)
        rows = self.data[:, layer].unflatten(2, (-1, TOKENS)).index_select(2, blocks)
        decoded = torch.stack(self.rows.decode(rows, self.dtype)).flatten(2, 3)
        closed = decoded.index_select(2, index * TOKENS + slots[~is_open] % TOKENS)
        if not is_open.any():
            return closed
        out = closed.new_empty(2, closed.shape[1], len(slots), closed.shape[3])
        out[:, :, ~is_open] = closed
        out[:, :, is_open] = self.full[:, layer].index_select(2, slots[is_open] - FIRST_OPEN)
        return out

    # ---- KV operations; their slots are those of the pool

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copy tokens of open blocks to open blocks, and whole blocks as rows."""
        pairs = list(zip(sources, targets, strict=True))
        tokens = [pair for pair in pairs if pair[0] // TOKENS in self._open]
        rows = [pair for pair in pairs if pair[0] // TOKENS not in self._open]
        moved = self.full.index_select(3, self._open_slots([source for source, _ in tokens]))
        closed = self.data.index_select(3, self._index([source for source, _ in rows]))
        for _, target in tokens:
            self.open(target // TOKENS, is_new=True)
        self.full.index_copy_(3, self._open_slots([target for _, target in tokens]), moved)
        self._check_whole(rows)
        for _, target in rows:
            self.forget(target // TOKENS)
        self.data.index_copy_(3, self._index([target for _, target in rows]), closed)

    def export(self, slots: list[int]) -> Tensor:
        """Return rows [2, L, Hkv, n, B]. The rows of a block that is not complete are zeros."""
        counts = Counter(slot // TOKENS for slot in slots)
        complete = [block for block in self._unquantized if counts[block] == TOKENS]
        if complete:
            self._quantize(complete, slice(None))
        rows = self.data.index_select(3, self._index(slots)).cpu()
        rows[:, :, :, [slot // TOKENS in self._unquantized for slot in slots]] = 0
        return rows

    def load(self, slots: list[int], saved: Tensor, start: int = 0) -> None:
        part = saved[:, :, :, start : start + len(slots)]
        assert part.shape[3] == len(slots), f"KV of {part.shape[3]} tokens for {len(slots)} slots"
        assert saved.dtype == torch.uint8, f"saved KV of {self.format} is uint8, got {saved.dtype}"
        for block in {slot // TOKENS for slot in slots}:
            self.forget(block)
        self.data.index_copy_(3, self._index(slots), part.to(self.data.device))

    def _open_slots(self, slots: Sequence[int]) -> Tensor:
        return self._index([self._open[slot // TOKENS] * TOKENS + slot % TOKENS for slot in slots])

    def _index(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(slots, dtype=torch.int64, device=self.data.device)

    @staticmethod
    def _check_whole(pairs: list[tuple[int, int]]) -> None:
        """The keys of a quantized block share scales, so its tokens cannot be copied alone, or to another place in a block."""
        per_block: dict[int, int] = {}
        for source, target in pairs:
            assert (source - target) % TOKENS == 0, "a token of a quantized block keeps its place in the block"
            per_block[target // TOKENS] = per_block.get(target // TOKENS, 0) + 1
        assert all(count == TOKENS for count in per_block.values()), "a quantized block is copied as a whole"


def format_name(name: str) -> str:
    """Return the KV format that an attention names to read the tensors of a store."""
    return f"kv_quant_{name}"


def _kernel(context: BuildContext, rows: Format) -> Callable[[Tensor, Tensor, Tensor, Tensor], None] | None:
    """The Triton kernel that quantizes blocks; None = the operations of `Format.encode`."""
    from pitlane.kernels.cuda import device

    if not device.serves(context.device) or device.unsupported(context.dtype, context.device):
        return None
    from pitlane.kernels.cuda.kv_quant import quantize_blocks, supports

    bits = BITS[format_name(rows.name)]
    return partial(quantize_blocks, bits=bits) if supports(bits, context.config.head_dim) else None
