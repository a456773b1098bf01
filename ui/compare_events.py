"""Events of the Compare view: open it over an answer or an empty page, run the chosen plans, cancel, draw the report.

The run has a thread of its own. Its event changes one widget, once a second: Gradio and the browser take time from the engine, and
every widget that an event may change costs more. A comparison writes nothing into the conversation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import TYPE_CHECKING, Any

from pitlane import BadOption, SamplingParams
from pitlane.storage.conversation_rows import turns as turns_of
from pitlane.storage.errors import NotFound, PitlaneError
from pitlane.ui.ask import Ask, seed_of
from pitlane.ui.compare_panel import LAPS, Choice, Setup, problem_html, progress_html, setup_html
from pitlane.ui.first_screen import SAMPLE_QUESTIONS
from pitlane.ui.model_events import ModelEvents
from pitlane.ui.offline_gradio import gr
from pitlane.ui.page_event import Changes, Tab, page_event, session_of, warn
from pitlane.ui.plugin_events import PluginEvents
from pitlane.ui.plugin_text import parse_settings

if TYPE_CHECKING:
    from pitlane.storage.types import Message
    from pitlane.ui.bench.turns import Turns

log = logging.getLogger(__name__)
FRAME_SECONDS = 1.0
HISTORY = 100  # comparisons of the model that are drawn over time
NOW, DEFAULT, CORE, ANSWER = "now", "default", "core", "answer"


@dataclass(slots=True)
class Run:
    """A comparison that is running. started: its turns, when there are any. done, total: answers. began: on the clock of `time`."""

    started: list[Turns] = field(default_factory=list)
    done: int = 0
    total: int = 0
    is_cancelled: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float | None:
        """The expected rest of the run, by its answers so far; None before the second answer."""
        if self.done < 2:
            return None
        return (time.monotonic() - self.began) / self.done * (self.total - self.done)

    def advance(self, done: int, total: int) -> None:
        if not self.total:
            self.began = time.monotonic()
        self.done, self.total = done, total
        if self.is_cancelled:
            self.cancel()

    def cancel(self) -> None:
        self.is_cancelled = True
        for turns in self.started:
            turns.cancel()


class CompareEvents(PluginEvents, ModelEvents):
    """Events of the Compare view, over one desk. A browser tab has one view and at most one run."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.setups: dict[str, Setup] = {}  # by browser tab
        self.runs: dict[str, Run] = {}

    @page_event
    def compare(self, request: gr.Request, event: gr.EventData, tab: Tab, *values: Any) -> Changes:
        """Show the view: over the question of an answer, or over a question to write."""
        try:
            over = self._over_answer if event.id else self._over_question
            setup = over(str(event.id), tab, values)
        except PitlaneError as error:
            warn(error)
            return {self.ui.compare: problem_html(str(error)), self.ui.compare_live: ""}
        self.setups[session_of(request)] = setup
        return {self.ui.compare: setup_html(setup), self.ui.compare_live: ""}

    @page_event
    def compare_run(self, request: gr.Request, event: gr.EventData) -> Iterator[Changes]:
        """Run the marked plans; yields the progress."""
        session = session_of(request)
        setup = self.setups.get(session)
        if setup is None or session in self.runs:
            return
        self.check_open()
        fields: Mapping[str, Any] = getattr(event, "fields", None) or {}
        setup.chosen = tuple(choice.key for choice in setup.choices if choice.key in (fields.get("plan") or ()))
        setup.laps = next((n for n in LAPS if str(n) == str(fields.get("laps"))), LAPS[0])
        if not setup.is_fixed:
            setup.question = str(fields.get("question") or "").strip()
        setup.report, setup.error, setup.was_cancelled = None, "", False
        run = self.runs[session] = Run()
        worker = Thread(target=self._work, args=(setup, run), name="pitlane-compare", daemon=True)
        worker.start()
        try:
            yield {self.ui.compare_live: progress_html(0, 0)}
            while worker.is_alive():
                worker.join(FRAME_SECONDS)
                yield {self.ui.compare_live: progress_html(run.done, run.total, run.seconds_left)}
        finally:  # also if the tab was closed
            run.cancel()
            worker.join()
            self.runs.pop(session, None)

    @page_event
    def compare_stop(self, request: gr.Request) -> Changes:
        """Cancel the run of this tab."""
        run = self.runs.get(session_of(request))
        if run is not None:
            run.cancel()
        return {}

    @page_event
    def compare_show(self, request: gr.Request) -> Changes:
        """Show the report, and the measured gains at the plugin cards."""
        setup = self.setups.get(session_of(request))
        if setup is None:
            return {}
        tab = self.shown.get(session_of(request))
        changes: Changes = {self.ui.compare: setup_html(setup), self.ui.compare_live: ""}
        if tab is not None:
            changes |= self.effects(self.messages(tab))
            changes[self.ui.advice] = self.advice(tab, setup.sources["ask"].settings)
        return changes

    def retire(self) -> bool:
        """As before; a comparison does not hold up a change of the model."""
        retired = super().retire()
        if retired:
            for run in list(self.runs.values()):
                run.cancel()
        return retired

    def forget_comparison(self, session: str) -> None:
        """Cancel the run of a closed tab."""
        run = self.runs.get(session)
        if run is not None:
            run.cancel()
        self.setups.pop(session, None)

    # ---- what is compared

    def _over_answer(self, message_id: str, tab: Tab, values: Sequence[Any]) -> Setup:
        """The prompt of an answer, with its seed and temperature. Raises NotFound if the answer is gone."""
        messages = self.messages(tab)
        index = next((i for i, message in enumerate(messages) if str(message.id) == message_id), None)
        if not index or messages[index].role != "assistant":
            raise NotFound("this answer was changed in another window; the page shows it as it is now")
        answer = messages[index]
        ask = self.read(values, tab["documents"])
        sampling = self._sampling(ask, tab["documents"])
        if answer.stats:
            sampling = replace(sampling, seed=seed_of(answer), temperature=float(answer.stats.get("temperature") or 0))
        return self._setup(messages[:index], tab["documents"], ask, sampling, values, answer)

    def _over_question(self, _: str, tab: Tab, values: Sequence[Any]) -> Setup:
        """A question to write, over the attached documents, or over the sample if there are none."""
        documents = tab["documents"] or [self.desk.add_sample().id]
        ask = self.read(values, documents)
        return self._setup((), documents, ask, self._sampling(ask, documents), values, None)

    def _sampling(self, ask: Ask, documents: Sequence[str]) -> SamplingParams:
        """The sampling that an answer to the question would have."""
        return ask.sampling.params(self.desk.engine.loader.source.sampling, is_chat=not documents)

    def _setup(
        self,
        messages: Sequence[Message],
        documents: Sequence[str],
        ask: Ask,
        sampling: SamplingParams,
        values: Sequence[Any],
        answer: Message | None,
    ) -> Setup:
        titles = [document.title for document in self.desk.documents(documents)]
        facts = [*titles, "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"]
        facts += [f"seed {sampling.seed}"] if sampling.seed is not None else []
        engine = self.desk.engine
        default = engine.document_plan if documents else engine.default_plan
        choices = self._choices(ask.settings, default.settings, values, answer)
        sources = {"messages": messages, "documents": list(documents), "ask": ask, "sampling": sampling}
        keys = [choice.key for choice in choices]
        chosen = tuple(key for key in (CORE, NOW) if key in keys) if len(keys) > 1 else tuple(keys)
        question = messages[-1].text if messages else SAMPLE_QUESTIONS[0]
        return Setup(question, bool(messages), tuple(facts), tuple(choices), chosen, sources=sources)

    def _choices(
        self,
        now: Mapping[str, Mapping[str, Any]],
        default: Mapping[str, Mapping[str, Any]],
        values: Sequence[Any],
        answer: Message | None,
    ) -> list[Choice]:
        """The bare core, the default, the present plan, the answer's plan; and the present plan with one plugin changed."""
        engine = self.desk.engine
        sets = [(CORE, "Bare core", {}), (DEFAULT, "Default", default), (NOW, "On now", now)]
        if answer is not None and answer.stats:
            sets.append((ANSWER, "As answered", answer.stats["plugins"]))
        choices: list[Choice] = []
        for key, label, settings in sets:
            if not self._is_possible(settings):
                continue
            whole = _whole(engine, settings)
            same = next((i for i, choice in enumerate(choices) if _whole(engine, choice.settings) == whole), None)
            if same is None:
                choices.append(Choice(key, label, ", ".join(sorted(settings)) or "no plugins", settings))
            else:
                old = choices[same]
                choices[same] = replace(
                    old, key=NOW if key == NOW else old.key, label=f"{old.label}, {label[:1].lower()}{label[1:]}"
                )
        for card in self.ui.controls.cards:
            name = card.plugin.name
            if card.switch.interactive is False:
                continue
            changed = self._changed(name, now, values)
            if self._is_possible(changed):
                sign = "−" if name in now else "+"
                choices.append(Choice(f"{sign}{name}", f"{sign} {name}", card.plugin.summary(), changed, "plugins"))
        return choices

    def _changed(
        self, name: str, now: Mapping[str, Mapping[str, Any]], values: Sequence[Any]
    ) -> Mapping[str, Mapping[str, Any]]:
        """The present plan without a plugin; or with it, by the options of its card, in the place of the holder of its role."""
        if name in now:
            return {other: options for other, options in now.items() if other != name}
        controls, num_sampling = self.ui.controls, len(self.ui.sampling)
        switched = [True if key == name else v for key, v in zip(controls.names, values[num_sampling:], strict=True)]
        own = controls.settings(switched)[name]
        return {**parse_settings(f"+{name}", (), now, self.desk.engine.registry).settings, name: own}

    def _is_possible(self, settings: Mapping[str, Mapping[str, Any]]) -> bool:
        try:
            self.desk.engine.planner.check(settings)
        except PitlaneError:
            return False
        return True

    # ---- the thread of a run

    def _work(self, setup: Setup, run: Run) -> None:
        from pitlane.ui.bench.turns import Cancelled

        try:
            self._compare(setup, run)
        except Cancelled:
            setup.was_cancelled = True
        except PitlaneError as error:
            setup.error = str(error)
        except Exception as error:
            log.exception("a comparison failed")
            setup.error = f"the comparison failed: {type(error).__name__}: {error}"

    def _compare(self, setup: Setup, run: Run) -> None:
        from pitlane.ui.bench.chart import history_html
        from pitlane.ui.bench.groups import compare_in_groups

        engine, sources = self.desk.engine, setup.sources
        ask: Ask = sources["ask"]
        if not setup.question:
            raise BadOption("the question is empty; write one")
        if not setup.chosen:
            raise BadOption("no plan is marked; mark at least one plan")
        messages = turns_of(sources["messages"]) or [{"role": "user", "content": setup.question}]
        prompt = self.desk.prompt(sources["documents"], messages, ask.system, ask.thinking)
        plans = {choice.label: engine.plan(choice.settings) for choice in setup.choices if choice.key in setup.chosen}
        report = compare_in_groups(engine, plans, prompt, sources["sampling"], setup.laps, run.advance, run.started)
        setup.report = report.to_json()
        with suppress(PitlaneError):  # the report is on the page, kept or not
            self.desk.store.comparisons.add(report.to_json(texts=False))
            setup.history = history_html(self.desk.store.comparisons.list(HISTORY, engine.loader.source.name))


def _whole(engine: Any, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Possible settings with the values of all options, to compare plans."""
    get = engine.registry.get
    return {name: get(name).parse_options(dict(options)).model_dump() for name, options in settings.items()}
