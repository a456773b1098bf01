"""`check_plugin` checks every clause of the contract on a plugin.

A check runs a plan with the plugin and the same plan without it, on a small model. In float64, rounding changes no token, so equal
ids prove `identical`, and answers with drafters can be compared token by token. The check uses the first dtype that the plugin
serves: float64, float32, bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pitlane.engine.decode.params import SamplingParams
from pitlane.engine.engine import Engine
from pitlane.engine.errors import BadOption, PitlaneError
from pitlane.engine.events import Result
from pitlane.engine.plan.hookspecs import SPECS
from pitlane.engine.plan.import_watch import settings_kept
from pitlane.engine.plan.plan import Settings
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.plan.validation import hooks_of
from pitlane.testing.exactness import Effect, check_identical, check_share, check_steering
from pitlane.testing.leaks import Watch, check_sequences
from pitlane.testing.neighbours import check_drafters, check_requests
from pitlane.testing.outcome import Finding, PluginCheck
from pitlane.testing.runs import EXACT, Run
from pitlane.testing.static import check_docs, check_options

DTYPES = (EXACT, "float32", "bfloat16")


def check_plugin(
    plugin: type[Plugin] | str,
    options: Mapping[str, Any] | None = None,
    *,
    bound: float | None = None,
    effect: Effect | None = None,
    base: Settings | None = None,
    registry: PluginRegistry | None = None,
    model: str = "random:tiny",
    num_tokens: int = 64,
    drafters: bool = True,
) -> PluginCheck:
    """Check a plugin against its contract. The outcome names every broken clause; a broken clause raises no error.

    plugin: a class, or the name of an installed plugin. bound: the largest mean share, in [0, 1), of the next token's probability
    that a `rounding` or an `approximate` plugin may move. Without a bound, a rounding plugin must stay within twice the rounding
    error of the core in this dtype, and an approximate plugin is measured, not proved. effect: returns whether an answer shows the
    declared effect of a `steering` plugin. All answers with the plugin must show it, and some answer without the plugin must not.
    Without `effect`, some answer must change. base: settings of other plugins in both plans; required plugins are added.
    registry: the plugins to choose from (None: all installed plugins). model: any model of `Engine`. drafters: also check the
    plugin with every built-in drafter.
    Raises UnknownPlugin for an unknown name, BadOption for wrong options or a wrong bound.
    """
    if isinstance(plugin, Engine):
        raise TypeError("check_plugin takes a plugin class or a name: check_plugin(MyPlugin, {'option': value})")
    if bound is not None and not 0 <= bound < 1:
        raise BadOption(f"bound must be at least 0 and below 1, got {bound:g}; every plugin stays within 1")
    registry = registry or PluginRegistry.load()
    if isinstance(plugin, str):
        plugin = registry.get(plugin)
    elif plugin not in [entry.plugin for entry in registry]:
        registry.add(plugin, plugin.__module__)
    values = dict(options or {})
    parsed = plugin.parse_options(values)
    settings: dict[str, dict[str, Any]] = {name: {} for name in plugin.requires} | {
        name: dict(value) for name, value in (base or {}).items()
    }
    outcome = PluginCheck(
        plugin.name,
        registry.entries[plugin.name].source,
        plugin.exactness_for(parsed),
        values,
        model,
        DTYPES[0],
        num_tokens,
        findings=[check_docs(plugin, plugin.exactness_for(parsed)), check_options(plugin)],
    )
    if registry.entries[plugin.name].serves_host:
        return _found(outcome, Finding("exactness", "skipped", "the plugin serves the host and is in no plan"))
    return _Check(plugin, outcome, registry, settings, bound, effect, drafters).run()


def _found(outcome: PluginCheck, *findings: Finding, **changes: Any) -> PluginCheck:
    return replace(outcome, findings=[*outcome.findings, *findings], **changes)


class _Check:
    """A running check. base: the settings that both plans have."""

    def __init__(
        self,
        plugin: type[Plugin],
        outcome: PluginCheck,
        registry: PluginRegistry,
        base: Settings,
        bound: float | None,
        effect: Effect | None,
        drafters: bool,
    ) -> None:
        self.plugin, self.outcome, self.registry, self.base = plugin, outcome, registry, base
        self.bound, self.effect, self.drafters = bound, effect, drafters
        self.settings = {**base, plugin.name: outcome.options}

    def run(self) -> PluginCheck:
        watch = Watch()
        engine, obstacle = self._engine()
        if engine is None:
            return _found(self.outcome, obstacle)
        with engine:
            try:
                with settings_kept() as changes:
                    self._run_planned(engine, watch)
            except PitlaneError as error:
                self._add(Finding("plan", "failed", str(error)))
                return self.outcome
        del engine
        detail = "; ".join(changes) or "no global setting changes"
        self._add(Finding.of("process", not changes, detail), watch.check())
        return self.outcome

    def _run_planned(self, engine: Engine, watch: Watch) -> None:
        """Make the plan and check the clauses. Only this call holds the plan and the plugin's instance."""
        plan = engine.plan(self.settings)
        for item in plan.plugins:
            if type(item) is self.plugin:
                watch.add(item)
        self._run(Run(engine, engine.plan(self.base), plan, self.outcome.dtype, self.outcome.num_tokens))

    def _add(self, *findings: Finding, **changes: Any) -> None:
        self.outcome = _found(self.outcome, *findings, **changes)

    def _engine(self) -> tuple[Engine | None, Finding]:
        """An engine of the first dtype that the plugin serves, or None. The finding says why there is no engine."""
        reason: str | None = None
        for dtype in DTYPES:
            engine = Engine(self.outcome.model, dtype=dtype, plugins={}, registry=self.registry)
            plugins = [self.plugin, *(self.registry.get(name) for name in self.base)]
            for plugin in plugins:
                try:
                    reason = plugin.unavailable(engine.loader.build_context)
                except Exception as error:
                    engine.close()
                    detail = f"{plugin.name}.unavailable() failed in {dtype}: {type(error).__name__}: {error}"
                    return None, Finding("unavailable", "failed", detail)
                if reason is not None:
                    break
            else:
                self.outcome = replace(self.outcome, dtype=dtype)
                return engine, Finding("unavailable", "passed", "")
            engine.close()
        return None, Finding("exactness", "skipped", f"{self.plugin.name} is unavailable here: {reason}")

    def _run(self, run: Run) -> None:
        before = self._probe(run)
        run.answer_all()
        self._check_hooks(run)
        self._check_exactness(run)
        self._add(check_requests(run))
        if self.drafters:
            self._add(check_drafters(run, self.plugin.role, self.settings, self.outcome.model, self.registry))
        after = self._probe(run)
        is_same = after.token_ids == before.token_ids and after.logprobs == before.logprobs
        detail = (
            "the engine answers as before, bit by bit" if is_same else "answers or logprobs differ from those before"
        )
        self._add(Finding.of("off again", is_same, detail))
        self._add(check_sequences(run))

    def _probe(self, run: Run) -> Result:
        """An answer without the plugin and without a drafter, because the length of drafts changes bits."""
        settings = {name: value for name, value in self.base.items() if self.registry.get(name).role != "drafter"}
        params = SamplingParams(max_tokens=min(run.num_tokens, 64), ignore_eos=True, logprobs=5)
        return run.engine.generate(run.requests[3][0], params, plan=run.engine.plan(settings))

    def _check_hooks(self, run: Run) -> None:
        answers, hooks = run.answers + run.again, hooks_of(self.plugin)
        failed = sorted({reason for answer in answers for reason in answer.stats["failed"].values()})
        notes = [answer.stats["notes"].get(self.plugin.name, {}) for answer in answers]
        failed += sorted({f"drafts are cut: {note['cut_reason']}" for note in notes if "cut_reason" in note})
        detail = "; ".join(failed) or ", ".join(hooks) or "none"
        num_drafts = sum(answer.stats["draft_tokens"] for answer in answers)
        self._add(
            Finding.of("hooks", not failed, detail),
            num_answers=len(answers),
            num_draft_tokens=num_drafts,
        )
        if self.plugin.role == "drafter":
            detail = (
                f"{num_drafts} draft tokens" if num_drafts else "the drafter returned no draft, so nothing is checked"
            )
            self._add(Finding.of("drafts", num_drafts > 0, detail))
        if any(SPECS[name].kind == "step" for name in hooks):
            seconds = sum(answer.stats["plugin_ms"].get(self.plugin.name, 0.0) for answer in answers) / 1e3
            steps = [max(answer.stats["steps"] for answer in results) for results in (run.answers, run.again)]
            overhead = round(1e6 * seconds / max(1, sum(steps)), 1)
            detail = f"{overhead} us a step of {len(run.requests)} requests"
            self._add(Finding("overhead", "measured", detail), overhead_us=overhead)

    def _check_exactness(self, run: Run) -> None:
        declared = self.outcome.declared
        if declared == "identical":
            self._add(check_identical(run))
        elif declared == "steering":
            self._add(check_steering(run, self.effect))
        else:
            share = check_share(run, declared, self.bound, self.outcome.model, self.registry)
            self._add(share.finding, moved=share.moved, bound=share.bound)
