"""How the queries of a batch read stored KV: runs of blocks that several share once, short contexts gathered, the rest alone.

Reading a sequence's KV where it lies costs a call per sequence, span and layer; gathering costs a copy, but one call for all.
A prefix that several sequences share (a document, a system prompt) is read once for the queries of all of them (Juravsky
et al. 2024, Hydragen). Planned once per step, for all layers of a group. Token and block ranges are half-open.
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

# Bytes of one layer's KV, 2 cores. Gathered against alone: 0.46 of the time at 128 kB a sequence (float32), 0.88 at 384 kB
# (bfloat16), 1.12 at 416 kB (float32), more than 1.2 at 2 MB.
MOST_GATHERED, MOST_GATHERED_CUDA = 2**19, 2**24  # of a sequence; on a GPU a call costs more than a copy
MIN_SHARED = 2**19  # that a shared run must save to be worth its merge


class Reader(NamedTuple):
    """Query tokens `[begin, end)` of a batch that read the stored tokens `[low, stop)` of a block table.

    num_shareable: leading blocks of the table that hold nothing but tokens which all its queries see.
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
    """Blocks `[start, stop)` of the tables of several readers (indices), the same in each."""

    members: list[int]
    start: int
    stop: int


def plan_reads(
    pool: Pool, group: int, kvs: SequenceOf[KVState], queries: list[Query], dtype: torch.dtype, device: torch.device
) -> Reads:
    """What several queries read together of one group's KV; what each reads alone is added to `queries`."""
    kv_group, size = pool.groups[group], pool.block_size
    token_bytes = kv_group.bytes_per_token(dtype) // len(kv_group.layers)
    most = (MOST_GATHERED if device.type == "cpu" else MOST_GATHERED_CUDA) // token_bytes
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
    for members in gathered(readers, most):
        alone.difference_update(members)
        reads.gathers.append(_gather([readers[i] for i in members], len(queries), size, dtype, device))
    for i, (kv, query, reader) in enumerate(zip(kvs, queries, readers, strict=True)):
        query.spans.append(pool.spans(kv, group, reader.low, reader.stop) if i in alone else [])
    return reads


def shared_runs(readers: SequenceOf[Reader], least: int) -> list[Run]:
    """Runs of equal leading blocks, outer ones first, by which at least `least` blocks less are read.

    The runs of one reader follow each other from its first block on without a gap.
    """
    found: list[Run] = []
    _split(readers, range(len(readers)), 0, 0, least, found)
    return found


def gathered(readers: SequenceOf[Reader], most: int) -> list[list[int]]:
    """Readers (indices) with one query and at most `most` tokens, in lists of about as many: within a factor of 2."""
    buckets: dict[int, list[int]] = defaultdict(list)
    for index, reader in enumerate(readers):
        if reader.end - reader.begin == 1 and reader.num_tokens <= most:
            buckets[max(4, (reader.num_tokens - 1).bit_length())].append(index)
    return [bucket for bucket in buckets.values() if len(bucket) > 1]


def _reader(kv: KVState, query: Query, group: int, window: int | None, block_size: int) -> Reader:
    """The stored KV that a sequence's queries see: of a short query, its own tokens' too."""
    first = kv.num_computed_tokens
    low = 0 if window is None else max(0, first - window + 1)
    stop = first + query.end - query.begin if query.is_short else first
    num_shareable = first // block_size if window is None else 0
    return Reader(query.begin, query.end, kv.block_tables[group], low, stop, num_shareable)


def _split(
    readers: SequenceOf[Reader], members: SequenceOf[int], depth: int, start: int, least: int, found: list[Run]
) -> None:
    """Runs of `members`, whose tables agree up to `depth` and are served by runs already up to `start`."""
    agreeing: dict[int, list[int]] = defaultdict(list)
    for index in members:
        if readers[index].num_shareable > depth:
            agreeing[readers[index].table[depth]].append(index)
    for group in agreeing.values():
        if len(group) < 2:
            continue
        stop = depth + _num_common([readers[i].table[depth : readers[i].num_shareable] for i in group])
        pays = (len(group) - 1) * (stop - start) >= least
        if pays:
            found.append(Run(group, start, stop))
        _split(readers, group, stop, stop if pays else start, least, found)


def _num_common(tables: list[list[int]]) -> int:
    """Length of the longest common head: that of the first and the last in order."""
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
