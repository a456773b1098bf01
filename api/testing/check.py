"""`check_plugin` checks every clause of the contract on a plugin.

A check runs a plan with the plugin and the same plan without it, on a small model. In float64, rounding changes no token, so equal
ids prove `identical`, and answers with drafters can be compared token by token. The check uses the first dtype that the plugin
serves: float64, float32, bfloat16.
"""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pitlane.engine.decode.params import SamplingParams
from pitlane.engine.engine import Engine
from pitlane.engine.errors import PitlaneError, PlanConflict
from pitlane.engine.events import Result
from pitlane.engine.plan.hookspecs import SPECS
from pitlane.engine.plan.plan import Plan, Settings
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.plan.registry import BUILT_IN_SOURCE, PluginRegistry
from pitlane.engine.plan.validation import hooks_of
from pitlane.engine.sequence import Sequence
from pitlane.testing.distributions import distributions, moved
from pitlane.testing.outcome import Finding, PluginCheck
from pitlane.testing.static import check_docs, check_options
from pitlane.testing.ties import first_difference

DTYPES = ("float64", "float32", "bfloat16")
DRAFT_LENGTH = 16  # tokens of a draft in a check
NUM_PROMPTS = 4
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.95, "presence_penalty": 0.5},
)
ROUNDING_64 = 1e-6  # largest mean share of probability that a rounding plugin moves in float64
DRAFTER_OPTIONS: dict[str, dict[str, Any]] = {"self_speculation": {"num_layers": 1}}  # the tiny model has two layers

Effect = Callable[[Result], bool]


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

    plugin: a class, or the name of an installed plugin. bound: the largest mean share, in [0, 1], of the next token's probability
    that a `rounding` or an `approximate` plugin may move. Without a bound, a rounding plugin must stay within twice the rounding
    error of the core in this dtype, and an approximate plugin is measured, not proved. effect: returns whether an answer shows the
    declared effect of a `steering` plugin. All answers with the plugin must show it, and some answer without the plugin must not.
    Without `effect`, some answer must change. base: settings of other plugins in both plans; required plugins are added.
    registry: the plugins to choose from (None: all installed plugins). model: any model of `Engine`. drafters: also check the
    plugin with every built-in drafter.
    Raises UnknownPlugin for an unknown name, BadOption for wrong options.
    """
    if isinstance(plugin, Engine):
        raise TypeError("check_plugin takes a plugin class or a name: check_plugin(MyPlugin, {'option': value})")
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


def prompts(vocab_size: int, count: int = NUM_PROMPTS) -> list[list[int]]:
    """Prompts of at least 20 tokens. Every second prompt repeats a passage, for drafters and caches."""
    result = []
    for seed in range(count):
        generator = random.Random(seed)
        tokens = [generator.randrange(min(256, vocab_size)) for _ in range(20 + 7 * seed)]
        result.append(tokens * 3 if seed % 2 else tokens)
    return result


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
        self.requests: list[tuple[list[int], SamplingParams]] = []

    def run(self) -> PluginCheck:
        threads = set(threading.enumerate())
        engine, reason = self._engine()
        if engine is None:
            return _found(self.outcome, Finding("exactness", "skipped", reason))
        instances: list[weakref.ref[Plugin]] = []
        num_closed = [0]
        with engine:
            try:
                self._run_planned(engine, instances, num_closed)
            except PitlaneError as error:
                self._add("plan", "failed", str(error))
                return self.outcome
        del engine
        self._check_freed(instances, num_closed[0], threads)
        return self.outcome

    def _run_planned(self, engine: Engine, instances: list[weakref.ref[Plugin]], num_closed: list[int]) -> None:
        """Make the plan and check the clauses. Only this call holds the plan and the plugin's instance."""
        plan = engine.plan(self.settings)
        instances += [_watched(item, num_closed) for item in plan.plugins if type(item) is self.plugin]
        self._run(engine, plan)

    def _add(self, clause: str, status: Any, detail: str, **changes: Any) -> None:
        self.outcome = _found(self.outcome, Finding(clause, status, detail), **changes)

    def _engine(self) -> tuple[Engine | None, str]:
        """An engine of the first dtype that the plugin serves, or None and the reason."""
        reason: str | None = None
        for dtype in DTYPES:
            engine = Engine(self.outcome.model, dtype=dtype, plugins={}, registry=self.registry)
            try:
                names = [self.plugin, *(self.registry.get(name) for name in self.base)]
                reason = next(filter(None, (item.unavailable(engine.loader.build_context) for item in names)), None)
            except Exception as error:
                reason = f"unavailable() failed: {type(error).__name__}: {error}"
            if reason is None:
                self.outcome = replace(self.outcome, dtype=dtype)
                return engine, ""
            engine.close()
        return None, f"{self.plugin.name} is unavailable here: {reason}"

    def _run(self, engine: Engine, plan: Plan) -> None:
        core, size = engine.plan(self.base), self.outcome.num_tokens
        self.requests = [
            (tokens, SamplingParams(max_tokens=size, ignore_eos=True, seed=seed, **sampling))
            for seed, tokens in enumerate(prompts(engine.loader.vocab_size))
            for sampling in SAMPLINGS
        ]
        probe = self.requests[3][0], SamplingParams(max_tokens=min(size, 64), ignore_eos=True, logprobs=5)
        undrafted = {name: value for name, value in self.base.items() if self.registry.get(name).role != "drafter"}
        before = engine.generate(
            *probe, plan=engine.plan(undrafted)
        )  # without a drafter: the length of drafts changes bits
        plain = self._answers(engine, core)
        answers = self._answers(engine, plan)
        again = self._answers(engine, plan, min(size, 64))  # with warm caches
        self._check_hooks(plan, answers + again)
        self._check_exactness(engine, core, plan, plain, answers, again)
        self._check_requests(engine, core, plan, plain, answers)
        if self.drafters:
            self._check_drafters(engine, plan, answers)
        after = engine.generate(*probe, plan=engine.plan(undrafted))
        same = after.token_ids == before.token_ids and after.logprobs == before.logprobs
        detail = "the engine answers as before, bit by bit" if same else "answers or logprobs differ from those before"
        self._add("off again", "passed" if same else "failed", detail)
        self._check_sequences(engine, plan)

    def _answers(self, engine: Engine, plan: Plan, num_tokens: int | None = None) -> list[Result]:
        """The answers of all requests at once. A drafter drafts in every step, even if a draft costs more than it saves."""
        with _always_drafting(engine, plan):
            streams = [
                engine.submit(tokens, replace(params, max_tokens=num_tokens or params.max_tokens), plan=plan)
                for tokens, params in self.requests
            ]
            return [stream.result() for stream in streams]

    # ---- clauses

    def _check_hooks(self, plan: Plan, answers: list[Result]) -> None:
        failed = sorted({reason for answer in answers for reason in answer.stats["failed"].values()})
        notes = [answer.stats["notes"].get(self.plugin.name, {}) for answer in answers]
        failed += sorted({f"drafts are cut: {note['cut_reason']}" for note in notes if "cut_reason" in note})
        names = ", ".join(hooks_of(self.plugin)) or "none"
        self._add("hooks", "failed" if failed else "passed", "; ".join(failed) or names)
        num_drafts = sum(answer.stats["draft_tokens"] for answer in answers)
        changes: dict[str, Any] = {"num_answers": len(answers), "num_draft_tokens": num_drafts}
        if self.plugin.role == "drafter":
            detail = (
                f"{num_drafts} draft tokens" if num_drafts else "the drafter returned no draft, so nothing is checked"
            )
            self._add("drafts", "passed" if num_drafts else "failed", detail)
        if any(SPECS[name].kind == "step" for name in hooks_of(self.plugin)):
            seconds = sum(answer.stats["plugin_ms"].get(self.plugin.name, 0.0) for answer in answers) / 1e3
            steps = max(1, max(answer.stats["steps"] for answer in answers[: len(self.requests)]))
            steps += max(answer.stats["steps"] for answer in answers[len(self.requests) :])
            changes["overhead_us"] = round(1e6 * seconds / steps, 1)
            self._add("overhead", "measured", f"{changes['overhead_us']} us a step of {len(self.requests)} requests")
        self.outcome = replace(self.outcome, **changes)

    def _check_exactness(
        self, engine: Engine, core: Plan, plan: Plan, plain: list[Result], answers: list[Result], again: list[Result]
    ) -> None:
        if self.outcome.declared == "identical":
            self._check_identical(plain, answers + again)
        elif self.outcome.declared == "steering":
            self._check_steering(plain, answers)
        else:
            self._check_bound(engine, core, plan, plain)

    def _check_identical(self, plain: list[Result], answers: list[Result]) -> None:
        differing = []
        for number, answer in enumerate(answers):
            reference = plain[number % len(plain)].token_ids[: len(answer.token_ids)]
            index = first_difference(reference, answer.token_ids)
            if index is not None:
                differing.append(f"answer {number + 1} differs at token {index + 1}")
        count = sum(len(answer.token_ids) for answer in answers)
        detail = "; ".join(differing) or f"{count} tokens of {len(answers)} answers are equal in {self.outcome.dtype}"
        self._add("exactness", "failed" if differing else "passed", detail)

    def _check_steering(self, plain: list[Result], answers: list[Result]) -> None:
        num_changed = sum(a.token_ids != b.token_ids for a, b in zip(plain, answers, strict=True))
        if self.effect is None:
            detail = f"{num_changed} of {len(answers)} answers change"
            self._add("exactness", "passed" if num_changed else "failed", detail)
            return
        num_shown, num_plain = (sum(map(self.effect, results)) for results in (answers, plain))
        is_shown = num_shown == len(answers) and num_plain < len(plain)
        detail = f"the effect shows in {num_shown} of {len(answers)} answers, and in {num_plain} without the plugin"
        self._add("exactness", "passed" if is_shown else "failed", detail)

    def _check_bound(self, engine: Engine, core: Plan, plan: Plan, plain: list[Result]) -> None:
        """Compare the next-token distributions along the greedy answer to the longest prompt."""
        prompt, text, bound = self.requests[-1][0], plain[-len(SAMPLINGS)].token_ids, self.bound
        reference = distributions(engine, core, prompt, text)
        share = moved(reference, distributions(engine, plan, prompt, text))
        changes = {"moved": share}
        if bound is None and self.outcome.declared == "rounding":
            bound = ROUNDING_64
            if self.outcome.dtype != DTYPES[0]:
                with Engine(self.outcome.model, dtype=DTYPES[0], plugins={}, registry=self.registry) as exact:
                    true = distributions(exact, exact.plan({}), prompt, text)
                bound = 2 * moved(true, reference) + ROUNDING_64
                share = moved(true, distributions(engine, plan, prompt, text))
        detail = f"{share:.2g} of the probability moves, mean over {len(text)} tokens"
        if bound is None:
            self._add("exactness", "measured", f"{detail}; give a bound to prove it", **changes)
            return
        self._add("exactness", "passed" if share <= bound else "failed", f"{detail}; bound {bound:.2g}", **changes)

    def _check_requests(
        self, engine: Engine, core: Plan, plan: Plan, plain: list[Result], answers: list[Result]
    ) -> None:
        """Run a request alone, and beside a request of the core plan. Both answers must equal the answer in the batch."""
        if self.outcome.dtype != DTYPES[0]:
            self._add("two requests", "skipped", f"{self.outcome.dtype}: answers of two batches may differ at ties")
            return
        number = len(self.requests) - 2  # sampled, with the longest prompt
        prompt, params = self.requests[number]
        with _always_drafting(engine, plan):
            alone = engine.generate(prompt, params, plan=plan)
            beside = [engine.submit(prompt, params, plan=used) for used in (plan, core)]
            with_core, core_answer = [stream.result() for stream in beside]
        wrong = []
        if alone.token_ids != answers[number].token_ids:
            wrong.append("a request alone has another answer than in a batch")
        if with_core.token_ids != answers[number].token_ids:
            wrong.append("a request beside a request without the plugin has another answer")
        if core_answer.token_ids != plain[number].token_ids:
            wrong.append("the plugin changes the answer of a request without it")
        self._add("two requests", "failed" if wrong else "passed", "; ".join(wrong) or "alone, in a batch, mixed")

    def _check_drafters(self, engine: Engine, plan: Plan, answers: list[Result]) -> None:
        """Check the plan with every built-in drafter. It must give the same tokens, or refuse with a reason."""
        if self.plugin.role == "drafter":
            self._add("drafters", "skipped", "a plan has one drafter")
            return
        same, refused, wrong = [], [], []
        for entry in self.registry:
            if entry.source != BUILT_IN_SOURCE or entry.plugin is None or entry.plugin.role != "drafter":
                continue
            options = {"model": self.outcome.model} if "model" in entry.plugin.Options.model_fields else {}
            options |= DRAFTER_OPTIONS.get(entry.name, {})
            try:
                with_drafter = engine.plan({**self.settings, entry.name: options})
                engine.lane_of(with_drafter)
            except PlanConflict as error:
                refused.append(f"{entry.name} is refused: {error}")
                continue
            except PitlaneError as error:
                wrong.append(f"{entry.name}: {error}")
                continue
            faults = self._beside(engine, with_drafter, entry.name, answers)
            wrong += faults
            same += [] if faults else [entry.name]
        detail = "; ".join(wrong + refused + ([f"the same tokens with {', '.join(same)}"] if same else []))
        is_exact = self.outcome.dtype == DTYPES[0]
        status = "failed" if wrong else "passed" if is_exact else "measured"
        self._add("drafters", status, detail if is_exact or wrong else f"{detail} (up to ties in {self.outcome.dtype})")

    def _beside(self, engine: Engine, plan: Plan, drafter: str, answers: list[Result]) -> list[str]:
        """The faults of three answers of a plan with a drafter: greedy, sampled and penalised, for the longest prompt."""
        size = min(48, self.outcome.num_tokens)
        first = len(self.requests) - len(SAMPLINGS)
        with _always_drafting(engine, plan):
            streams = [
                engine.submit(tokens, replace(params, max_tokens=size), plan=plan)
                for tokens, params in self.requests[first:]
            ]
            results = [stream.result() for stream in streams]
        faults = [f"{drafter}: {text}" for result in results for text in result.stats["failed"].values()]
        if self.outcome.dtype == DTYPES[0]:
            pairs = zip(results, answers[first:], strict=True)
            if any(result.token_ids != answer.token_ids[:size] for result, answer in pairs):
                faults.append(f"{drafter} beside the plugin changes the tokens")
        return faults

    def _check_sequences(self, engine: Engine, plan: Plan) -> None:
        """Abort a request. Afterwards no block may be lost, and no sequence of a finished request may be alive."""
        with engine.submit(*self.requests[0], plan=plan) as stream:
            next(iter(stream))
        engine.worker.call(lambda: None).result()
        lost = [group for lane in engine.lanes.all for group in lane.pool.groups_with_lost_blocks]
        gc.collect()
        leaked = [item for item in gc.get_objects() if type(item) is Sequence and item.plan is plan]
        faults = [f"KV blocks of groups {lost} are lost"] if lost else []
        faults += [f"{len(leaked)} sequences of finished requests are still held"] if leaked else []
        self._add("state of requests", "failed" if faults else "passed", "; ".join(faults) or "freed, also of an abort")

    def _check_freed(self, instances: list[weakref.ref[Plugin]], num_closed: int, threads: set[Any]) -> None:
        gc.collect()
        for thread in set(threading.enumerate()) - threads:
            thread.join(1.0)
        running = [thread.name for thread in set(threading.enumerate()) - threads if thread.is_alive()]
        faults = [f"threads still run: {', '.join(running)}"] if running else []
        if num_closed != len(instances):
            faults.append(f"close() was called {num_closed} times for {len(instances)} instances")
        if any(instance() is not None for instance in instances):
            faults.append("the instance is still held after the engine has closed")
        self._add("instance", "failed" if faults else "passed", "; ".join(faults) or "closed and freed")


@contextmanager
def _always_drafting(engine: Engine, plan: Plan) -> Iterator[None]:
    """Let the governor of the plan's lane ask for `DRAFT_LENGTH` tokens in every step."""
    governor = engine.lane_of(plan).pacing.governor
    governor.fixed = DRAFT_LENGTH
    try:
        yield
    finally:
        governor.fixed = None


def _watched(instance: Plugin, num_closed: list[int]) -> weakref.ref[Plugin]:
    """Count the calls of `close` of an instance."""
    close = instance.close

    def counted() -> None:
        num_closed[0] += 1
        close()

    instance.close = counted  # type: ignore[method-assign]
    return weakref.ref(instance)
