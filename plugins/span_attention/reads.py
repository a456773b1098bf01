"""Plans how the tokens of a batch read stored KV: shared runs of blocks once, short contexts gathered, the rest alone.

To read the KV of a sequence in place costs a call per sequence, span and layer. To gather costs a copy, but one call serves all.
A prefix that several sequences share (a document, a system prompt) is read once for all their tokens (Juravsky et al. 2024,
Hydragen). The plan is made once per step and serves all layers of a group. Token and block ranges are half-open.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pitlane import visible_keys

if TYPE_CHECKING:
    from pitlane import Batch

MOST_SHORT = 72  # most tokens of a short query: room for a token with a draft of 64
# Bytes of one layer's KV. Time of gathered reads / time of single reads on 2 cores: 0.46 at 128 kB per sequence (float32), 0.88 at
# 384 kB (bfloat16), 1.12 at 416 kB (float32), more than 1.2 at 2 MB.
MOST_GATHERED, MOST_GATHERED_CUDA = 2**19, 2**24  # most bytes per sequence; on a GPU a call costs more than a copy
MIN_SHARED = 2**19  # least bytes that a shared run must save: its merge costs time


class Span(NamedTuple):
    """Adjacent slots of one sequence's KV: slots `[start, stop)` hold the tokens from index `first` on."""

    start: int
    stop: int
    first: int


class Query(NamedTuple):
    """The tokens `[begin, end)` of one sequence in a batch, which read its stored tokens `[low, stop)`.

    first: token index of the first query token. num_shareable: leading blocks of the table that every query token sees completely.
    A short query reads the KV of its own tokens from the store, so that a token is computed alike alone and among draft tokens.
    """

    begin: int
    end: int
    first: int
    table: list[int]
    low: int
    stop: int
    num_shareable: int

    @property
    def is_short(self) -> bool:
        """Whether a mask over all keys costs little: one token, a token with a draft, or a short piece of a prompt."""
        return is_short(self.end - self.begin)

    @property
    def num_tokens(self) -> int:
        return self.stop - self.low


class Mask(NamedTuple):
    """bias: [n, S], if folded [G * n, S]; 0 where a row sees a token, else -inf. blind: [n, 1] bool, rows without a token."""

    bias: Tensor
    blind: Tensor | None
    is_folded: bool

    def hide(self, lse: Tensor) -> Tensor:
        """Set the log-sum-exps [n, H] of blind rows to -inf, so that they weigh nothing. ATen returns out 0 and lse 0 for them."""
        return lse if self.blind is None else lse.masked_fill(self.blind, float("-inf"))


@dataclass(frozen=True, slots=True)
class Alone:
    """A sequence that reads spans by itself. own: the mask among the tokens of a long query, which also reads its new KV.

    `own` is None for a plain causal mask. parts: spans with their masks; no mask = every token sees the whole span.
    """

    begin: int
    end: int
    parts: list[tuple[Span, Mask | None]]
    is_short: bool
    own: Mask | None


@dataclass(frozen=True, slots=True)
class Gather:
    """Short contexts of B sequences with one query token each. One attention call reads copies of all of them, side by side.

    rows: [B] indices into T; None = all rows in order. slots: [B * S]; a context shorter than S is padded with its last slot.
    bias: [B, 1, 1, S] in the model's dtype: 0 for a slot of the context, -inf for padding.
    """

    rows: Tensor | None
    slots: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Shared:
    """Adjacent slots that several sequences see completely. rows: [n] indices of their query tokens into T."""

    rows: Tensor
    span: Span


class Run(NamedTuple):
    """Blocks `[start, stop)`, equal in the tables of several queries. members: indices of the queries."""

    members: list[int]
    start: int
    stop: int


class Reads(NamedTuple):
    """How a step reads one KV group. sink_gathers, sinks: the reads of second queries, of single tokens and of longer queries."""

    gathers: list[Gather]
    alone: list[Alone]
    shared: list[Shared]
    sink_gathers: list[Gather]
    sinks: list[Alone]


class Planner:
    """Makes the reads of a step. token_bytes: KV bytes of one token and layer. num_groups: query heads per KV head."""

    def __init__(self, token_bytes: int, num_groups: int, dtype: torch.dtype, device: torch.device) -> None:
        self.token_bytes, self.num_groups = token_bytes, num_groups
        self.dtype, self.device = dtype, device

    def plan(self, batch: Batch, group: int) -> Reads:
        size = batch.block_size
        queries = queries_of(batch, group)
        reads = Reads([], [], [], [], [])
        if batch.groups[group].sink_positions is not None:
            self._add_sinks(reads, queries, batch, group)
        for run in shared_runs(queries, max(1, MIN_SHARED // (size * self.token_bytes))):
            rows = [row for i in run.members for row in range(queries[i].begin, queries[i].end)]
            index = torch.tensor(rows, device=self.device)
            table = queries[run.members[0]].table
            reads.shared.extend(Shared(index, span) for span in spans(table, size, run.start * size, run.stop * size))
            for i in run.members:
                queries[i] = queries[i]._replace(low=run.stop * size)
        alone = set(range(len(queries)))
        max_gathered = (MOST_GATHERED if self.device.type == "cpu" else MOST_GATHERED_CUDA) // self.token_bytes
        for members in gathered(queries, max_gathered):
            alone.difference_update(members)
            reads.gathers.append(self._gather([queries[i] for i in members], len(queries), size))
        reads.alone.extend(self._alone(queries[i], batch, group) for i in sorted(alone))
        return reads

    def _add_sinks(self, reads: Reads, queries: list[Query], batch: Batch, group: int) -> None:
        """Plan how the second queries read the sinks: all single tokens in one call, a longer query alone."""
        part, single = batch.groups[group], []
        all_starts = part.window_start.numpy()
        for query in queries:
            starts = all_starts[query.begin : query.end]
            stop = min(part.num_sinks, int(starts.max()))
            if not stop:
                continue
            if len(starts) == 1:
                single.append(query._replace(low=0, stop=stop))
                continue
            parts: list[tuple[Span, Mask | None]] = []
            for span in spans(query.table, batch.block_size, 0, stop):
                seen = np.arange(span.first, span.first + span.stop - span.start) < starts[:, None]
                parts.append((span, None if seen.all() else self._mask(seen, query.is_short)))
            reads.sinks.append(Alone(query.begin, query.end, parts, True, None))
        if single:
            reads.sink_gathers.append(self._gather(single, len(queries), batch.block_size))

    def _alone(self, query: Query, batch: Batch, group: int) -> Alone:
        own_spans = spans(query.table, batch.block_size, query.low, query.stop)
        tokens = slice(query.begin, query.end)
        if query.end - query.begin == 1:  # `query.low` is its window start, so it sees all of its spans
            return Alone(query.begin, query.end, [(span, None) for span in own_spans], True, None)
        positions, starts = batch.positions.numpy()[tokens], batch.groups[group].window_start.numpy()[tokens]
        parents = batch.parents.numpy()[tokens] - query.begin
        parts: list[tuple[Span, Mask | None]] = []
        for span in own_spans:
            keys = np.arange(span.first, span.first + span.stop - span.start)
            if keys[-1] < query.first and starts.max() <= span.first:
                parts.append((span, None))
                continue
            seen = visible_keys(query.first, keys, positions, parents, starts)
            parts.append((span, None if seen.all() else self._mask(seen, query.is_short)))
        own = None
        if not query.is_short:
            seen = visible_keys(
                query.first, np.arange(query.first, query.first + len(parents)), positions, parents, starts
            )
            own = None if bool((seen == np.tri(len(parents), dtype=bool)).all()) else self._mask(seen, False)
        return Alone(query.begin, query.end, parts, query.is_short, own)

    def _mask(self, seen: np.ndarray, folded: bool) -> Mask:
        seen_keys = torch.from_numpy(seen).to(self.device)
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen_keys, float("-inf"))
        blind = None if seen.any(-1).all() else ~seen_keys.any(-1, keepdim=True)
        return Mask(bias.repeat(self.num_groups, 1) if folded else bias, blind, folded)

    def _gather(self, queries: list[Query], num_queries: int, block_size: int) -> Gather:
        tables = [query.table[query.low // block_size : -(-query.stop // block_size)] for query in queries]
        width = max(map(len, tables))
        blocks = np.array([[*table, *[table[-1]] * (width - len(table))] for table in tables])
        skipped = np.array([query.low % block_size for query in queries])[:, None]
        count = np.array([query.num_tokens for query in queries])[:, None]
        place = np.arange(count.max())
        index = skipped + np.minimum(place, count - 1)
        slots = np.take_along_axis(blocks, index // block_size, 1) * block_size + index % block_size
        bias = torch.zeros(slots.shape, dtype=self.dtype)
        bias.masked_fill_(torch.from_numpy(place >= count), float("-inf"))
        rows = None
        if len(queries) < num_queries:
            rows = torch.tensor([query.begin for query in queries], device=self.device)
        return Gather(rows, torch.from_numpy(slots.ravel()).to(self.device), bias[:, None, None].to(self.device))


def is_short(num_tokens: int) -> bool:
    return num_tokens <= MOST_SHORT


def queries_of(batch: Batch, group: int) -> list[Query]:
    """Return, for every sequence of the batch, its tokens and the stored tokens that they read."""
    part, size = batch.groups[group], batch.block_size
    tables, firsts = part.block_table.tolist(), batch.positions.numpy()[batch.query_start[:-1].numpy()].tolist()
    starts = part.window_start.numpy()
    queries = []
    for (begin, end), table, first in zip(pairwise(batch.query_start.tolist()), tables, firsts, strict=True):
        stop = first + end - begin if is_short(end - begin) else first
        sees_all = int(starts[begin:end].max()) == 0
        queries.append(Query(begin, end, first, table, int(starts[begin]), stop, first // size if sees_all else 0))
    return queries


def spans(table: SequenceOf[int], block_size: int, start: int, stop: int) -> list[Span]:
    """The tokens `[start, stop)` of a sequence as runs of adjacent slots, none of them empty."""
    runs: list[Span] = []
    for index in range(start // block_size, -(-stop // block_size) if start < stop else 0):
        low, high = max(start, index * block_size), min(stop, (index + 1) * block_size)
        base = (table[index] - index) * block_size
        if runs and runs[-1].stop == base + low:
            runs[-1] = Span(runs[-1].start, base + high, runs[-1].first)
        else:
            runs.append(Span(base + low, base + high, low))
    return runs


def shared_runs(queries: SequenceOf[Query], min_saved: int) -> list[Run]:
    """Find runs of equal leading blocks, outer runs first. A run saves at least `min_saved` block reads.

    The runs of one query follow each other without a gap, from its first block on.
    """
    runs: list[Run] = []
    _split(queries, range(len(queries)), 0, 0, min_saved, runs)
    return runs


def gathered(queries: SequenceOf[Query], max_tokens: int) -> list[list[int]]:
    """Group the queries (indices) of one token that read at most `max_tokens` tokens. Lengths differ by a factor below 2.

    All lengths up to 16 form one group.
    """
    buckets: dict[int, list[int]] = defaultdict(list)
    for index, query in enumerate(queries):
        if query.end - query.begin == 1 and query.num_tokens <= max_tokens:
            buckets[max(4, (query.num_tokens - 1).bit_length())].append(index)
    return [bucket for bucket in buckets.values() if len(bucket) > 1]


def _split(
    queries: SequenceOf[Query], members: SequenceOf[int], depth: int, start: int, min_saved: int, runs: list[Run]
) -> None:
    """Add the runs of `members` to `runs`. Their tables are equal up to `depth`; blocks before `start` are in a run already."""
    agreeing: dict[int, list[int]] = defaultdict(list)
    for index in members:
        if queries[index].num_shareable > depth:
            agreeing[queries[index].table[depth]].append(index)
    for group in agreeing.values():
        if len(group) < 2:
            continue
        stop = depth + _num_common([queries[i].table[depth : queries[i].num_shareable] for i in group])
        pays = (len(group) - 1) * (stop - start) >= min_saved
        if pays:
            runs.append(Run(group, start, stop))
        _split(queries, group, stop, stop if pays else start, min_saved, runs)


def _num_common(tables: list[list[int]]) -> int:
    """Length of the common prefix of all tables. It is the common prefix of the smallest and the largest table."""
    first, last = min(tables), max(tables)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
