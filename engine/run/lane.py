"""A lane runs one set of weights with one choice of operations and attention.

A lane owns its stores, pool, attention, runner, scheduler, pacing and share of KV memory. Plans that differ only in step plugins
(drafters, samplers) share a lane and its KV, so to toggle such a plugin recomputes no KV.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from functools import partial
from threading import Lock
from time import perf_counter
from typing import Protocol
from weakref import WeakSet

import torch

from pitlane.engine.decode.draft import Draft, up_to_depth
from pitlane.engine.decode.draft_model import DraftModel
from pitlane.engine.kv.capacity import BLOCK_SIZE, GroupNeeds, LaneLimits, num_blocks
from pitlane.engine.kv.operations import Copy
from pitlane.engine.kv.pool import DROPPED, Pool
from pitlane.engine.kv.state import KVState, PrefixMatch
from pitlane.engine.pacing.governor import CALIBRATED
from pitlane.engine.pacing.pacing import Pacing
from pitlane.engine.plan.dispatch import named
from pitlane.engine.plan.hooks import Hook
from pitlane.engine.plan.plan import Plan
from pitlane.engine.run.batch import Batch, BatchBuilder, Chunk
from pitlane.engine.run.built_model import BuiltModel
from pitlane.engine.run.runner import EarlyExit, Runner
from pitlane.engine.run.scheduler import Scheduler
from pitlane.engine.sequence import Sequence
from pitlane.engine.text.tokenizer import Tokenizer

log = logging.getLogger("pitlane")
MAX_POSITION = 2**31 - 1  # with sinks, sequences have no other limit; there, an angle in float64 is exact to 5e-7
Call = Callable[[Callable[[], None]], "Future[None]"]
Match = Callable[["Lane", Sequence], PrefixMatch | None]
Reclaim = Callable[["Lane", SequenceOf[int]], None]


class State(Protocol):
    """An object of a plugin in `lane.state`."""

    def close(self) -> None:
        """Called when the lane is dropped, or when the engine closes."""


class Lane:
    """The stores, pool, attention, runner, scheduler and pacing of one set of weights.

    match: asks the plugins for a prefix. reclaim: asks them for blocks. load_drafter: builds the draft model of a name. call: runs
    a function on the engine's thread. tokenizer: of the model, for plugins. state: objects of plugins, for all plans of the lane.
    opened: plans whose `lane_opened` hooks were called.
    """

    def __init__(
        self,
        built: BuiltModel,
        fingerprint: str,
        dtype: torch.dtype,
        device: torch.device,
        limits: LaneLimits,
        match: Match,
        reclaim: Reclaim,
        load_drafter: Callable[[str], BuiltModel],
        call: Call,
        tokenizer: Tokenizer,
    ) -> None:
        groups, size, self.limits = built.model.kv_groups, BLOCK_SIZE, limits
        self.built, self.dtype, self.device = built, dtype, device
        self.load_drafter, self.call, self.tokenizer = load_drafter, call, tokenizer
        counts = num_blocks([*map(GroupNeeds.of, built.stores, built.visibilities)], limits)
        self.stores = [plan.build(count, size) for plan, count in zip(built.stores, counts, strict=True)]
        self.pool = Pool(
            groups,
            counts,
            size,
            fingerprint,
            built.visibilities,
            limits.max_step_tokens,
            any(plan.whole_blocks for plan in built.stores),
            [plan.saved_dim or group.head_dim for plan, group in zip(built.stores, groups, strict=True)],
        )
        self.builder = BatchBuilder(self.pool)
        self.runner = Runner(built.forward(self.stores))
        self.pacing = Pacing(limits.max_step_tokens)
        self.scheduler = Scheduler(
            self.pool,
            limits.max_step_tokens,
            limits.max_seqs,
            partial(match, self),
            partial(reclaim, self),
            self.pacing,
        )
        self.draft_models: dict[str, DraftModel] = {}
        self.built_drafters: list[BuiltModel] = []  # keeps the weights of the draft models alive
        self.state: dict[str, State] = {}
        self.opened: WeakSet[Plan] = WeakSet()
        self.reclaimers: dict[str, Hook] = {}  # by plugin name; they stay after the plan is gone, as `state` does
        self.opening = Lock()  # held while a plan is prepared; the engine's thread never takes it
        self.is_calibrated = False
        self.busy_seconds = 0.0  # for fairness between lanes
        self.last_used = perf_counter()

    @property
    def max_tokens_per_seq(self) -> int:
        """The token limit of a sequence: the context, or less if the blocks that are not withheld hold fewer tokens.

        With sinks, the context is no limit.
        """
        return int(min(MAX_POSITION if self.pool.is_endless else self.limits.context, self.pool.num_usable_tokens))

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def kv_bytes(self, kv: KVState) -> int:
        """Bytes of the blocks that a sequence holds."""
        pairs = zip(self.built.stores, kv.block_tables, strict=False)
        return sum(plan.bytes_per_token * BLOCK_SIZE * sum(b != DROPPED for b in table) for plan, table in pairs)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the stored KV of a token in all layers."""
        return sum(plan.bytes_per_token for plan in self.built.stores)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights of the model and its draft models. Shared weights count once."""
        return sum(variant.num_bytes for variant in {built.variant for built in (self.built, *self.built_drafters)})

    def is_open(self, plan: Plan) -> bool:
        """Whether a request under this plan can start at once."""
        if plan in self.opened:
            return True
        is_ready = plan.drafter is None or self.is_calibrated
        return is_ready and not plan.hook("lane_opened") and not plan.hook("reclaim_blocks")

    def open_for(self, plan: Plan) -> None:
        """Note that the lane is ready for a plan."""
        self.opened.add(plan)
        new = {hook.plugin.name: hook for hook in plan.hook("reclaim_blocks")}
        self.reclaimers = self.reclaimers | new  # a new dict, because the engine's thread may iterate over the old one

    def close(self) -> None:
        """Close the plugins' objects. Remove the scheduler's references to the lane, so that it is freed at once."""
        self.scheduler.prefixes.match = lambda seq: None
        self.scheduler.reclaim = lambda num_blocks: None
        while self.state:
            name, state = self.state.popitem()
            try:
                state.close()
            except Exception:
                log.exception("the lane state of plugin %s could not be closed", name)

    # ---- before the first request

    def warm_up(self, num_tokens: int) -> None:
        """Run the model twice on zeros, in free blocks. This compiles kernels, touches weights and gives pacing an estimate."""
        num_tokens = min(num_tokens, self.limits.max_step_tokens, self.max_tokens_per_seq)
        self.flush()  # waiting operations may read the free blocks
        kv = KVState()
        if not self.pool.reserve(kv, num_tokens):
            return
        try:
            for _ in range(2):
                flight = self.runner.run(self.builder.build([Chunk(kv, [0] * num_tokens, None, True)]))
        finally:
            self.pool.release(kv)
        self.pacing.clock.record(num_tokens, num_tokens, flight.seconds)

    def calibrate(self) -> None:
        """Time forwards of the sizes that drafts make, so that pacing need not try them with requests.

        Requests may take steps between two forwards. Do not call it on the engine's thread.
        """
        for num_tokens in CALIBRATED:
            self.call(partial(self.warm_up, num_tokens)).result()
        self.is_calibrated = True

    # ---- draft models

    def open_drafter(self, name: str) -> DraftModel:
        """Return the draft model of a name; load it on first use. Call this in `lane_opened`, where a load delays no step.

        The lane pays for the KV of the draft model: it withholds free blocks, so that both models hold equally many tokens.
        """
        if name not in self.draft_models:
            built = self.load_drafter(name)
            self.call(lambda: self._attach(name, built)).result()
        return self.draft_models[name]

    def early_exit(self, num_layers: int) -> DraftModel:
        """Return the first layers of the lane's model as a draft model. It uses the lane's KV; the target overwrites its slots."""
        key = f"layers:{num_layers}"
        if key not in self.draft_models:
            model = EarlyExit(self.built.model, num_layers)
            runner = Runner(self.built.forward(self.stores, model))
            self.draft_models[key] = DraftModel(self.builder, runner, self.limits.max_step_tokens, shares_kv=True)
        return self.draft_models[key]

    def _attach(self, name: str, built: BuiltModel) -> None:
        pool, groups = self.pool, built.model.kv_groups
        target_bytes = sum(self.built.stores[index].bytes_per_token for index in pool.paying_groups)  # KV of a token
        draft_bytes = sum(plan.bytes_per_token for plan in built.stores)
        allocators = [pool.allocators[index] for index in pool.paying_groups]
        num_usable = min(len(allocator.counts) for allocator in allocators) - max(pool.withheld)
        share = -(-num_usable * draft_bytes // (target_bytes + draft_bytes))
        withheld = min(num_usable - 1, share, *(allocator.num_free for allocator in allocators))
        pool.withhold(withheld)
        count = max(1, withheld * target_bytes // draft_bytes)
        stores = [plan.build(count, BLOCK_SIZE) for plan in built.stores]
        builder = BatchBuilder(Pool(groups, [count] * len(groups), BLOCK_SIZE, "", built.visibilities))
        runner = Runner(built.forward(stores))
        self.built_drafters.append(built)
        self.draft_models[name] = DraftModel(builder, runner, self.limits.max_step_tokens, shares_kv=False)

    def draft_limit(self, seq: Sequence) -> int:
        """Return the draft length that answer length, context, step and free blocks allow. No block is given back for a draft.

        A draft ends before the place of the next eviction.
        """
        if not seq.is_decoding or seq.num_scheduled_tokens != 1:
            return 0
        pairs = zip(seq.kv.block_tables, self.pool.allocators, strict=True)
        room = min(len(table) + allocator.num_free for table, allocator in pairs) * BLOCK_SIZE - seq.num_tokens
        left = min(seq.num_remaining_tokens - 1, self.max_tokens_per_seq - seq.num_tokens)
        before_eviction = self.pool.num_before_eviction(seq.kv.num_computed_tokens) - 1
        return int(max(0, min(left, room, self.limits.max_step_tokens, before_eviction)))

    # ---- a step

    def build_batch(self, seqs: SequenceOf[Sequence]) -> Batch:
        """Build the batch of the scheduled tokens and drafts of `seqs`. Drop a draft if blocks for it are lacking."""
        chunks = []
        for seq in seqs:
            if seq.draft is not None and seq.draft.parents is not None and self.pool.whole_blocks:
                seq.draft = self._within_block(seq, seq.draft)
            if seq.draft is not None and not self.pool.reserve(seq.kv, seq.num_tokens + seq.num_draft_tokens):
                seq.draft = None
            start = seq.kv.num_computed_tokens
            stop = start + seq.num_scheduled_tokens
            chunks.append(Chunk(seq.kv, seq.token_ids[start:stop], seq.draft, stop == seq.num_tokens))
        return self.builder.build(chunks)

    @staticmethod
    def _within_block(seq: Sequence, tree: Draft) -> Draft | None:
        """Cut a tree at the end of the block that holds the last known token."""
        return up_to_depth(tree, BLOCK_SIZE - 1 - (seq.num_tokens - 1) % BLOCK_SIZE)

    def commit(self, seq: Sequence, nodes: list[int], token_ids: list[int]) -> None:
        """Append verified tokens. Move the KV of accepted tree nodes to its place. Release the blocks behind the last token.

        nodes: indices of the accepted draft tokens, in order.
        """
        base = seq.num_tokens
        moves = [(base + node, base + depth) for depth, node in enumerate(nodes) if node != depth]
        for group in range(len(self.pool.groups)) if moves else ():
            sources, targets = (
                [self.pool.slots(seq.kv, group, index, index + 1)[0] for index in indices]
                for indices in zip(*moves, strict=True)
            )
            self.pool.queue.append(Copy(group, sources, targets))
        seq.token_ids += token_ids
        seq.kv.num_computed_tokens = base + len(nodes)
        seq.draft = None
        self.pool.roll_back(seq.kv, seq.kv.num_computed_tokens)

    def flush(self) -> None:
        """Carry out the waiting KV operations.

        If an operation fails, the KV of the sequences is unknown: every sequence with KV gets an error, and the loop ends it.
        """
        queue = self.pool.queue
        if not queue.operations:
            return
        try:
            queue.deliver(self.runner.carry_out(self.builder.build((), queue.take())))
        except (Exception, SystemExit) as error:
            log.exception("a KV operation failed")
            queue.clear()
            for seq in self.scheduler.seqs:
                if seq.kv.num_computed_tokens > 0:
                    seq.error = seq.error or named(error, "stored KV could not be moved")
