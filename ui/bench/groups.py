"""A comparison of more plans than an engine keeps open at once: in groups, each with laps of the first plan of its own.

Every ratio is taken within a group, so noise of the machine between groups meets no ratio. `single_changes` makes the plans of
"every plugin": the first plan, and the first plan with one plugin more or one less.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pitlane import PitlaneError, SamplingParams
from pitlane.ui.bench import comparison
from pitlane.ui.bench.results import Comparison
from pitlane.ui.bench.turns import Advance, Turns
from pitlane.ui.plugin_text import parse_settings, unavailable

if TYPE_CHECKING:
    from pitlane import Engine, Plan, Prompt

Plans = Mapping[str, "Plan"]


def single_changes(engine: Engine, first: Plan) -> tuple[dict[str, Plan], dict[str, str]]:
    """Plans by label that differ from a plan by one plugin, the built-in and all installed ones; and reasons why a plugin has none.

    A plugin that is not on takes the place of the holder of its role.
    """
    plans: dict[str, Plan] = {}
    reasons: dict[str, str] = {}
    for name in engine.registry.togglable():
        reason = unavailable(engine.registry.get(name), engine.loader.build_context)
        sign = "-" if name in first.settings else "+"
        try:
            if reason:
                raise PitlaneError(reason)
            settings = parse_settings(f"{sign}{name}", (), first.settings, engine.registry).settings
            plans[f"{sign}{name}"] = engine.plan(settings)
        except PitlaneError as error:
            reasons[name] = str(error)
    return plans, reasons


def in_groups(plans: Plans, max_lanes: int) -> list[dict[str, Plan]]:
    """Divide plans into groups that need at most so many lanes. The first plan is the first of every group."""
    (first_label, first), *others = plans.items()
    groups: list[dict[str, Plan]] = []
    for label, plan in others:
        for group in groups:
            if len({member.lane_key for member in (*group.values(), plan)}) <= max_lanes:
                group[label] = plan
                break
        else:
            groups.append({first_label: first, label: plan})
    return groups or [{first_label: first}]


def compare_in_groups(
    engine: Engine,
    plans: Plans,
    prompt: Prompt,
    sampling: SamplingParams,
    repeats: int,
    advance: Advance = lambda done, total: None,
    started: list[Turns] | None = None,
) -> Comparison:
    """Compare plans with the first, as `comparison.compare` does, however many lanes they need.

    A plan that cannot be loaded is left out with a note, unless it is the first plan. Raises as `comparison.compare`.
    """
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(31))
    groups = in_groups(plans, engine.max_lanes)
    if len(groups) == 1:
        return comparison.compare(engine, plans, prompt, sampling, repeats, advance, started)
    sizes = [(repeats + 2) * len(group) for group in groups]
    parts: list[Comparison] = []
    notes: list[str] = []
    for index, group in enumerate(groups):
        loaded = _loaded(engine, group, notes)
        if len(loaded) < 2 and (parts or index + 1 < len(groups)):
            continue
        shifted = _shifted(advance, sum(sizes[:index]), sum(sizes))
        parts.append(comparison.compare(engine, loaded, prompt, sampling, repeats, shifted, started))
    advance(sum(sizes), sum(sizes))
    return _joined(parts, notes)


def _shifted(advance: Advance, before: int, total: int) -> Advance:
    """Progress of a group as progress of the whole."""
    return lambda done, _: advance(before + done, total)


def _loaded(engine: Engine, group: Plans, notes: list[str]) -> dict[str, Plan]:
    """The plans of a group whose weights are loaded; adds a note for every other plan."""
    loaded: dict[str, Plan] = {}
    for label, plan in group.items():
        try:
            engine.lane_of(plan)
        except PitlaneError as error:
            if not loaded:
                raise
            notes.append(f"{label} was left out: {error}")
        else:
            loaded[label] = plan
    return loaded


def _joined(parts: Sequence[Comparison], notes: Sequence[str]) -> Comparison:
    """One report: the first plan by its laps in the first group, every other plan by its group."""
    first = parts[0]
    plans = [*first.plans, *(plan for part in parts[1:] for plan in part.plans[1:])]
    remarks = dict.fromkeys([*(note for part in parts for note in part.notes), *notes])
    joined = f"measured in {len(parts)} groups: every ratio is to the laps of {first.plans[0].label} in the same group"
    return replace(first, plans=plans, notes=[joined, *remarks])
