"""Checks of the declared exactness class, by the answers of a `Run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pitlane.engine.engine import Engine
from pitlane.engine.events import Result
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.testing.distributions import distributions, moved
from pitlane.testing.outcome import Finding
from pitlane.testing.runs import EXACT, SAMPLINGS, Run
from pitlane.testing.ties import first_difference

ROUNDING_64 = 1e-6  # largest mean share of probability that a rounding plugin moves in float64

Effect = Callable[[Result], bool]


class Share(NamedTuple):
    """moved: share of the next token's probability that moves, mean. bound: largest `moved` that passes; None = no bound."""

    finding: Finding
    moved: float
    bound: float | None


def check_identical(run: Run) -> Finding:
    results = run.answers + run.again
    differing = []
    for number, result in enumerate(results):
        reference = run.plain[number % len(run.plain)].token_ids[: len(result.token_ids)]
        index = first_difference(reference, result.token_ids)
        if index is not None:
            differing.append(f"answer {number + 1} differs at token {index + 1}")
    count = sum(len(result.token_ids) for result in results)
    detail = "; ".join(differing) or f"{count} tokens of {len(results)} answers are equal in {run.dtype}"
    return Finding.of("exactness", not differing, detail)


def check_steering(run: Run, effect: Effect | None) -> Finding:
    """Every answer with the plugin must show the effect, and at least one answer without the plugin must not.

    effect: None if the plugin has no effect function; then at least one answer must change.
    """
    answers, plain = run.answers, run.plain
    num_changed = sum(a.token_ids != b.token_ids for a, b in zip(plain, answers, strict=True))
    if effect is None:
        detail = f"{num_changed} of {len(answers)} answers change"
        return Finding.of("exactness", num_changed > 0, detail)
    num_shown, num_plain = (sum(map(effect, results)) for results in (answers, plain))
    is_shown = num_shown == len(answers) and num_plain < len(plain)
    detail = f"the effect shows in {num_shown} of {len(answers)} answers, and in {num_plain} without the plugin"
    return Finding.of("exactness", is_shown, detail)


def check_share(run: Run, declared: str, bound: float | None, model: str, registry: PluginRegistry) -> Share:
    """Compare the next-token distributions along the greedy answer to the longest prompt."""
    engine, prompt, text = run.engine, run.longest[0][0], run.plain[-len(SAMPLINGS)].token_ids
    reference = distributions(engine, run.core, prompt, text)
    of_plugin = distributions(engine, run.plan, prompt, text)
    total = share = moved(reference, of_plugin)
    if bound is None and declared == "rounding":
        bound = ROUNDING_64
        if not run.is_exact:
            with Engine(model, dtype=EXACT, plugins={}, registry=registry) as exact:
                true = distributions(exact, exact.plan({}), prompt, text)
            bound = 2 * moved(true, reference) + ROUNDING_64
            share = moved(true, of_plugin)
    detail = f"{share:.2g} of the probability moves, mean over {len(text)} tokens"
    if bound is None:
        return Share(Finding("exactness", "measured", f"{detail}; give a bound to prove it"), total, None)
    return Share(Finding.of("exactness", share <= bound, f"{detail}; bound {bound:.2g}"), total, bound)
