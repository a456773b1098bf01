"""Checks of a plugin beside other requests and beside every built-in drafter."""

from __future__ import annotations

from typing import Any

from pitlane.engine.errors import PitlaneError, PlanConflict
from pitlane.engine.plan.plan import Plan, Settings
from pitlane.engine.plan.registry import BUILT_IN_SOURCE, PluginRegistry
from pitlane.testing.outcome import Finding
from pitlane.testing.runs import SAMPLINGS, Run, always_drafting, answer

DRAFTER_OPTIONS: dict[str, dict[str, Any]] = {"self_speculation": {"num_layers": 1}}  # the tiny model has two layers


def check_requests(run: Run) -> Finding:
    """Run a request alone, and beside a request of the core plan. Both answers must equal the answer in the batch."""
    if not run.is_exact:
        return Finding("two requests", "skipped", f"{run.dtype}: answers of two batches may differ at ties")
    number = len(run.requests) - 2  # the sampled request with the longest prompt
    prompt, params = run.requests[number]
    with always_drafting(run.engine, run.plan):
        alone = run.engine.generate(prompt, params, plan=run.plan)
        streams = [run.engine.submit(prompt, params, plan=plan) for plan in (run.plan, run.core)]
        with_core, core_answer = [stream.result() for stream in streams]
    wrong = []
    if alone.token_ids != run.answers[number].token_ids:
        wrong.append("a request alone has another answer than in a batch")
    if with_core.token_ids != run.answers[number].token_ids:
        wrong.append("a request beside a request without the plugin has another answer")
    if core_answer.token_ids != run.plain[number].token_ids:
        wrong.append("the plugin changes the answer of a request without it")
    return Finding.of("two requests", not wrong, "; ".join(wrong) or "alone, in a batch, mixed")


def check_drafters(run: Run, role: str | None, settings: Settings, model: str, registry: PluginRegistry) -> Finding:
    """Check the plan with every built-in drafter. It must give the same tokens, or refuse with a reason.

    role: the plugin's role in a plan. settings: the settings of the plan with the plugin.
    """
    if role == "drafter":
        return Finding("drafters", "skipped", "a plan has one drafter")
    same, refused, wrong = [], [], []
    for entry in registry:
        if entry.source != BUILT_IN_SOURCE or entry.plugin is None or entry.plugin.role != "drafter":
            continue
        options = {"model": model} if "model" in entry.plugin.Options.model_fields else {}
        options |= DRAFTER_OPTIONS.get(entry.name, {})
        try:
            plan = run.engine.plan({**settings, entry.name: options})
            run.engine.lane_of(plan)
        except PlanConflict as error:
            refused.append(f"{entry.name} is refused: {error}")
            continue
        except PitlaneError as error:
            wrong.append(f"{entry.name}: {error}")
            continue
        faults = _faults_beside(run, plan, entry.name)
        wrong += faults
        same += [] if faults else [entry.name]
    detail = "; ".join(wrong + refused + ([f"the same tokens with {', '.join(same)}"] if same else []))
    if wrong:
        return Finding("drafters", "failed", detail)
    if run.is_exact:
        return Finding("drafters", "passed", detail)
    return Finding("drafters", "measured", f"{detail} (up to ties in {run.dtype})")


def _faults_beside(run: Run, plan: Plan, drafter: str) -> list[str]:
    """The faults of three answers of a plan with a drafter: greedy, sampled and penalised, for the longest prompt."""
    size = min(48, run.num_tokens)
    results = answer(run.engine, plan, run.longest, size)
    faults = [f"{drafter}: {text}" for result in results for text in result.stats["failed"].values()]
    if run.is_exact:
        pairs = zip(results, run.answers[-len(SAMPLINGS) :], strict=True)
        if any(result.token_ids != expected.token_ids[:size] for result, expected in pairs):
            faults.append(f"{drafter} beside the plugin changes the tokens")
    return faults
