"""The decode loop: one forward of a lane's target model a step, from which every scheduled sequence gains.

Read `step` first. Everything that a sequence, a pool or a store is, only the engine's thread touches; every method here runs on
that thread. The loop knows plugins by their hooks alone.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence as SequenceOf
from time import perf_counter
from typing import Any

import torch

from pitlane.engine.decode.verify import Verified, clean, verify_rows
from pitlane.engine.errors import PluginFailed
from pitlane.engine.loader import Loader
from pitlane.engine.plan.dispatch import Dispatcher, named, own_failure
from pitlane.engine.run.lane import Lane
from pitlane.engine.run.runner import Flight
from pitlane.engine.stats import request_stats
from pitlane.engine.stream import Stream
from pitlane.engine.types import (
    Draft,
    Finished,
    FinishReason,
    Limits,
    PrefillProgress,
    Result,
    Rows,
    Sequence,
    StepStats,
    TextDelta,
)

log = logging.getLogger("pitlane")


class Loop:
    """Moves the sequences of all lanes on, and ends them.

    seqs: the requests' live sequences by id, each with its lane. streams: where events go, by sequence id; a stream that nobody
    holds any more is gone. Seconds are those of all steps so far, and of the forwards in them.
    """

    def __init__(self, lanes: dict[tuple[str, ...], Lane], loader: Loader, dispatch: Dispatcher) -> None:
        self.lanes, self.loader, self.dispatch = lanes, loader, dispatch
        self.seqs: dict[int, tuple[Lane, Sequence]] = {}
        self.streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
        self.forward_seconds = 0.0
        self.step_seconds = 0.0

    def step(self) -> None:
        """Run one lane's target model once; every scheduled sequence moves on."""
        started = perf_counter()
        lane = min(self.ready_lanes(), key=lambda lane: lane.busy_seconds)
        seqs = lane.scheduler.schedule()
        for seq in [seq for seq in lane.scheduler.waiting if seq.error]:
            self.end(lane, seq, "error")
        if not seqs:
            return
        self._draft(lane, seqs)
        batch = lane.build_batch(seqs)
        flight = lane.runner.launch(batch)
        self._finish(lane, seqs, flight, started)

    def _draft(self, lane: Lane, seqs: list[Sequence]) -> None:
        governor = lane.governor
        governor.start_step(sum(seq.num_scheduled_tokens for seq in seqs), sum(seq.is_decoding for seq in seqs))
        for plan in {id(seq.plan): seq.plan for seq in seqs if seq.is_decoding}.values():
            if plan.drafter is None:
                continue
            mine = [seq for seq in seqs if seq.plan is plan and seq.is_decoding]
            if governor.is_paused(mine):
                continue
            limits = governor.ask(plan.drafter, mine, [lane.draft_limit(seq) for seq in mine])
            if not any(limits):
                continue

            def check(found: list[Draft | None], limits: list[int] = limits) -> list[Draft | None]:
                return [clean(draft, k, self.loader.vocab_size) for draft, k in zip(found, limits, strict=True)]

            started = perf_counter()
            drafts = self.dispatch.first(mine, "propose", check, seqs=mine, limits=Limits(limits, lane)) or []
            for seq, draft in zip(mine, drafts, strict=False):
                seq.draft = draft
            governor.drafted(plan.drafter, mine, perf_counter() - started)

    def _finish(self, lane: Lane, seqs: list[Sequence], flight: Flight, started: float) -> None:
        logits = flight.wait()
        num_draft = sum(len(seq.draft.token_ids) for seq in seqs if seq.draft)
        num_tokens = num_draft + sum(seq.num_scheduled_tokens for seq in seqs)
        num_prompt = sum(seq.num_scheduled_tokens for seq in seqs if not seq.is_decoding)
        with torch.inference_mode():
            found = [pair for rows in lane.rows(logits, seqs) for pair in self._verify(lane, rows)]
        plain = lane.clock.estimate(num_tokens - num_draft) or flight.seconds
        accepted = 0
        for seq, verified in found:
            with own_failure(seq):
                accepted += self._accept(lane, seq, verified, flight.seconds, plain)
        verified_ids = {seq.id for seq, _ in found}
        for seq in seqs:
            seq.timing.num_steps += 1
            seq.timing.admitted = seq.timing.admitted or started
            if seq.id not in verified_ids:
                seq.num_computed_tokens += seq.num_scheduled_tokens
                self._put(seq, PrefillProgress(seq.num_computed_tokens, seq.num_prompt_tokens, seq.num_cached_tokens))
            seq.num_scheduled_tokens = 0
            with own_failure(seq):
                self._seal(lane, seq)
            if seq.finish_reason or seq.error:
                self.end(lane, seq, seq.finish_reason or "error")
        lane.clock.record(num_tokens, num_prompt, flight.seconds)
        lane.scheduler.took(flight.seconds)
        self.forward_seconds += flight.seconds
        seconds = perf_counter() - started
        self.step_seconds += seconds
        lane.busy_seconds += seconds
        if not num_prompt:
            (lane.governor.stepped if num_draft else lane.clock.record_overhead)(seconds - flight.seconds)
        stats = StepStats(len(seqs), num_tokens, num_draft, accepted, flight.seconds, seconds)
        hooks = {id(hook.plugin): hook for seq in seqs for hook in seq.plan.hooks.get("step_finished", ())}
        self.dispatch.tell(hooks.values(), stats=stats)

    def _verify(self, lane: Lane, rows: Rows) -> list[tuple[Sequence, Verified]]:
        """Verify the sequences of one plan; drafts under `after_verify` are drawn in every row, which the governor reckons with."""
        plan, started = rows.seqs[0].plan, perf_counter()
        wants_targets = "after_verify" in plan.hooks and len(rows.parents) > len(rows.seqs)
        found = verify_rows(rows, self.dispatch.adjust_logits, wants_targets)
        if wants_targets and plan.drafter is not None:
            lane.governor.verified_rows(plan.drafter, len(rows.parents), perf_counter() - started)
        return found

    def _accept(self, lane: Lane, seq: Sequence, verified: Verified, seconds: float, plain: float) -> int:
        """Commit verified tokens up to where the sequence ends; the number of accepted draft tokens."""
        timing, now = seq.timing, perf_counter()
        tokens: list[int] = []
        text = ""
        for token in verified.token_ids:
            tokens.append(token)
            seq.finish_reason, piece = self._ends(lane, seq, token, len(tokens))
            text += piece
            if seq.finish_reason:
                break
        accepted = min(len(verified.nodes), len(tokens))
        if seq.draft is not None:
            if verified.targets:
                values = {"draft": seq.draft, "targets": verified.targets, "accepted": verified.nodes}
                self.dispatch.each(seq, "after_verify", seq=seq, **values)
            if seq.plan.drafter is not None:
                lane.governor.verified(seq.plan.drafter, seq, seq.draft, len(verified.nodes))
            timing.num_draft_tokens += len(seq.draft.token_ids)
            timing.num_accepted_tokens += accepted
            timing.plain_step_seconds += accepted * plain
            timing.draft_extra_seconds += seconds - plain
        seq.logprobs += verified.logprobs[: len(tokens)]
        lane.commit(seq, verified.nodes[: len(tokens)], tokens)
        timing.first_token = timing.first_token or now
        timing.token_times += [now] * len(tokens)
        self._put(seq, TextDelta(text, tuple(tokens), self._sample(seq)))
        return accepted

    def _ends(self, lane: Lane, seq: Sequence, token: int, num_new: int) -> tuple[FinishReason | None, str]:
        """Why the sequence ends with this token (None: it does not), and the text that the token adds."""
        if token in seq.stop_token_ids:
            return "stop", ""
        text = seq.detokenizer.push([token])
        if seq.detokenizer.stopped:
            return "stop", text
        full = seq.num_tokens + num_new >= lane.max_tokens_per_seq
        return "length" if full or seq.num_remaining_tokens <= num_new else None, text

    def _seal(self, lane: Lane, seq: Sequence) -> None:
        while (seq.num_sealed_blocks + 1) * lane.pool.block_size <= seq.num_computed_tokens:
            self.dispatch.each(seq, "block_sealed", seq=seq, index=seq.num_sealed_blocks)
            seq.num_sealed_blocks += 1
        self._carry_out(lane, seq)
        lane.pool.drop(seq, seq.num_computed_tokens)

    def _carry_out(self, lane: Lane, seq: Sequence) -> None:
        """KV operations that plugins asked for; one that cannot be carried out ends the request."""
        if seq.operations:
            operations, seq.operations = seq.operations, []
            try:
                lane.runner.execute(operations)
            except Exception as error:
                log.exception("a KV operation of a plugin failed")
                seq.error = seq.error or PluginFailed(f"a plugin's KV operation failed: {error}; ask again without it")

    def end(self, lane: Lane, seq: Sequence, reason: FinishReason) -> None:
        """Finish a sequence: tell its plugins, give back its blocks, send its result or its error.

        An error ends the other samples of the request too, and so does the end of a prompt that they still wait for.
        """
        if self.seqs.pop(seq.id, None) is None:
            return
        seq.finish_reason = reason
        seq.timing.finished = perf_counter()
        self.dispatch.each(seq, "sequence_finished", seq=seq)
        self._carry_out(lane, seq)
        stats = request_stats(seq, lane, self.loader.describe())
        seq.state.clear()
        lane.scheduler.remove(seq)
        with own_failure(seq):
            rest = seq.detokenizer.flush()
            if rest:
                self._put(seq, TextDelta(rest, (), self._sample(seq)))
        if seq.error is not None:
            self._put(seq, seq.error)
            self.abort(seq.samples)
        else:
            logprobs = seq.logprobs if seq.sampling.logprobs is not None else None
            answer = seq.token_ids[seq.num_prompt_tokens :]
            result = Result(seq.detokenizer.text, answer, reason, stats, logprobs)
            self._put(seq, Finished(result, self._sample(seq)))
            self.abort([fork.id for fork in seq.forks])
        if not lane.has_work:
            self._check(lane)

    # ---- what the engine asks for

    def ready_lanes(self) -> list[Lane]:
        return [lane for lane in list(self.lanes.values()) if lane.has_work and not lane.scheduler.is_loading]

    def has_ready_lanes(self) -> bool:
        return bool(self.ready_lanes())

    def step_safely(self) -> None:
        """A step that fails ends the requests that were in it, not the engine."""
        try:
            self.step()
        except Exception as error:
            log.exception("a step failed")
            running = list(self.seqs.values())
            for lane, seq in [(lane, seq) for lane, seq in running if seq.is_in_step] or running:
                seq.error = named(error, "the step failed")
                self.end(lane, seq, "error")

    def add(self, lane: Lane, seq: Sequence) -> None:
        lane = self.lanes.setdefault(seq.plan.lane_key, lane)  # it may have made room while it looked idle
        if not lane.has_work and len(self.lanes) > 1:  # no credit for having been idle
            lane.busy_seconds = max(
                [lane.busy_seconds, *(o.busy_seconds for o in list(self.lanes.values()) if o.has_work)]
            )
        for one in (seq, *seq.forks):
            self.seqs[one.id] = (lane, one)
        lane.scheduler.add(seq)

    def abort(self, seq_ids: SequenceOf[int]) -> None:
        for seq_id in seq_ids:
            if seq_id in self.seqs:
                self.end(*self.seqs[seq_id], "aborted")

    def watch(self, seq_ids: SequenceOf[int]) -> None:
        """Somebody reads the tokens of a request as they come: prompts of others may no longer delay them at will."""
        for seq_id in seq_ids:
            if seq_id in self.seqs:
                self.seqs[seq_id][1].is_streamed = True

    def _check(self, lane: Lane) -> None:
        """Of a lane that has nothing to do, every block is free or held by a plugin."""
        try:
            lane.pool.check_integrity(())
        except AssertionError as error:
            log.error("KV blocks are lost (%s); please report this, and restart if requests begin to wait", error)

    @staticmethod
    def _sample(seq: Sequence) -> int:
        """Which of the request's samples a sequence is."""
        return seq.samples.index(seq.id)

    def _put(self, seq: Sequence, event: Any) -> None:
        stream = self.streams.get(seq.id)
        if stream is not None:
            stream.put(event)
