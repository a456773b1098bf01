"""One forward as plain tensors and KV operations, and the builder that makes it from chunks of sequences.

A `Batch` knows no Sequence, pool, plan or closure. So it can be padded, captured, sent to other ranks, or kept in flight. The
tokens of all B sequences lie flat, one sequence after another: `T` query tokens, `R` rows of logits to compute. A `Chunk` is the
part of a sequence that a forward computes. The builder knows the pool of one model. It knows no plan and no request, so draft
models use it too.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pitlane.engine.decode.draft import Draft, depths
from pitlane.engine.kv.operations import Operation
from pitlane.engine.kv.pool import Pool
from pitlane.engine.kv.state import KVState
from pitlane.engine.kv.store import KVStore
from pitlane.engine.kv.visibility import num_sinks_of, sink_positions

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """The KV of one group in a batch.

    slots: [T] int64, where the KV of the tokens is written. block_table: [B, W] int32, the blocks of every sequence in token order;
    -1 = dropped, or behind the last block. window_start: [T] int64, the first token of its sequence that a token sees.
    A token also sees the first `min(num_sinks, window_start)` tokens, with a second query. sink_positions: [T] int64, the position
    that rotates the second query; None = no token of the batch has one. places: [T] int64, if dropped blocks are left out of the
    block table: a token's place in the table. Then window_start is a place too. None = places are positions.
    """

    slots: Tensor
    block_table: Tensor
    window_start: Tensor
    num_sinks: int = 0
    sink_positions: Tensor | None = None
    places: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward. The tensors lie on the host, until the runner moves them.

    token_ids, positions: [T] int64. parents: [T] int64, for a draft token the index in the batch of the token before it; else -1:
    the token sees all tokens of its sequence before it. query_start: [B + 1] int64; the tokens of sequence b are
    `[query_start[b], query_start[b + 1])`, and position `positions[query_start[b]]` is the first of them. logit_rows: [R] int64,
    indices into T. operations: changes of stored KV, in order; the engine puts them into batches without tokens. block_size: tokens
    of a block.
    """

    token_ids: Tensor
    positions: Tensor
    parents: Tensor
    query_start: Tensor
    logit_rows: Tensor
    groups: tuple[GroupBatch, ...]
    operations: tuple[Operation, ...]
    block_size: int

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    def seen_by(self, group: int) -> Batch:
        """Return the batch as the attention of a group sees it: the positions are places in the block table of the group."""
        places = self.groups[group].places
        return self if places is None else replace(self, positions=places)

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on a device."""
        return self if device.type == "cpu" else _moved(self, device)

    def padded(self, num_tokens: int, num_rows: int, null_blocks: SequenceOf[int]) -> Batch:
        """Return the batch with sequences of one token added, up to `num_tokens` tokens, and rows up to `num_rows`.

        null_blocks: per group, the block that receives the KV of the added tokens; no sequence owns it. The logits of the batch
        are the first R rows.
        """
        count, rows = num_tokens - self.num_tokens, num_rows - len(self.logit_rows)
        assert count >= 0 and rows >= 0, f"a batch of {self.num_tokens} tokens is larger than {num_tokens}"
        ends = self.query_start[-1] + torch.arange(1, count + 1)
        return replace(
            self,
            token_ids=_extended(self.token_ids, 0, count),
            positions=_extended(self.positions, 0, count),
            parents=_extended(self.parents, -1, count),
            query_start=torch.cat((self.query_start, ends)),
            logit_rows=_extended(self.logit_rows, num_tokens - 1, rows),
            groups=tuple(
                GroupBatch(
                    _extended(group.slots, block * self.block_size, count),
                    _extended(group.block_table, block, count),
                    _extended(group.window_start, 0, count),
                    group.num_sinks,
                    None if group.sink_positions is None else _extended(group.sink_positions, 0, count),
                    None if group.places is None else _extended(group.places, 0, count),
                )
                for group, block in zip(self.groups, null_blocks, strict=True)
            ),
        )


class Attention(Protocol):
    """The attention of a lane, as `build_attention` returns it. formats: the KV formats that it reads; None = any store."""

    @property
    def formats(self) -> tuple[str, ...] | None: ...

    def prepare(self, batch: Batch, group: int) -> Any:
        """Plan how the tokens of a step read the KV of one group. Called once per step and group, with tensors on the host.

        batch: the result of `Batch.seen_by(group)`.
        """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, store: KVStore, layer: int, reads: Any) -> Tensor:
        """q [T, H, D], new k and v [T, Hkv, D] (already in the store) -> [T, H, D]. reads: the result of `prepare`."""


class SinkAttention(Attention, Protocol):
    """An attention that reads sinks. It has an attribute `reads_sinks = True`."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, store: KVStore, layer: int, reads: Any, sink_q: Tensor | None = None
    ) -> Tensor:
        """sink_q: the queries for the sinks [T, H, D]; None in a step without them."""


class Chunk(NamedTuple):
    """Tokens of one sequence to compute: known tokens from `kv.num_computed_tokens` on, then a draft.

    wants_logits: `token_ids` ends with the last known token, so the batch gets its row of logits.
    """

    kv: KVState
    token_ids: SequenceOf[int]
    draft: Draft | None
    wants_logits: bool


class BatchBuilder:
    """Builds the batches of one model. The caller has reserved the slots of every chunk."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def build(self, chunks: SequenceOf[Chunk], operations: SequenceOf[Operation] = ()) -> Batch:
        """Build the batch of chunks, in order."""
        token_ids: list[int] = []
        positions: list[int] = []
        parents: list[int] = []
        logit_rows: list[int] = []
        query_start = [0]
        slots: list[list[int]] = [[] for _ in self.pool.groups]
        for kv, known, draft, wants_logits in chunks:
            first, begin = kv.num_computed_tokens, len(token_ids)
            token_ids += known
            positions += range(first, first + len(known))
            parents += [-1] * len(known)
            last = len(token_ids) - 1
            if wants_logits:
                logit_rows.append(last)
            if draft is not None:
                logit_rows += range(last + 1, last + 1 + len(draft.token_ids))
                token_ids += draft.token_ids
                positions += [positions[last] + depth for depth in depths(draft.links)]
                parents += [last + 1 + parent for parent in draft.links]
            query_start.append(len(token_ids))
            for group, group_slots in enumerate(slots):
                group_slots += self.pool.slots(kv, group, first, first + len(token_ids) - begin)
        lists = [token_ids, positions, parents, query_start, logit_rows, *slots]
        arrays = [np.array(values, np.int64) for values in lists]
        groups = []
        for group, targets in enumerate(arrays[5:]):
            tables = [self.pool.table_of_batch(chunk.kv, group) for chunk in chunks]
            groups.append(self._group(group, targets, tables, arrays[1], np.diff(arrays[3])))
        ids, at, tree, starts, rows = map(torch.from_numpy, arrays[:5])
        return Batch(ids, at, tree, starts, rows, tuple(groups), tuple(operations), self.pool.block_size)

    def _group(
        self,
        group: int,
        slots: Indices,
        tables: SequenceOf[tuple[list[int], int]],
        positions: Indices,
        counts: Indices,
    ) -> GroupBatch:
        """counts: [B], the tokens of every sequence. tables: block table of every sequence, and how many blocks it leaves out."""
        visibility = self.pool.visibilities[group]
        firsts, num_sinks = visibility.starts(positions), num_sinks_of(visibility)
        shifted = places = None
        if num_sinks and firsts.any():
            shifted = torch.from_numpy(sink_positions(firsts, positions, num_sinks))
        num_left_out = np.array([count for _, count in tables], np.int64) * self.pool.block_size
        if num_left_out.any():
            gaps = np.repeat(num_left_out, counts)
            places, firsts = torch.from_numpy(positions - gaps), np.maximum(firsts - gaps, 0)
        blocks = _table([table for table, _ in tables])
        written, block_table, window_start = map(torch.from_numpy, (slots, blocks, firsts))
        return GroupBatch(written, block_table, window_start, num_sinks, shifted, places)


def _table(tables: list[list[int]]) -> npt.NDArray[np.int32]:
    """Block tables of any length as one array [B, W], filled up with -1."""
    width = max([1, *map(len, tables)])
    rows = [table + [-1] * (width - len(table)) for table in tables]
    return np.array(rows, np.int32).reshape(len(rows), width)


def _extended(tensor: Tensor, value: int, count: int) -> Tensor:
    return torch.cat((tensor, tensor.new_full((count, *tensor.shape[1:]), value)))


def _moved(batch: Any, device: torch.device) -> Any:
    """Copy all tensors of a batch, or of its groups, to a device."""
    moved: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device, non_blocking=True)
    if isinstance(batch, Batch):
        moved["groups"] = tuple(_moved(group, device) for group in batch.groups)
    return replace(batch, **moved)
