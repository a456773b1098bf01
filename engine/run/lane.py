"""A variant is one set of weight tensors; a lane is everything that runs it in one way.

A lane owns its stores, pool, attention, runner, scheduler and share of KV memory. Plans that differ only in step plugins
(drafters, samplers) share a lane and its KV, so toggling those recomputes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import chain, groupby, pairwise
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from pitlane.engine.decode.draft_model import DraftModel
from pitlane.engine.decode.verify import depths
from pitlane.engine.kv.pool import Pool
from pitlane.engine.kv.store import KVStore
from pitlane.engine.pacing.clock import StepClock
from pitlane.engine.pacing.governor import CALIBRATED, Governor
from pitlane.engine.run.attention import Attention
from pitlane.engine.run.batch import Batch, Copy, Query, Span
from pitlane.engine.run.runner import EarlyExit, Model, Runner
from pitlane.engine.run.scheduler import Match, Reclaim, Scheduler
from pitlane.engine.types import Draft, Rows, Sequence

if TYPE_CHECKING:
    from concurrent.futures import Future

    from pitlane.engine.plan.plan import Plan

Call = Callable[[Callable[[], None]], "Future[None]"]
BLOCK_SIZE = 32
KV_FORMAT = "1"  # raised when the meaning of saved KV changes


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """kv_bytes: this lane's share of KV memory; context: most tokens of a sequence."""

    kv_bytes: int
    context: int
    max_step_tokens: int = 512
    max_seqs: int = 64


class Lane:
    """One way to run one variant: `draft_limit`, `build_batch`, `rows`, `commit`; `open_drafter` and `early_exit` for drafters."""

    variant: Model  # whose weights it runs; shared while a lane holds it
    load_drafter: Callable[[str], tuple[Model, Attention]]
    call: Call

    def __init__(
        self,
        model: Model,
        fingerprint: str,
        attention: Attention,
        dtype: torch.dtype,
        device: torch.device,
        limits: LaneLimits,
        match: Match,
        reclaim: Reclaim,
    ) -> None:
        groups = model.kv_groups
        self.dtype = dtype
        per_block = BLOCK_SIZE * sum(group.bytes_per_token(dtype) for group in groups)
        num_blocks = max(1, limits.kv_bytes // per_block)
        self.fingerprint = fingerprint
        self.limits = limits
        self.device = device
        self.stores = [KVStore(group, num_blocks * BLOCK_SIZE, dtype, device) for group in groups]
        self.pool = Pool(groups, num_blocks, BLOCK_SIZE, fingerprint)
        self.runner = Runner(model, self.stores, attention)
        self.clock = StepClock()
        self.scheduler = Scheduler(self.pool, limits.max_step_tokens, limits.max_seqs, match, reclaim, self.clock)
        self.governor = Governor(self.clock, limits.max_step_tokens)
        self.busy_seconds = 0.0  # time used, for fairness between lanes
        self.draft_models: dict[str, DraftModel] = {}
        self.opened: WeakSet[Plan] = WeakSet()
        self.is_calibrated = False

    @property
    def max_tokens_per_seq(self) -> int:
        """Most tokens that one sequence can have: the context, or all of the pool that no draft model took."""
        return min(self.limits.context, (self.pool.num_blocks - self.pool.num_withheld) * BLOCK_SIZE)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def warm_up(self, num_tokens: int) -> None:
        """Run the model twice on nothing, in free blocks: kernels are made, weights are touched, the clock has an estimate."""
        num_tokens = min(num_tokens, self.limits.max_step_tokens, self.max_tokens_per_seq)
        with self.pool.borrowed(num_tokens) as slots:
            if slots is None:
                return
            query = Query(0, num_tokens, [])
            query.spans += [[Span(found[0], found[0] + num_tokens, 0)] if query.is_short else [] for found in slots]
            index = torch.arange(num_tokens, device=self.device)
            targets = [torch.tensor(found, device=self.device) for found in slots]
            batch = Batch(torch.zeros_like(index), index, targets, [query], index[-1:])
            for _ in range(2):
                flight = self.runner.launch(batch)
                flight.wait()
        self.clock.record(num_tokens, num_tokens, flight.seconds)

    def calibrate(self) -> None:
        """Time forwards as drafts make them, so that the governor need not try their sizes one by one."""
        for num_tokens in CALIBRATED:
            self.warm_up(num_tokens)

    def open_drafter(self, name: str) -> DraftModel:
        """The named model beside this lane; loaded on first use, so first used where loading stalls nobody: in `lane_opened`.

        Its KV is charged to this lane: so many free blocks are withheld that both can hold the same tokens.
        """
        if name not in self.draft_models:
            model, attention = self.load_drafter(name)
            self.call(lambda: self._attach(name, model, attention)).result()
        return self.draft_models[name]

    def _attach(self, name: str, model: Model, attention: Attention) -> None:
        own = sum(group.bytes_per_token(self.dtype) for group in self.pool.groups)
        extra = sum(group.bytes_per_token(self.dtype) for group in model.kv_groups)
        rest = self.pool.num_blocks - self.pool.num_withheld
        withheld = min(self.pool.num_free_blocks, rest - 1, -(-rest * extra // (own + extra)))
        self.pool.withhold(withheld)
        limits = replace(self.limits, kv_bytes=withheld * BLOCK_SIZE * own)
        lane = Lane(model, "", attention, self.dtype, self.device, limits, _no_match, _no_reclaim)
        self.draft_models[name] = DraftModel(lane, lane.runner, shares_kv=False)

    def early_exit(self, num_layers: int) -> DraftModel:
        """The first layers of this lane's own model as a draft model; they read this lane's KV, and write draft slots only."""
        key = f"layers:{num_layers}"
        if key not in self.draft_models:
            runner = Runner(EarlyExit(self.runner.model, num_layers), self.stores, self.runner.attention)
            self.draft_models[key] = DraftModel(self, runner, shares_kv=True)
        return self.draft_models[key]

    def draft_limit(self, seq: Sequence) -> int:
        """Most draft tokens that answer length, context, a step and free blocks leave; nothing is evicted for a draft."""
        if not seq.is_decoding or seq.num_scheduled_tokens != 1:
            return 0
        size = self.pool.block_size
        room = len(seq.block_tables[0]) * size + self.pool.num_free_blocks * size - seq.num_tokens
        left = min(seq.num_remaining_tokens - 1, self.max_tokens_per_seq - seq.num_tokens)
        return max(0, min(left, room, self.limits.max_step_tokens))

    def build_batch(self, seqs: SequenceOf[Sequence]) -> Batch:
        """Lay the scheduled and draft tokens of `seqs` flat; reserve the drafts' slots or drop the drafts."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[list[int]] = [[] for _ in self.pool.groups]
        queries: list[Query] = []
        logit_rows: list[int] = []
        for seq in seqs:
            if seq.draft is not None and not self.pool.reserve(seq, seq.num_tokens + len(seq.draft.token_ids)):
                seq.draft = None
            begin, first = len(token_ids), seq.num_computed_tokens
            stop = first + seq.num_scheduled_tokens
            token_ids += seq.token_ids[first:stop]
            positions += range(first, stop)
            if stop == seq.num_tokens:
                logit_rows.append(len(token_ids) - 1)
            ancestors = None
            if seq.draft is not None:
                logit_rows += range(len(token_ids), len(token_ids) + len(seq.draft.token_ids))
                token_ids += seq.draft.token_ids
                positions += _draft_positions(seq.draft, stop)
                if seq.draft.parents is not None:
                    ancestors = _ancestors(seq.draft.parents).to(self.device)
            last = first + len(token_ids) - begin
            for group, found in enumerate(slots):
                found += self.pool.slots(seq, group, first, last)
            queries.append(Query(begin, len(token_ids), [], ancestors))
        plan = self.runner.attention.plan
        reads = [plan(self.pool, group, seqs, queries, self.dtype) for group in range(len(slots))]
        operations, self.pool.operations = self.pool.operations, []
        lists = [token_ids, positions, logit_rows, *slots]
        flat = torch.tensor(list(chain.from_iterable(lists)), device=self.device)  # one copy to the device, not four
        ids, places, rows, *targets = flat.split([len(each) for each in lists])
        return Batch(ids, places, targets, queries, rows, operations, reads)

    def rows(self, logits: torch.Tensor, seqs: SequenceOf[Sequence]) -> list[Rows]:
        """Split logits [R, V] by plan; sequences whose last known token was computed have rows."""
        wanted = [seq for seq in seqs if seq.num_computed_tokens + seq.num_scheduled_tokens == seq.num_tokens]
        spans, at = {}, 0
        for seq in wanted:
            size = 1 + (len(seq.draft.token_ids) if seq.draft else 0)
            spans[seq.id] = (at, at + size)
            at += size
        found = []
        for _, group in groupby(sorted(wanted, key=lambda seq: id(seq.plan)), key=lambda seq: id(seq.plan)):
            found.append(_rows_of(logits, list(group), spans))
        return found

    def commit(self, seq: Sequence, nodes: list[int], token_ids: list[int]) -> None:
        """Append verified tokens; their KV is moved in place if it is not, the rest of the draft's is given back."""
        base = seq.num_tokens
        moved = [(base + node, base + depth) for depth, node in enumerate(nodes) if node != depth]
        for group in range(len(self.pool.groups)) if moved else ():
            sources, targets = (
                [self.pool.slots(seq, group, index, index + 1)[0] for index in indices]
                for indices in zip(*moved, strict=True)
            )
            self.runner.execute([Copy(group, sources, targets)])
        seq.token_ids += token_ids
        seq.num_computed_tokens = base + len(nodes)
        seq.draft = None
        self.pool.roll_back(seq, seq.num_computed_tokens)


def _no_match(seq: Sequence, pool: Pool) -> None:
    """Draft models find no prefixes."""


def _no_reclaim(pool: Pool, num_blocks: int) -> None:
    """Nor does anyone hold their blocks."""


def fingerprint(*parts: str) -> str:
    """Digest of all that stored KV depends on."""
    digest = hashlib.sha256()
    for part in (KV_FORMAT, *parts):
        digest.update(len(part).to_bytes(4, "little") + part.encode())
    return digest.hexdigest()


def _draft_positions(draft: Draft, first: int) -> SequenceOf[int]:
    if draft.parents is None:
        return range(first, first + len(draft.token_ids))
    return [first - 1 + depth for depth in depths(draft.parents)]


def _ancestors(parents: SequenceOf[int]) -> torch.Tensor:
    """[1 + K, 1 + K] bool: a node sees the last known token, its ancestors and itself."""
    size = 1 + len(parents)
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[0, 0] = True
    for index, parent in enumerate(parents):
        mask[index + 1] = mask[parent + 1]
        mask[index + 1, index + 1] = True
    return mask


def _rows_of(logits: torch.Tensor, seqs: list[Sequence], spans: dict[int, tuple[int, int]]) -> Rows:
    seq_index: list[int] = []
    parents: list[int] = []
    token_ids: list[int] = []
    for index, seq in enumerate(seqs):
        base = len(parents)
        draft = seq.draft or Draft(())
        links = draft.parents if draft.parents is not None else range(-1, len(draft.token_ids) - 1)
        parents += [-1, *(base + 1 + parent for parent in links)]
        token_ids += [seq.token_ids[-1], *draft.token_ids]
        seq_index += [index] * (1 + len(draft.token_ids))
    bounds = [spans[seq.id] for seq in seqs]
    if all(a[1] == b[0] for a, b in pairwise(bounds)):
        return Rows(logits[bounds[0][0] : bounds[-1][1]], seqs, seq_index, parents, token_ids)
    return Rows(torch.cat([logits[low:high] for low, high in bounds]), seqs, seq_index, parents, token_ids)
