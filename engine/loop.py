"""The decode loop. A step runs one forward of a lane's target model for all scheduled sequences.

Read `step` first. Every method runs on the engine's thread, which owns the sequences, pools and stores. The loop calls plugins
only through their hooks.
"""

from __future__ import annotations

import logging
from functools import partial
from time import perf_counter

import torch

from pitlane.engine.border import shown
from pitlane.engine.decode.draft import Draft, clean, fault
from pitlane.engine.decode.drawing import drawn, is_wanted
from pitlane.engine.decode.rows import Rows, split_rows
from pitlane.engine.decode.verify import Verified, verify_rows
from pitlane.engine.events import FinishReason, PrefillProgress, StepStats, TextDelta
from pitlane.engine.kv.eviction import evict_blocks
from pitlane.engine.lanes import Lanes
from pitlane.engine.pacing.drafting import Drafting
from pitlane.engine.plan.dispatch import Dispatcher, own_failure
from pitlane.engine.plan.hooks import HookError
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.roster import Roster
from pitlane.engine.run.lane import Lane
from pitlane.engine.run.limits import Limits
from pitlane.engine.run.runner import Flight
from pitlane.engine.sequence import Sequence

log = logging.getLogger("pitlane")


class Loop:
    """Runs steps. forward_seconds, step_seconds: sums over all steps."""

    def __init__(self, lanes: Lanes, roster: Roster, dispatch: Dispatcher, vocab_size: int) -> None:
        self.lanes, self.roster, self.dispatch, self.vocab_size = lanes, roster, dispatch, vocab_size
        self.ids: dict[int, int] = {}  # token id -> its one int object; else a long answer holds an object per token
        self.forward_seconds = 0.0
        self.step_seconds = 0.0

    def step(self, lane: Lane) -> None:
        """Run the target model of a lane once, for all its scheduled sequences."""
        started = perf_counter()
        seqs = lane.scheduler.schedule()
        if lane.pool.queue.operations:
            lane.flush()
        failed = [seq for seq in (*lane.scheduler.running, *lane.scheduler.waiting) if seq.error]
        if failed:
            for seq in failed:
                self.roster.end(seq, "error")
            seqs = [seq for seq in seqs if not seq.error]
        if not seqs:
            return
        draftings = self._draft(lane, seqs)
        flight = self._run(lane, seqs)
        if flight is not None:
            self._finish(lane, seqs, draftings, flight, started)

    def _draft(self, lane: Lane, seqs: list[Sequence]) -> list[Drafting]:
        draftings = []
        for drafting in lane.pacing.before(seqs, lane.draft_limit):
            started, drafting_seqs, asked = perf_counter(), list(drafting.seqs), drafting.asked

            hooks, check = drafting_seqs[0].plan.hook("propose"), partial(self._checked, drafting_seqs, asked)
            answer = self.dispatch.call(
                drafting_seqs, hooks, check, None, seqs=drafting_seqs, limits=Limits(asked, lane)
            )
            if answer is not None:
                drafting.drafts = answer.value
                for seq, draft in zip(drafting_seqs, drafting.drafts, strict=True):
                    seq.draft = draft
            drafting.seconds = perf_counter() - started
            draftings.append(drafting)
        return draftings

    def _checked(self, seqs: list[Sequence], asked: list[int], plugin: Plugin, drafts: object) -> list[Draft | None]:
        """Cut drafts that are too long or invalid: any prefix of a draft is a draft. The notes of the sequence name the fault."""
        if not isinstance(drafts, (list, tuple)) or len(drafts) != len(seqs):
            raise TypeError(f"returned {shown(drafts)}, not a list of {len(seqs)} drafts")
        wrong = next((draft for draft in drafts if not (draft is None or isinstance(draft, Draft))), None)
        if wrong is not None:
            raise TypeError(f"returned {shown(wrong)} in the list, not a Draft or None")
        kept = [clean(draft, limit, self.vocab_size) for draft, limit in zip(drafts, asked, strict=True)]
        for seq, limit, draft, part in zip(seqs, asked, drafts, kept, strict=True):
            reason = fault(draft, limit, self.vocab_size, part)
            if reason and limit > 0:  # a sequence that was not asked loses nothing
                note = seq.notes.setdefault(plugin.name, {})
                note["cut_drafts"] = note.get("cut_drafts", 0) + 1
                note.setdefault("cut_reason", reason)
        return kept

    def _run(self, lane: Lane, seqs: list[Sequence]) -> Flight | None:
        """Run the forward. Returns None if a plugin's part failed: the sequences then go on in another lane, or end."""
        try:
            return lane.runner.run(lane.build_batch(seqs))
        except (Exception, SystemExit) as error:
            plugin = lane.built.culprit(error)
            if plugin is None:
                raise
            self.dispatch.drop(seqs, HookError(plugin, "forward", error))
            for seq in seqs:
                self.roster.settle(lane, seq)
            return None

    def _finish(
        self, lane: Lane, seqs: list[Sequence], draftings: list[Drafting], flight: Flight, started: float
    ) -> None:
        num_draft = sum(seq.num_draft_tokens for seq in seqs)
        num_tokens = num_draft + sum(seq.num_scheduled_tokens for seq in seqs)
        num_prompt = sum(seq.num_scheduled_tokens for seq in seqs if not seq.is_decoding)
        plain = lane.pacing.forward_seconds(num_tokens - num_draft) or flight.seconds
        drafting_of = {seq.id: drafting for drafting in draftings for seq in drafting.seqs}
        verified_ids = self._verify_all(lane, seqs, flight, drafting_of, plain)
        if lane.pool.queue.operations:  # moves of accepted draft tokens: only whole KV is cached and saved
            lane.flush()
        for seq in seqs:
            seq.timing.num_steps += 1
            seq.timing.admitted = seq.timing.admitted or started
            if seq.id not in verified_ids:
                self._advance(seq)
            seq.num_scheduled_tokens = 0
            if not seq.error:
                with own_failure(seq):
                    self._seal(lane, seq)
            self.roster.settle(lane, seq)
        num_accepted = sum(sum(drafting.num_accepted.values()) for drafting in draftings)
        seconds = perf_counter() - started
        stats = StepStats(len(seqs), num_tokens, num_prompt, num_draft, num_accepted, flight.seconds, seconds)
        lane.pacing.after(stats, draftings)
        lane.busy_seconds += stats.seconds
        self.forward_seconds += flight.seconds
        self.step_seconds += stats.seconds
        self._tell_finished(seqs, stats)
        self.dispatch.check_times(seqs, perf_counter() - started)

    def _tell_finished(self, seqs: list[Sequence], stats: StepStats) -> None:
        """Call `step_finished` once for every plugin of the step."""
        plans = {id(seq.plan): seq.plan for seq in seqs}
        if len(plans) == 1:
            self.dispatch.call(seqs, seqs[0].plan.hook("step_finished"), None, stats=stats)
            return
        hooks = {id(hook.plugin): hook for plan in plans.values() for hook in plan.hook("step_finished")}
        for hook in hooks.values():
            own_seqs = [seq for seq in seqs if hook.plugin in seq.plan.plugins]
            self.dispatch.call(own_seqs, (hook,), None, stats=stats)

    def _verify_all(
        self, lane: Lane, seqs: list[Sequence], flight: Flight, drafting_of: dict[int, Drafting], plain: float
    ) -> set[int]:
        """Verify and commit the sequences whose last known token this step computed. Returns their ids."""
        verifiable = [seq for seq in seqs if seq.num_scheduled_tokens == seq.num_uncomputed_tokens]
        with torch.inference_mode():
            rows_by_plan = split_rows(flight.logits, verifiable)
            pairs = [
                pair for rows in rows_by_plan for pair in self._verify(lane, rows, drafting_of.get(rows.seqs[0].id))
            ]
        for seq, verified in pairs:
            with own_failure(seq):
                self._accept(lane, seq, verified, drafting_of.get(seq.id), flight.seconds, plain)
        return {seq.id for seq, _ in pairs}

    def _verify(self, lane: Lane, rows: Rows, drafting: Drafting | None) -> list[tuple[Sequence, Verified]]:
        """Verify the sequences of one plan. For `after_verify` hooks, draw a token in every row, and tell pacing the time."""
        started = perf_counter()
        wants_targets = bool(rows.seqs[0].plan.hook("after_verify")) and len(rows.parents) > len(rows.seqs)
        pairs = verify_rows(rows, self.dispatch, wants_targets, partial(self._drawn, lane))
        if wants_targets and drafting is not None:
            drafting.num_rows, drafting.row_seconds = len(rows.parents), perf_counter() - started
        return pairs

    def _drawn(self, lane: Lane, rows: Rows) -> list[int] | None:
        """The token after every row, drawn by the operation of a plugin. None: there is none, or it failed; the host draws."""
        answer = lane.built.sample
        if answer is None or not is_wanted(rows):
            return None
        try:
            return drawn(rows, answer.value)
        except (Exception, SystemExit) as error:
            self.dispatch.drop(rows.seqs, HookError(answer.plugin, "sample", error))
            return None

    def _accept(
        self, lane: Lane, seq: Sequence, verified: Verified, drafting: Drafting | None, seconds: float, plain: float
    ) -> None:
        """Commit verified tokens up to the end of the answer. seconds: of this forward. plain: of a forward without drafts."""
        timing, now = seq.timing, perf_counter()
        tokens: list[int] = []
        text = ""
        for token in verified.token_ids:
            tokens.append(self.ids.setdefault(token, token))
            seq.finish_reason, piece = self._ends(lane, seq, token, len(tokens))
            text += piece
            if seq.finish_reason:
                break
        if seq.draft is not None:
            num_accepted = min(len(verified.nodes), len(tokens))
            if verified.targets:
                values = {"draft": seq.draft, "targets": verified.targets, "accepted": verified.nodes}
                self.dispatch.call([seq], seq.plan.hook("after_verify"), None, seq=seq, **values)
            if drafting is not None:
                drafting.num_accepted[seq.id] = len(verified.nodes)
            timing.num_draft_tokens += seq.num_draft_tokens
            timing.num_accepted_tokens += num_accepted
            timing.plain_step_seconds += num_accepted * plain
            timing.draft_extra_seconds += seconds - plain
        seq.logprobs += verified.logprobs[: len(tokens)]
        lane.commit(seq, verified.nodes[: len(tokens)], tokens)
        timing.first_token = timing.first_token or now
        timing.add_tokens(len(tokens), now)
        self.roster.put(seq, TextDelta(text, tuple(tokens), seq.sample))

    def _ends(self, lane: Lane, seq: Sequence, token: int, num_new: int) -> tuple[FinishReason | None, str]:
        """Return the finish reason, or None if the sequence goes on, and the text that the token adds."""
        if token in seq.request.stop_token_ids:
            return "stop", ""
        text = seq.detokenizer.push([token])
        if seq.detokenizer.stopped:
            return "stop", text
        is_full = seq.num_tokens + num_new >= lane.max_tokens_per_seq
        return "length" if is_full or seq.num_remaining_tokens <= num_new else None, text

    def _advance(self, seq: Sequence) -> None:
        """Count a computed chunk of a prompt, and report the progress."""
        kv = seq.kv
        kv.num_computed_tokens += seq.num_scheduled_tokens
        self.roster.put(
            seq, PrefillProgress(kv.num_computed_tokens, seq.request.num_prompt_tokens, kv.num_cached_tokens)
        )

    def _seal(self, lane: Lane, seq: Sequence) -> None:
        kv = seq.kv
        while (kv.num_sealed_blocks + 1) * lane.pool.block_size <= kv.num_computed_tokens:
            index = kv.num_sealed_blocks
            self.dispatch.call([seq], seq.plan.hook("block_sealed"), None, seq=seq, index=index, lane=lane)
            kv.num_sealed_blocks += 1
        # A document may end in the open block, and plugins save it when this block is sealed. So keep all blocks that a token
        # behind the sealed blocks sees.
        lane.pool.drop(kv, kv.num_sealed_blocks * lane.pool.block_size)
        if lane.pool.intervals:
            self._evict(lane, seq)

    def _evict(self, lane: Lane, seq: Sequence) -> None:
        try:
            evict_blocks(lane.pool, lane.stores, seq.kv)
        except (Exception, SystemExit) as error:
            plugin = next(plugin for plugin in seq.plan.plugins if plugin.role == "eviction")
            self.dispatch.drop([seq], HookError(plugin, "trim_cache", error))

    # ---- for the worker

    def ready_lanes(self) -> list[Lane]:
        return [lane for lane in self.lanes.all if lane.has_work and not lane.scheduler.is_loading]

    def step_safely(self) -> None:
        """Run a step. If it fails, end the requests of its lane that were in it, and go on."""
        lane = min(self.ready_lanes(), key=lambda lane: lane.busy_seconds)
        try:
            self.step(lane)
        except (Exception, SystemExit) as error:  # a part of a plugin may call sys.exit()
            log.exception("a step failed")
            self.roster.fail(lane, error)
