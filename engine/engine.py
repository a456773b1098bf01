"""The engine: one model, its plans and lanes, and the thread that runs the loop (`engine/loop.py`).

`submit` may be called from any thread and gives a `Stream` of events; what sequences, pools and stores are, only the engine's
thread touches. The engine knows plugins by their hooks alone.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any, overload

from pitlane.engine.errors import BadOption, PluginFailed
from pitlane.engine.kv.pool import Pool
from pitlane.engine.loader import Loader, default_settings
from pitlane.engine.loop import Loop
from pitlane.engine.plan.dispatch import Dispatcher
from pitlane.engine.plan.plan import HookError, Plan, Planner, Settings
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.requests import check_length, check_request, is_batch, make_sequence
from pitlane.engine.run.lane import Lane
from pitlane.engine.stream import Stream
from pitlane.engine.text.tokenizer import Prompt
from pitlane.engine.types import (
    BuildContext,
    PrefixMatch,
    Result,
    SamplingParams,
    Sequence,
)
from pitlane.engine.worker import Worker, release_threads

log = logging.getLogger("pitlane")
GREEDY = SamplingParams()


class Engine:
    """Serves one model under any number of plans.

    model: `bundled`, a local folder, a Hugging Face id, or `random:<preset>`. plugins: settings of the default plan
    ({name: {option: value}}); None = the default settings. A callable receives the default settings and returns the settings to
    use. Raises PitlaneError for whatever a user can cause. An engine closes itself when the caller drops it. In a forked process
    its methods raise EngineClosed.
    """

    def __init__(
        self,
        model: str = "bundled",
        *,
        plugins: Settings | Callable[[Settings], Settings] | None = None,
        dtype: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        context: int | None = None,
        kv_memory: int | None = None,
        max_step_tokens: int = 512,
        registry: PluginRegistry | None = None,
    ) -> None:
        self.registry = registry or PluginRegistry.load()

        def wanted(context: BuildContext) -> Settings:
            if plugins is not None and not callable(plugins):
                return plugins
            default = default_settings(self.registry, context)
            return plugins(default) if plugins else default

        self.loader = Loader(model, dtype, device, threads, context, kv_memory, max_step_tokens, wanted)
        self.planner = Planner(self.registry, self.loader.build_context)
        self.tokenizer = self.loader.tokenizer
        self.lanes: dict[tuple[str, ...], Lane] = {}
        self._resources: dict[str, Any] = {}
        self._ids = count()
        self._loading = threading.RLock()
        self._opening = threading.Lock()  # the engine's thread never wants it
        self.dispatch = Dispatcher(self.planner.resolve)
        self.loop = Loop(self.lanes, self.loader, self.dispatch)
        finish = partial(_finish, self.loop, self.planner)
        self.worker = Worker(self.loop.has_ready_lanes, self.loop.step_safely, finish)
        weakref.finalize(self, self.worker.stop).atexit = False  # the engine's thread holds no reference to it
        try:
            self.default_plan = self.plan(wanted(self.loader.build_context))
            self.lane_of(self.default_plan)
        except BaseException:
            self.close()
            raise
        log.info(self.loader.describe_memory())

    # ---- for everyone, from any thread

    def plan(self, settings: Settings) -> Plan:
        """Resolve a set of plugins and their options to a plan."""
        self.worker.check()
        return self.planner.resolve(settings)

    def lane_of(self, plan: Plan) -> Lane:
        """The lane that runs a plan; its weights are loaded on first use."""
        self.worker.check()
        with self._loading:
            lane = self.lanes.get(plan.lane_key)
            if lane is None:
                self.loader.make_room(self.lanes)
                match = partial(_match, self.dispatch, self.worker)
                reclaim = partial(_reclaim, self.dispatch, self.planner)
                lane = self.loader.build_lane(plan, match, reclaim, self.worker.call)
                warm = self.worker.call(lambda: lane.warm_up(self.loader.warm_up_tokens))
                self.lanes[plan.lane_key] = lane
                release_threads()
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
            release_threads()

    def submit(
        self,
        prompt: Prompt | SequenceOf[int] | str,
        sampling: SamplingParams = GREEDY,
        *,
        plan: Plan | None = None,
        salt: str = "",
    ) -> Stream:
        """Queue a request; the stream of its events. Text is taken as it is (`tokenizer.render_chat` makes chats)."""
        self.worker.check()
        plan = self.default_plan if plan is None else plan
        check_request(sampling, plan, salt)
        ids = [next(self._ids) for _ in range(sampling.n)]
        seq = make_sequence(ids, prompt, sampling, plan, salt, self.loader)
        lane = self.lane_of(plan)
        check_length(seq.num_tokens, lane, self.loader.context)
        post = self.worker.post
        stream = Stream(
            lambda: post(lambda: self.loop.abort(ids)), lambda: post(lambda: self.loop.watch(ids)), len(ids)
        )
        for seq_id in ids:
            self.loop.streams[seq_id] = stream
        if not post(lambda: self.loop.add(lane, seq)):
            self.worker.check()
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
        each = list(sampling) if isinstance(sampling, (list, tuple)) else [sampling] * len(prompt)
        if len(each) != len(prompt):
            raise BadOption(f"{len(prompt)} prompts came with {len(each)} SamplingParams; give one, or one for each")
        with ExitStack() as streams:  # which stops those that are not read to their end
            pairs = zip(prompt, each, strict=True)
            found = [streams.enter_context(self.submit(one, params, **options)) for one, params in pairs]
            return [stream.result() for stream in found]

    def resource(self, key: str, build: Callable[[], Any]) -> Any:
        """A heavy thing (a draft model, an index) shared by all plans; built on first use."""
        self.worker.check()
        with self._loading:
            if key not in self._resources:
                self._resources[key] = build()
            return self._resources[key]

    def close(self) -> None:
        """End every request as aborted, tell the plugins, stop the thread. Safe to call twice, and in a forked process."""
        self.worker.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- for the engine's thread, which holds no engine


def _finish(loop: Loop, planner: Planner) -> None:
    for lane, seq in list(loop.seqs.values()):
        loop.end(lane, seq, "aborted")
    loop.dispatch.tell(planner.live_hooks("engine_closed"))


def _match(dispatch: Dispatcher, worker: Worker, seq: Sequence, pool: Pool) -> PrefixMatch | None:
    found: PrefixMatch | None = dispatch.first([seq], "match_prefix", _prefix_match, seq=seq, pool=pool)
    if found is not None and found.loading is not None:
        found.loading.add_done_callback(lambda _: worker.post(lambda: None))
    return found


def _reclaim(dispatch: Dispatcher, planner: Planner, pool: Pool, num_blocks: int) -> None:
    dispatch.tell(planner.live_hooks("reclaim_blocks"), pool=pool, num_blocks=num_blocks)


def _prefix_match(found: Any) -> PrefixMatch:
    if not isinstance(found, PrefixMatch):
        raise TypeError(f"returned {found!r}, not a PrefixMatch")
    return found
