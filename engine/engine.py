"""The engine: one model, its plans and lanes, and the thread that runs the loop (`engine/loop.py`).

`submit` may be called from any thread. It returns a `Stream` of events. Sequences, pools and stores belong to the engine's
thread. The engine calls plugins only through their hooks.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any, overload

from pitlane.engine.decode.params import SamplingParams
from pitlane.engine.errors import BadOption, PitlaneError
from pitlane.engine.events import Result
from pitlane.engine.lanes import Lanes
from pitlane.engine.loader import MAX_LANES, Loader
from pitlane.engine.loop import Loop
from pitlane.engine.plan.dispatch import Dispatcher
from pitlane.engine.plan.plan import Plan, Settings
from pitlane.engine.plan.planner import Planner
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.requests import check_length, check_request, is_batch, make_sequence
from pitlane.engine.roster import Roster
from pitlane.engine.run.lane import Lane
from pitlane.engine.stream import Stream
from pitlane.engine.text.tokenizer import Prompt
from pitlane.engine.worker import Worker

log = logging.getLogger("pitlane")
GREEDY = SamplingParams()


class Engine:
    """Serves one model under any number of plans.

    model: `bundled`, `smollm2`, `pip:<distribution>==<version>`, a local folder, a local `.gguf` file, a Hugging Face id, or
    `random:<preset>`. plugins: settings of the default plan ({name: {option: value}}); None = the default settings. `plugins` may
    be a callable: it receives the default settings and returns the settings to use. Raises PitlaneError for every failure that
    a user can cause. An engine closes itself when the caller drops it. In a forked process `plan`, `lane_of`, `submit` and
    `generate` raise EngineClosed; `close` does nothing.

    `document_plan` is the plan for questions about a document: the default plan, and the plugins that were made for documents and
    for this model, such as an adapter. Without such a plugin it is `default_plan` itself. documents: `default_plan` is the
    document plan, so its weights alone are loaded.

    max_lanes: most lanes that are open at once; plans that take turns in more lanes load weights at every turn.
    """

    max_lanes = MAX_LANES

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
        documents: bool = False,
    ) -> None:
        self.registry = registry or PluginRegistry.load()
        self.loader = Loader(model, dtype, device, threads, context, kv_memory, max_step_tokens, self.registry)
        self.tokenizer = self.loader.tokenizer
        self.planner = Planner(self.registry, self.loader.build_context)
        self.worker = Worker()
        dispatch = Dispatcher(self.planner.resolve, self.registry.suspensions)
        self.lanes = Lanes(self.loader, dispatch, self.worker)
        self.roster = Roster(self.lanes, self.loader, dispatch, self.worker.post)
        self.loop = Loop(self.lanes, self.roster, dispatch, self.loader.vocab_size)
        self._ids = count()
        self.worker.start(
            self.loop.ready_lanes, self.loop.step_safely, partial(_finish, self.roster, self.lanes, self.planner)
        )
        weakref.finalize(self, self.worker.stop).atexit = False  # the engine's thread holds no reference to the engine
        try:
            self.default_plan = self.plan(self.planner.settings(plugins))
            self.document_plan = self._document_plan(plugins)
            self.default_plan = self.document_plan if documents else self.default_plan
            self.loader.share_memory(self.default_plan)
            self.lane_of(self.default_plan)
        except BaseException:
            self.close()
            raise
        log.info(self.loader.describe_memory())

    def plan(self, settings: Settings) -> Plan:
        """Resolve a set of plugins and their options to a plan."""
        self.worker.check()
        return self.planner.resolve(settings)

    def _document_plan(self, plugins: Settings | Callable[[Settings], Settings] | None) -> Plan:
        """The plan for questions about a document. A plugin that cannot start, such as a damaged adapter, must stop no engine."""
        try:
            return self.plan(self.planner.settings(plugins, documents=True))
        except PitlaneError as error:
            log.warning("questions about documents get the default plugins: %s", error)
            return self.default_plan

    def is_loaded(self, plan: Plan) -> bool:
        """Whether the weights of the plan's lane are loaded."""
        return plan.lane_key in self.lanes.by_key

    def lane_of(self, plan: Plan) -> Lane:
        """Return the lane that runs a plan. If the lane is not open, open it and wait until it is open."""
        self.worker.check()
        return self.lanes.open_here(plan)

    def submit(
        self,
        prompt: Prompt | SequenceOf[int] | str,
        sampling: SamplingParams = GREEDY,
        *,
        plan: Plan | None = None,
        salt: str = "",
    ) -> Stream:
        """Queue a request and return the stream of its events. Text gets no chat template (`tokenizer.render_chat` adds it).

        Never waits for a model to load: while the lane of the plan opens, the request waits. If the lane cannot open, the stream
        raises the error. Raises BadOption for wrong arguments. Raises PromptTooLong if the lane is open; if not, the stream
        raises it.
        """
        self.worker.check()
        plan = self.default_plan if plan is None else plan
        check_request(sampling, plan, salt)
        ids = [next(self._ids) for _ in range(sampling.n)]
        seq = make_sequence(ids, prompt, sampling, plan, salt, self.loader)
        lane = self.lanes.ready(plan)
        if lane is not None:
            check_length(seq.num_tokens, lane, self.loader)
        roster, post = self.roster, self.worker.post

        def abort() -> None:
            self.worker.post(lambda: roster.abort(ids))  # uses `self`, so that a stream keeps its engine alive

        stream = Stream(abort, lambda: post(lambda: roster.watch(ids)), len(ids))
        for seq_id in ids:
            roster.streams[seq_id] = stream
        if not post(lambda: roster.enter(seq)):
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
        """Submit prompts and wait. Returns a Result for one prompt, or a list of Results in the order of the prompts.

        sampling: the SamplingParams of all prompts, or a list with the SamplingParams of every prompt. The error of a prompt is
        raised and stops the other requests. To get the errors one by one, call `submit` for every prompt.
        """
        if not is_batch(prompt):
            return self.submit(prompt, sampling, **options).result()
        params = list(sampling) if isinstance(sampling, (list, tuple)) else [sampling] * len(prompt)
        if len(params) != len(prompt):
            raise BadOption(f"{len(prompt)} prompts came with {len(params)} SamplingParams; give 1 or {len(prompt)}")
        with ExitStack() as stack:  # aborts the streams that are not read to the end
            pairs = zip(prompt, params, strict=True)
            streams = [stack.enter_context(self.submit(text, param, **options)) for text, param in pairs]
            return [stream.result() for stream in streams]

    def close(self) -> None:
        """End every request as aborted, tell the plugins, stop the thread. Safe to call twice, and in a forked process."""
        self.worker.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _finish(roster: Roster, lanes: Lanes, planner: Planner) -> None:
    """End every request, close the lanes and the plugins. Takes no Engine: the thread must keep no engine alive."""
    for close in (roster.abort_all, lanes.close, planner.close):
        try:
            close()
        except Exception:
            log.exception("the engine could not close all that it holds")
