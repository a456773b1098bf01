"""The decode loop. A step runs one forward of a lane's target model for all scheduled sequences.

Read `step` first. Every method runs on the engine's thread, which owns the sequences, pools and stores. The loop calls plugins
only through their hooks.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from time import perf_counter
from typing import Any

import torch

from pitlane.engine.decode.draft import Draft, clean
from pitlane.engine.decode.rows import Rows, split_rows
from pitlane.engine.decode.verify import Verified, verify_rows
from pitlane.engine.errors import PitlaneError, PluginFailed
from pitlane.engine.events import Finished, FinishReason, PrefillProgress, Result, StepStats, TextDelta
from pitlane.engine.lanes import Lanes
from pitlane.engine.loader import Loader
from pitlane.engine.pacing.drafting import Drafting
from pitlane.engine.plan.dispatch import Dispatcher, named, own_failure
from pitlane.engine.plan.hooks import HookError
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.requests import check_length
from pitlane.engine.run.lane import Lane
from pitlane.engine.run.limits import Limits
from pitlane.engine.run.runner import Flight
from pitlane.engine.sequence import Sequence
from pitlane.engine.stats import request_stats
from pitlane.engine.stream import Stream

log = logging.getLogger("pitlane")


class Loop:
    """Runs the sequences of all lanes, and ends them.

    seqs: live sequences by id. lane_of: the lane of every sequence, once the lane is open. streams: the stream of every sequence,
    held weakly: when the caller drops a stream, its entry disappears. forward_seconds, step_seconds: sums over all steps.
    """

    def __init__(
        self, lanes: Lanes, loader: Loader, dispatch: Dispatcher, post: Callable[[Callable[[], None]], object]
    ) -> None:
        self.lanes, self.loader, self.dispatch, self.post = lanes, loader, dispatch, post
        self.seqs: dict[int, Sequence] = {}
        self.lane_of: dict[int, Lane] = {}
        self.streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
        self.forward_seconds = 0.0
        self.step_seconds = 0.0

    def step(self) -> None:
        """Run the target model of one lane once, for all its scheduled sequences."""
        started = perf_counter()
        lane = min(self.ready_lanes(), key=lambda lane: lane.busy_seconds)
        seqs = lane.scheduler.schedule()
        for seq in [seq for seq in lane.scheduler.waiting if seq.error]:
            self.end(seq, "error")
        if not seqs:
            return
        draftings = self._draft(lane, seqs)
        flight = self._launch(lane, seqs)
        if flight is not None:
            self._finish(lane, seqs, draftings, flight, started)

    def _draft(self, lane: Lane, seqs: list[Sequence]) -> list[Drafting]:
        draftings = []
        for drafting in lane.pacing.before(seqs, lane.draft_limit):
            started, drafting_seqs, asked = perf_counter(), list(drafting.seqs), drafting.asked

            def check(_: Plugin, drafts: list[Draft | None], asked: list[int] = asked) -> list[Draft | None]:
                vocab_size = self.loader.vocab_size
                return [clean(draft, limit, vocab_size) for draft, limit in zip(drafts, asked, strict=True)]

            hooks = drafting_seqs[0].plan.hook("propose")
            answer = self.dispatch.call(drafting_seqs, hooks, check, seqs=drafting_seqs, limits=Limits(asked, lane))
            if answer is not None:
                drafting.drafts = answer.value
                for seq, draft in zip(drafting_seqs, drafting.drafts, strict=True):
                    seq.draft = draft
            drafting.seconds = perf_counter() - started
            draftings.append(drafting)
        return draftings

    def _launch(self, lane: Lane, seqs: list[Sequence]) -> Flight | None:
        """Run the forward. Returns None if a plugin's part failed: the sequences then go on in another lane, or end."""
        try:
            flight = lane.runner.launch(lane.build_batch(seqs))
            flight.wait()
            return flight
        except Exception as error:
            plugin = lane.built.culprit(error)
            if plugin is None:
                raise
            failure = HookError(plugin, "forward", error)
            failure.__cause__ = error
            self.dispatch.drop(seqs, failure)
            for seq in seqs:
                self._settle(lane, seq)
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
        for seq in seqs:
            seq.timing.num_steps += 1
            seq.timing.admitted = seq.timing.admitted or started
            if seq.id not in verified_ids:
                self._advance(seq)
            seq.num_scheduled_tokens = 0
            with own_failure(seq):
                self._seal(lane, seq)
            self._settle(lane, seq)
        num_accepted = sum(sum(drafting.num_accepted.values()) for drafting in draftings)
        stats = StepStats(len(seqs), num_tokens, num_prompt, num_draft, num_accepted, flight.seconds, 0.0)
        stats.seconds = perf_counter() - started
        lane.pacing.after(stats, draftings)
        lane.busy_seconds += stats.seconds
        self.forward_seconds += flight.seconds
        self.step_seconds += stats.seconds
        hooks = {id(hook.plugin): hook for seq in seqs for hook in seq.plan.hook("step_finished")}
        self.dispatch.tell(hooks.values(), stats=stats)

    def _verify_all(
        self, lane: Lane, seqs: list[Sequence], flight: Flight, drafting_of: dict[int, Drafting], plain: float
    ) -> set[int]:
        """Verify and commit the sequences whose last known token this step computed. Returns their ids."""
        verifiable = [seq for seq in seqs if seq.num_scheduled_tokens == seq.num_uncomputed_tokens]
        with torch.inference_mode():
            rows_by_plan = split_rows(flight.wait(), verifiable)
            pairs = [pair for rows in rows_by_plan for pair in self._verify(rows, drafting_of.get(rows.seqs[0].id))]
        for seq, verified in pairs:
            with own_failure(seq):
                self._accept(lane, seq, verified, drafting_of.get(seq.id), flight.seconds, plain)
        return {seq.id for seq, _ in pairs}

    def _verify(self, rows: Rows, drafting: Drafting | None) -> list[tuple[Sequence, Verified]]:
        """Verify the sequences of one plan. For `after_verify` hooks, draw a token in every row, and tell pacing the time."""
        started = perf_counter()
        wants_targets = bool(rows.seqs[0].plan.hook("after_verify")) and len(rows.parents) > len(rows.seqs)
        pairs = verify_rows(rows, self.dispatch, wants_targets)
        if wants_targets and drafting is not None:
            drafting.num_rows, drafting.row_seconds = len(rows.parents), perf_counter() - started
        return pairs

    def _accept(
        self, lane: Lane, seq: Sequence, verified: Verified, drafting: Drafting | None, seconds: float, plain: float
    ) -> None:
        """Commit verified tokens up to the end of the answer. seconds: of this forward. plain: of a forward without drafts."""
        timing, now = seq.timing, perf_counter()
        tokens: list[int] = []
        text = ""
        for token in verified.token_ids:
            tokens.append(token)
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
        timing.token_times += [now] * len(tokens)
        self._put(seq, TextDelta(text, tuple(tokens), seq.sample))

    def _ends(self, lane: Lane, seq: Sequence, token: int, num_new: int) -> tuple[FinishReason | None, str]:
        """Return the reason if the sequence ends with this token, else None, and the text that the token adds."""
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
        self._put(seq, PrefillProgress(kv.num_computed_tokens, seq.request.num_prompt_tokens, kv.num_cached_tokens))

    def _seal(self, lane: Lane, seq: Sequence) -> None:
        kv = seq.kv
        while (kv.num_sealed_blocks + 1) * lane.pool.block_size <= kv.num_computed_tokens:
            index = kv.num_sealed_blocks
            self.dispatch.call([seq], seq.plan.hook("block_sealed"), None, seq=seq, index=index, lane=lane)
            kv.num_sealed_blocks += 1
        self._carry_out(lane, seq)
        lane.pool.drop(kv, kv.num_computed_tokens)

    def _carry_out(self, lane: Lane, seq: Sequence) -> None:
        """Run the KV operations that plugins requested. A failure ends the request."""
        if seq.kv.operations:
            operations, seq.kv.operations = seq.kv.operations, []
            try:
                lane.runner.execute(operations)
            except Exception as error:
                log.exception("a KV operation of a plugin failed")
                failure = PluginFailed(f"a KV operation of a plugin failed: {error}; ask again with fewer plugins")
                seq.error = seq.error or failure

    def _settle(self, lane: Lane, seq: Sequence) -> None:
        """End a finished or failed sequence. If a sequence lost a plugin of its lane, move it to another lane."""
        if seq.finish_reason or seq.error:
            self.end(seq, seq.finish_reason or "error")
        elif seq.failed and self.lanes.by_key.get(seq.plan.lane_key) is not lane and seq.id in self.seqs:
            self._leave(lane, seq)
            seq.num_preemptions += 1
            seq.outlook = None
            self.enter(seq)

    def _leave(self, lane: Lane, seq: Sequence) -> None:
        """Take a sequence out of its lane: tell its plugins, give back its blocks."""
        self.dispatch.call([seq], seq.plan.hook("sequence_finished"), None, seq=seq, lane=lane)
        self._carry_out(lane, seq)
        seq.state.clear()
        lane.scheduler.remove(seq)
        del self.lane_of[seq.id]

    def end(self, seq: Sequence, reason: FinishReason) -> None:
        """Finish a sequence: take it out of its lane, send its result or its error.

        An error ends the other samples of the request too. If they still wait for the prompt of `seq`, they end in any case.
        """
        if self.seqs.pop(seq.id, None) is None:
            return
        seq.finish_reason = reason
        seq.timing.finished = perf_counter()
        lane = self.lane_of.get(seq.id)
        kv_bytes = _kv_bytes(seq, lane)
        if lane is not None:
            self._leave(lane, seq)
        with own_failure(seq):
            rest = seq.detokenizer.flush()
            if rest:
                self._put(seq, TextDelta(rest, (), seq.sample))
        if seq.error is not None:
            self._put(seq, seq.error)
            self.abort(seq.request.sample_ids)
        else:
            stats = self.loader.describe() | request_stats(seq, lane, kv_bytes)
            logprobs = seq.logprobs if seq.request.sampling.logprobs is not None else None
            answer = seq.token_ids[seq.request.num_prompt_tokens :]
            self._put(seq, Finished(Result(seq.detokenizer.text, answer, reason, stats, logprobs), seq.sample))
            self.abort([fork.id for fork in seq.forks])
        if lane is not None and not lane.has_work:
            _check_blocks(lane)

    # ---- on behalf of callers

    def enter(self, seq: Sequence) -> None:
        """Add a sequence to the lane of its plan. While the lane opens, the sequence waits."""
        for sample in (seq, *seq.forks):
            self.seqs[sample.id] = sample
        lane = self.lanes.ready(seq.plan)
        if lane is None:
            opening = self.lanes.open(seq.plan)
            opening.add_done_callback(lambda opened: self.post(lambda: self._enter_opened(seq, opened)))
            return
        if not lane.has_work:  # a lane that was idle must not take all steps now
            busy = [other.busy_seconds for other in self.lanes.all if other.has_work]
            lane.busy_seconds = max([lane.busy_seconds, *busy])
        for sample in (seq, *seq.forks):
            self.lane_of[sample.id] = lane
        lane.scheduler.add(seq)

    def _enter_opened(self, seq: Sequence, opened: Future[Lane]) -> None:
        """Start a waiting request whose lane has opened. If the lane could not open, end the request with the error."""
        if seq.id not in self.seqs:
            return  # the request was aborted
        error = opened.exception()
        try:
            if error is not None:
                raise error
            check_length(seq.num_tokens, opened.result(), self.loader.context)
        except PitlaneError as reason:
            seq.error = reason
        except Exception as reason:
            seq.error = named(reason, "the model could not be loaded")
        if seq.error is not None:
            self.end(seq, "error")
        else:
            self.enter(seq)

    def abort(self, seq_ids: SequenceOf[int]) -> None:
        for seq_id in seq_ids:
            if seq_id in self.seqs:
                self.end(self.seqs[seq_id], "aborted")

    def watch(self, seq_ids: SequenceOf[int]) -> None:
        """Mark sequences whose reader shows tokens at once. Prompts of other requests then delay these tokens only a little."""
        for seq_id in seq_ids:
            if seq_id in self.seqs:
                self.seqs[seq_id].is_streamed = True

    # ---- for the worker

    def ready_lanes(self) -> list[Lane]:
        return [lane for lane in self.lanes.all if lane.has_work and not lane.scheduler.is_loading]

    def has_ready_lanes(self) -> bool:
        return bool(self.ready_lanes())

    def step_safely(self) -> None:
        """Run a step. If it fails, end the requests in the step, and go on."""
        try:
            self.step()
        except Exception as error:
            log.exception("a step failed")
            running = [self.seqs[seq_id] for seq_id in list(self.lane_of) if seq_id in self.seqs]
            for seq in [seq for seq in running if seq.is_in_step] or running:
                seq.error = named(error, "the step failed")
                self.end(seq, "error")

    def _put(self, seq: Sequence, event: Any) -> None:
        stream = self.streams.get(seq.id)
        if stream is not None:
            stream.put(event)


def _kv_bytes(seq: Sequence, lane: Lane | None) -> int:
    """Bytes of the blocks that a sequence holds."""
    return lane.kv_bytes_per_block * max((len(t) for t in seq.kv.block_tables), default=0) if lane is not None else 0


def _check_blocks(lane: Lane) -> None:
    """Log an error if a lane without work has lost blocks. Blocks are lost if no sequence, plugin or draft model holds them."""
    try:
        lane.pool.check_integrity(())
    except AssertionError as error:
        log.error("KV blocks are lost (%s); please report this, and restart if requests begin to wait", error)
