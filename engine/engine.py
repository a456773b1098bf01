"""The engine: the loop, and the thread that runs it.

Read `step` first. Everything that a sequence, a pool or a store is, only the engine's thread touches; `submit` may be called
from any thread and gives a `Stream` of events. The engine knows plugins by their hooks alone.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from itertools import count
from time import perf_counter
from typing import Any, overload

import torch

from pitlane.engine.dispatch import Dispatcher
from pitlane.engine.errors import BadOption, EngineClosed, PitlaneError, PluginFailed
from pitlane.engine.lane import Lane
from pitlane.engine.loader import Loader, default_settings
from pitlane.engine.plan import HookError, Plan, Planner, Settings
from pitlane.engine.pool import Pool
from pitlane.engine.registry import PluginRegistry
from pitlane.engine.requests import check_length, is_batch, make_sequence
from pitlane.engine.runner import Flight
from pitlane.engine.stats import request_stats
from pitlane.engine.stream import Stream
from pitlane.engine.tokenizer import Prompt
from pitlane.engine.types import (
    Draft,
    Finished,
    FinishReason,
    Limits,
    PrefillProgress,
    PrefixMatch,
    Result,
    Rows,
    SamplingParams,
    Sequence,
    StepStats,
    TextDelta,
)
from pitlane.engine.verify import Verified, clean, verify_rows
from pitlane.engine.worker import Worker

log = logging.getLogger("pitlane")
GREEDY = SamplingParams()


class Engine:
    """Serves one model under any number of plans.

    model: `bundled`, a local folder, a Hugging Face id, or `random:<preset>`. plugins: settings of the default plan
    ({name: {option: value}}); None = the default for the device. Raises PitlaneError for whatever a user can cause.
    """

    def __init__(
        self,
        model: str = "bundled",
        *,
        plugins: Settings | None = None,
        dtype: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        context: int | None = None,
        kv_memory: int | None = None,
        max_step_tokens: int = 512,
        registry: PluginRegistry | None = None,
    ) -> None:
        self.registry = registry or PluginRegistry.load()
        self.planner = Planner(self.registry)
        self.loader = Loader(model, dtype, device, threads, context, kv_memory, max_step_tokens)
        self.tokenizer = self.loader.tokenizer
        self.lanes: dict[tuple[str, ...], Lane] = {}
        self.forward_seconds = 0.0
        self.step_seconds = 0.0
        self._resources: dict[str, Any] = {}
        self._ids = count()
        self._seqs: dict[int, tuple[Lane, Sequence]] = {}
        self._streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
        self._loading = threading.RLock()
        self._opening = threading.Lock()  # the engine's thread never wants it
        self._planning = threading.Lock()  # the engine's thread plans too, and never waits for a load
        self.dispatch = Dispatcher(self.plan)
        self.worker = Worker(lambda: bool(self._ready_lanes()), self._step_safely)
        self.default_plan = self.plan(default_settings(self.loader.device) if plugins is None else plugins)
        self.lane_of(self.default_plan)
        log.info(self.loader.describe_memory())

    # ---- for everyone, from any thread

    def plan(self, settings: Settings) -> Plan:
        """Resolve a set of plugins and their options to a plan."""
        with self._planning:
            return self.planner.resolve(settings)

    def lane_of(self, plan: Plan) -> Lane:
        """The lane that runs a plan; its weights are loaded on first use."""
        with self._loading:
            lane = self.lanes.get(plan.lane_key)
            if lane is None:
                self.loader.make_room(self.lanes)
                lane = self.loader.build_lane(plan, self._match, self._reclaim, self.worker.call)
                warm = self.worker.call(lambda: lane.warm_up(self.loader.warm_up_tokens))
                self.lanes[plan.lane_key] = lane
            else:
                warm = None
        if warm is not None:
            warm.result()
        self._open(lane, plan)
        return lane

    def _open(self, lane: Lane, plan: Plan) -> None:
        with self._opening:
            if plan in lane.opened:
                return
            if plan.drafter is not None and not lane.is_calibrated:
                lane.is_calibrated = True
                self.worker.call(lane.calibrate).result()
            for hook in plan.hooks.get("lane_opened", ()):
                try:
                    hook(lane=lane)
                except HookError as error:
                    raise PluginFailed(f"{error}; take {error.plugin.name} out of the plan") from error
            lane.opened.add(plan)

    def submit(
        self,
        prompt: Prompt | SequenceOf[int] | str,
        sampling: SamplingParams = GREEDY,
        *,
        plan: Plan | None = None,
        salt: str = "",
    ) -> Stream:
        """Queue a request; the stream of its events. Text is taken as it is (`tokenizer.render_chat` makes chats)."""
        plan = plan or self.default_plan
        ids = [next(self._ids) for _ in range(sampling.n)]
        seq = make_sequence(ids, prompt, sampling, plan, salt, self.loader)
        lane = self.lane_of(plan)
        check_length(seq.num_tokens, lane, self.loader.context)
        post = self.worker.post
        stream = Stream(lambda: post(lambda: self._abort(ids)), lambda: post(lambda: self._watch(ids)), len(ids))
        for seq_id in ids:
            self._streams[seq_id] = stream
        if not self.worker.post(lambda: self._add(lane, seq)):
            raise EngineClosed("the engine is closed; make a new one")
        return stream

    @overload
    def generate(
        self, prompt: Prompt | SequenceOf[int] | str, sampling: SamplingParams = GREEDY, **options: Any
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: SequenceOf[Prompt | SequenceOf[int] | str],
        sampling: SamplingParams | SequenceOf[SamplingParams] = GREEDY,
        **options: Any,
    ) -> list[Result]: ...

    def generate(self, prompt: Any, sampling: Any = GREEDY, **options: Any) -> Result | list[Result]:
        """Submit and wait: the result of one prompt, or of a list of prompts the results in the same order.

        sampling: for all prompts, or a list with one for each. An error of one is raised and stops the others; `submit` them one
        by one where each shall have its own.
        """
        if not is_batch(prompt):
            return self.submit(prompt, sampling, **options).result()
        each = [sampling] * len(prompt) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompt):
            raise BadOption(f"{len(prompt)} prompts came with {len(each)} SamplingParams; give one, or one for each")
        with ExitStack() as streams:  # which stops those that are not read to their end
            pairs = zip(prompt, each, strict=True)
            found = [streams.enter_context(self.submit(one, params, **options)) for one, params in pairs]
            return [stream.result() for stream in found]

    def resource(self, key: str, build: Callable[[], Any]) -> Any:
        """A heavy thing (a draft model, an index) shared by all plans; built on first use."""
        with self._loading:
            if key not in self._resources:
                self._resources[key] = build()
            return self._resources[key]

    def close(self) -> None:
        """End every request as aborted, tell the plugins, stop the thread. Safe to call twice."""
        if self.worker.closed:
            return
        for action in self.worker.close():
            action()  # so that requests which were just submitted end too
        for lane, seq in list(self._seqs.values()):
            self._end(lane, seq, "aborted")
        self.dispatch.tell(self.planner.live_hooks("engine_closed"))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the loop

    def step(self) -> None:
        """Run one lane's target model once; every scheduled sequence moves on."""
        started = perf_counter()
        lane = min(self._ready_lanes(), key=lambda lane: lane.busy_seconds)
        seqs = lane.scheduler.schedule()
        for seq in [seq for seq in lane.scheduler.waiting if seq.error]:
            self._end(lane, seq, "error")
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
            accepted += self._accept(lane, seq, verified, flight.seconds, plain)
        verified_ids = {seq.id for seq, _ in found}
        for seq in seqs:
            seq.timing.num_steps += 1
            seq.timing.admitted = seq.timing.admitted or started
            if seq.id not in verified_ids:
                seq.num_computed_tokens += seq.num_scheduled_tokens
                self._put(seq, PrefillProgress(seq.num_computed_tokens, seq.num_prompt_tokens, seq.num_cached_tokens))
            seq.num_scheduled_tokens = 0
            self._seal(lane, seq)
            if seq.finish_reason or seq.error:
                self._end(lane, seq, seq.finish_reason or "error")
        lane.clock.record(num_tokens, num_prompt, flight.seconds)
        lane.scheduler.took(flight.seconds)
        self.forward_seconds += flight.seconds
        seconds = perf_counter() - started
        self.step_seconds += seconds
        lane.busy_seconds += seconds
        if not num_draft and not num_prompt:
            lane.clock.record_overhead(seconds - flight.seconds)
        stats = StepStats(len(seqs), num_tokens, num_draft, accepted, flight.seconds, seconds)
        hooks = {id(hook.plugin): hook for seq in seqs for hook in seq.plan.hooks.get("step_finished", ())}
        self.dispatch.tell(hooks.values(), stats=stats)

    def _verify(self, lane: Lane, rows: Rows) -> list[tuple[Sequence, Verified]]:
        """Verify the sequences of one plan; under `after_verify` every row is drawn, which the governor reckons with."""
        plan, started = rows.seqs[0].plan, perf_counter()
        wants_targets = "after_verify" in plan.hooks
        found = verify_rows(rows, self.dispatch.adjust_logits, wants_targets)
        if wants_targets and plan.drafter is not None and len(rows.parents) > len(rows.seqs):
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
        if verified.targets:
            values = {"draft": seq.draft, "targets": verified.targets, "accepted": verified.nodes}
            self.dispatch.each(seq, "after_verify", seq=seq, **values)
        if seq.draft is not None:
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

    def _end(self, lane: Lane, seq: Sequence, reason: FinishReason) -> None:
        """Finish a sequence: tell its plugins, give back its blocks, send its result or its error.

        An error ends the other samples of the request too, and so does the end of a prompt that they still wait for.
        """
        if self._seqs.pop(seq.id, None) is None:
            return
        seq.finish_reason = reason
        seq.timing.finished = perf_counter()
        self.dispatch.each(seq, "sequence_finished", seq=seq)
        self._carry_out(lane, seq)
        stats = request_stats(seq, lane, self.loader.describe())
        seq.state.clear()
        lane.scheduler.remove(seq)
        rest = seq.detokenizer.flush()
        if rest:
            self._put(seq, TextDelta(rest, (), self._sample(seq)))
        if seq.error is not None:
            self._put(seq, seq.error)
            self._abort(seq.samples)
        else:
            logprobs = seq.logprobs if seq.sampling.logprobs is not None else None
            answer = seq.token_ids[seq.num_prompt_tokens :]
            result = Result(seq.detokenizer.text, answer, reason, stats, logprobs)
            self._put(seq, Finished(result, self._sample(seq)))
            self._abort([fork.id for fork in seq.forks])
        if not lane.has_work:
            self._check(lane)

    # ---- what the scheduler asks for

    def _match(self, seq: Sequence, pool: Pool) -> PrefixMatch | None:
        found: PrefixMatch | None = self.dispatch.first([seq], "match_prefix", _prefix_match, seq=seq, pool=pool)
        if found is not None and found.loading is not None:
            found.loading.add_done_callback(lambda _: self.worker.post(lambda: None))
        return found

    def _reclaim(self, pool: Pool, num_blocks: int) -> None:
        self.dispatch.tell(self.planner.live_hooks("reclaim_blocks"), pool=pool, num_blocks=num_blocks)

    # ---- on the engine's thread

    def _ready_lanes(self) -> list[Lane]:
        return [lane for lane in list(self.lanes.values()) if lane.has_work and not lane.scheduler.is_loading]

    def _step_safely(self) -> None:
        """A step that fails ends the requests that were in it, not the engine."""
        try:
            self.step()
        except Exception as error:
            log.exception("a step failed")
            running = list(self._seqs.values())
            for lane, seq in [(lane, seq) for lane, seq in running if seq.num_scheduled_tokens] or running:
                seq.error = error if isinstance(error, PitlaneError) else PitlaneError(f"the step failed: {error}")
                self._end(lane, seq, "error")

    def _add(self, lane: Lane, seq: Sequence) -> None:
        lane = self.lanes.setdefault(seq.plan.lane_key, lane)  # it may have made room while it looked idle
        if not lane.has_work and len(self.lanes) > 1:  # no credit for having been idle
            lane.busy_seconds = max(
                [lane.busy_seconds, *(o.busy_seconds for o in list(self.lanes.values()) if o.has_work)]
            )
        for one in (seq, *seq.forks):
            self._seqs[one.id] = (lane, one)
        lane.scheduler.add(seq)

    def _abort(self, seq_ids: SequenceOf[int]) -> None:
        for seq_id in seq_ids:
            if seq_id in self._seqs:
                self._end(*self._seqs[seq_id], "aborted")

    def _watch(self, seq_ids: SequenceOf[int]) -> None:
        """Somebody reads the tokens of a request as they come: prompts of others may no longer delay them at will."""
        for seq_id in seq_ids:
            if seq_id in self._seqs:
                self._seqs[seq_id][1].is_streamed = True

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
        stream = self._streams.get(seq.id)
        if stream is not None:
            stream.put(event)


def _prefix_match(found: Any) -> PrefixMatch:
    if not isinstance(found, PrefixMatch):
        raise TypeError(f"returned {found!r}, not a PrefixMatch")
    return found
