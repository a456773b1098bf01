"""The live sequences: how a request enters a lane, moves to another lane, and ends.

Every method runs on the engine's thread. Every request ends with a result or an error: if its end itself fails, the reader gets
this error.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from time import perf_counter

from pitlane.engine.errors import PitlaneError, PluginFailed
from pitlane.engine.events import Event, Finished, FinishReason, Result, TextDelta
from pitlane.engine.lanes import Lanes
from pitlane.engine.loader import Loader
from pitlane.engine.plan.dispatch import Dispatcher, named, own_failure
from pitlane.engine.plan.hooks import HookError
from pitlane.engine.requests import check_length
from pitlane.engine.run.lane import Lane
from pitlane.engine.sequence import Sequence
from pitlane.engine.stats import request_stats
from pitlane.engine.stream import Stream

log = logging.getLogger("pitlane")


class Roster:
    """Live sequences by id, and the lane of every sequence whose lane is open.

    streams: the stream of every sequence, held weakly: when the caller drops a stream, its entry disappears. Callers on other
    threads add streams.
    """

    def __init__(
        self, lanes: Lanes, loader: Loader, dispatch: Dispatcher, post: Callable[[Callable[[], None]], object]
    ) -> None:
        self.lanes, self.loader, self.dispatch, self.post = lanes, loader, dispatch, post
        self.seqs: dict[int, Sequence] = {}
        self.lane_of: dict[int, Lane] = {}
        self.streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()

    def enter(self, seq: Sequence) -> None:
        """Add a sequence to the lane of its plan. While the lane opens, the sequence waits."""
        for sample in (seq, *seq.forks):
            self.seqs[sample.id] = sample
        self.dispatch.leave_out_suspended([seq, *seq.forks])
        if seq.error is not None:
            self.end(seq, "error")
            return
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
        lane.last_used = perf_counter()
        lane.scheduler.add(seq)

    def _enter_opened(self, seq: Sequence, opened: Future[Lane]) -> None:
        """Start a waiting request whose lane has opened. If the lane could not open, end the request with the error."""
        if seq.id not in self.seqs:
            return  # the request was aborted
        error = opened.exception()
        if isinstance(error, PluginFailed) and isinstance(error.__cause__, HookError):
            self.dispatch.drop([seq, *seq.forks], error.__cause__)  # the request goes on without the plugin, if it can
            if seq.error is None:
                self.enter(seq)
                return
        try:
            if error is not None:
                raise error
            check_length(seq.num_tokens, opened.result(), self.loader)
        except PitlaneError as reason:
            seq.error = reason
        except Exception as reason:
            seq.error = named(reason, "the model could not be loaded")
        if seq.error is not None:
            self.end(seq, "error")
        else:
            self.enter(seq)

    def settle(self, lane: Lane, seq: Sequence) -> None:
        """After a step, end a sequence that is finished or failed. Move a sequence if its plan lost a plugin of the lane."""
        if seq.finish_reason or seq.error:
            self.end(seq, seq.finish_reason or "error")
        elif seq.failed and self.lanes.by_key.get(seq.plan.lane_key) is not lane and seq.id in self.seqs:
            self._leave(lane, seq)
            _rest(lane)
            seq.num_preemptions += 1
            seq.outlook = None
            self.enter(seq)

    def end(self, seq: Sequence, reason: FinishReason) -> None:
        """Finish a sequence: take it out of its lane, send its result or its error.

        An error ends the other samples of the request too. If they still wait for the prompt of `seq`, they end in any case.
        """
        if self.seqs.pop(seq.id, None) is None:
            return
        seq.finish_reason = reason
        seq.timing.finished = perf_counter()
        lane = self.lane_of.get(seq.id)
        with own_failure(seq):
            kv_bytes = lane.kv_bytes(seq.kv) if lane is not None else 0
            if lane is not None:
                self._leave(lane, seq)
            stats = self.loader.describe() | request_stats(seq, lane, kv_bytes)
            text = seq.detokenizer.flush()
        if seq.error is None:
            self.dispatch.suspensions.ended_well(seq.plan.names)
            if text:
                self.put(seq, TextDelta(text, (), seq.sample))
            logprobs = seq.logprobs if seq.request.sampling.logprobs is not None else None
            answer = seq.token_ids[seq.request.num_prompt_tokens :]
            self.put(seq, Finished(Result(seq.detokenizer.text, answer, reason, stats, logprobs), seq.sample))
            self.abort([fork.id for fork in seq.forks])
        else:
            self.put(seq, seq.error)
            self.abort(seq.request.sample_ids)
        if lane is not None:
            _rest(lane)

    def _leave(self, lane: Lane, seq: Sequence) -> None:
        """Take a sequence out of its lane: tell its plugins, give back its blocks."""
        for sample in (seq, *seq.forks):
            self.lane_of.pop(sample.id, None)
        self.dispatch.call([seq], seq.plan.hook("sequence_finished"), None, seq=seq, lane=lane)
        seq.state.clear()
        lane.scheduler.remove(seq)

    def abort(self, seq_ids: SequenceOf[int]) -> None:
        for seq_id in seq_ids:
            if seq_id in self.seqs:
                self.end(self.seqs[seq_id], "aborted")

    def abort_all(self) -> None:
        """End every request."""
        self.abort(list(self.seqs))

    def watch(self, seq_ids: SequenceOf[int]) -> None:
        """Mark sequences whose reader shows tokens at once. Prompts of other requests then delay these tokens only a little."""
        for seq_id in seq_ids:
            if seq_id in self.seqs:
                self.seqs[seq_id].is_streamed = True

    def fail(self, lane: Lane, error: BaseException) -> None:
        """End the requests of a lane that were in a failed step. If no request was in the step, end all requests of the lane."""
        seqs = lane.scheduler.seqs
        for seq in [seq for seq in seqs if seq.num_scheduled_tokens] or seqs:
            seq.error = named(error, "the step failed")
            self.end(seq, "error")

    def put(self, seq: Sequence, event: Event | Exception) -> None:
        """Send an event to the reader of a sequence, if there is a reader."""
        stream = self.streams.get(seq.id)
        if stream is not None:
            stream.put(event)


def _rest(lane: Lane) -> None:
    """If a lane has no work left, carry out its KV operations, and log an error if it has lost blocks.

    Blocks are lost if no sequence, plugin or draft model holds them.
    """
    if lane.has_work:
        return
    lane.flush()
    for group in lane.pool.groups_with_lost_blocks:
        lost = f"group {group}: counts differ from references"
        log.error("KV blocks are lost (%s); please report this, and restart if requests begin to wait", lost)
