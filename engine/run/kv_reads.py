"""Plans how the queries of a batch read stored KV: shared runs of blocks once, short contexts gathered, the rest alone.

To read the KV of a sequence in place costs a call per sequence, span and layer. To gather costs a copy, but one call serves all.
A prefix that several sequences share (a document, a system prompt) is read once for all their queries (Juravsky et al. 2024,
Hydragen). The plan is made once per step and serves all layers of a group. Token and block ranges are half-open.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
import torch

from pitlane.engine.kv.pool import Pool
from pitlane.engine.kv.state import KVState
from pitlane.engine.run.batch import Gather, Query, Reads, Shared

# Bytes of one layer's KV. Time of gathered reads / time of single reads on 2 cores: 0.46 at 128 kB per sequence (float32), 0.88 at
# 384 kB (bfloat16), 1.12 at 416 kB (float32), more than 1.2 at 2 MB.
MOST_GATHERED, MOST_GATHERED_CUDA = 2**19, 2**24  # most bytes per sequence; on a GPU a call costs more than a copy
MIN_SHARED = 2**19  # least bytes that a shared run must save: its merge costs time


class Reader(NamedTuple):
    """Query tokens `[begin, end)` of a batch that read the stored tokens `[low, stop)` of a block table.

    num_shareable: number of leading blocks of the table that every query token sees completely.
    """

    begin: int
    end: int
    table: list[int]
    low: int
    stop: int
    num_shareable: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.low


class Run(NamedTuple):
    """Blocks `[start, stop)`, equal in the tables of several readers. members: indices of the readers."""

    members: list[int]
    start: int
    stop: int


def plan_reads(
    pool: Pool, group: int, kvs: SequenceOf[KVState], queries: list[Query], dtype: torch.dtype, device: torch.device
) -> Reads:
    """Return the reads of one KV group that several queries share. Append the spans that a query reads alone to `query.spans`."""
    kv_group, size = pool.groups[group], pool.block_size
    token_bytes = kv_group.bytes_per_token(dtype) // len(kv_group.layers)
    max_gathered = (MOST_GATHERED if device.type == "cpu" else MOST_GATHERED_CUDA) // token_bytes
    readers = [_reader(kv, query, group, kv_group.window, size) for kv, query in zip(kvs, queries, strict=True)]
    reads = Reads()
    for run in shared_runs(readers, max(1, MIN_SHARED // (size * token_bytes))):
        rows = [row for i in run.members for row in range(readers[i].begin, readers[i].end)]
        index = torch.tensor(rows, device=device)
        spans = pool.spans(kvs[run.members[0]], group, run.start * size, run.stop * size)
        reads.shared.extend(Shared(index, span) for span in spans)
        for i in run.members:
            readers[i] = readers[i]._replace(low=run.stop * size)
    alone = set(range(len(readers)))
    for members in gathered(readers, max_gathered):
        alone.difference_update(members)
        reads.gathers.append(_gather([readers[i] for i in members], len(queries), size, dtype, device))
    for i, (kv, query, reader) in enumerate(zip(kvs, queries, readers, strict=True)):
        query.spans.append(pool.spans(kv, group, reader.low, reader.stop) if i in alone else [])
    return reads


def shared_runs(readers: SequenceOf[Reader], min_saved: int) -> list[Run]:
    """Find runs of equal leading blocks, outer runs first. A run saves at least `min_saved` block reads.

    The runs of one reader follow each other without a gap, from its first block on.
    """
    runs: list[Run] = []
    _split(readers, range(len(readers)), 0, 0, min_saved, runs)
    return runs


def gathered(readers: SequenceOf[Reader], max_tokens: int) -> list[list[int]]:
    """Group the readers (indices) with one query and at most `max_tokens` tokens. In a group, lengths differ by a factor below 2.

    All lengths up to 16 form one group.
    """
    buckets: dict[int, list[int]] = defaultdict(list)
    for index, reader in enumerate(readers):
        if reader.end - reader.begin == 1 and reader.num_tokens <= max_tokens:
            buckets[max(4, (reader.num_tokens - 1).bit_length())].append(index)
    return [bucket for bucket in buckets.values() if len(bucket) > 1]


def _reader(kv: KVState, query: Query, group: int, window: int | None, block_size: int) -> Reader:
    """The stored KV that the queries of a sequence see. A short query reads the KV of its own tokens too."""
    first = kv.num_computed_tokens
    low = 0 if window is None else max(0, first - window + 1)
    stop = first + query.end - query.begin if query.is_short else first
    num_shareable = first // block_size if window is None else 0
    return Reader(query.begin, query.end, kv.block_tables[group], low, stop, num_shareable)


def _split(
    readers: SequenceOf[Reader], members: SequenceOf[int], depth: int, start: int, min_saved: int, runs: list[Run]
) -> None:
    """Add the runs of `members` to `runs`. Their tables are equal up to `depth`; blocks before `start` are in a run already."""
    agreeing: dict[int, list[int]] = defaultdict(list)
    for index in members:
        if readers[index].num_shareable > depth:
            agreeing[readers[index].table[depth]].append(index)
    for group in agreeing.values():
        if len(group) < 2:
            continue
        stop = depth + _num_common([readers[i].table[depth : readers[i].num_shareable] for i in group])
        pays = (len(group) - 1) * (stop - start) >= min_saved
        if pays:
            runs.append(Run(group, start, stop))
        _split(readers, group, stop, stop if pays else start, min_saved, runs)


def _num_common(tables: list[list[int]]) -> int:
    """Length of the common prefix of all tables. It is the common prefix of the smallest and the largest table."""
    first, last = min(tables), max(tables)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _gather(
    readers: list[Reader], num_queries: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> Gather:
    tables = [reader.table[reader.low // block_size : -(-reader.stop // block_size)] for reader in readers]
    width = max(map(len, tables))
    blocks = np.array([[*table, *[table[-1]] * (width - len(table))] for table in tables])
    skipped = np.array([reader.low % block_size for reader in readers])[:, None]
    count = np.array([reader.num_tokens for reader in readers])[:, None]
    place = np.arange(count.max())
    index = skipped + np.minimum(place, count - 1)
    slots = np.take_along_axis(blocks, index // block_size, 1) * block_size + index % block_size
    bias = torch.zeros(slots.shape, dtype=dtype).masked_fill_(torch.from_numpy(place >= count), float("-inf"))
    rows = None
    if len(readers) < num_queries:
        rows = torch.tensor([reader.begin for reader in readers], device=device)
    return Gather(rows, torch.from_numpy(slots.ravel()).to(device), bias[:, None, None].to(device))
