"""What the laps of a comparison say: speed-ups, whether answers are the same, what each plugin saved, why figures may mislead."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from pitlane import EXACTNESS
from pitlane.testing import first_difference
from pitlane.ui.bench.results import Divergence, PlanResult
from pitlane.ui.bench.summary import MIN_COMPARED_TOKENS, paired

if TYPE_CHECKING:
    from pitlane import Engine, Plan
    from pitlane.ui.bench.turns import Lap

# A first plan whose own speed varies by more than this share of its median was measured on a busy machine. A choice, not a
# measurement: laps of a quiet machine vary by some percent.
BUSY_SPREAD = 0.15
SHOWN_TOKENS, CONTEXT_CHARACTERS = 24, 80  # of the texts around a divergence


def difference(plan: Plan, first: Plan) -> str:
    """The least exact class of the plugins that only one of two plans has."""
    own, theirs = ({plugin.key: plugin for plugin in side.plugins} for side in (plan, first))
    plugins = [(own.get(key) or theirs[key]) for key in own.keys() ^ theirs.keys()]
    classes = [plugin.exactness_for(plugin.options) for plugin in plugins]
    return max(classes, key=list(EXACTNESS).index, default="identical")


def spread(values: Sequence[float]) -> float:
    """The range of measurements as a share of their median."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def judge(result: PlanResult, laps: list[Lap], first_laps: list[Lap], engine: Engine, is_same: bool) -> None:
    """Compare the laps of a plan with the laps of the first plan."""
    speeds, firsts = [[lap.tokens_per_second for lap in side] for side in (laps, first_laps)]
    if all(speeds) and all(firsts):
        result.speed = paired(speeds, firsts)
    times, firsts = [[lap.ttft_ms for lap in side] for side in (laps, first_laps)]
    if all(times):
        result.ttft = paired(firsts, times)
    result.outcome = "same plan" if is_same else "no difference"
    stable = all(side[0].token_ids == lap.token_ids for side in (laps, first_laps) for lap in side)
    ours, theirs = laps[-1].token_ids[0], first_laps[-1].token_ids[0]
    index = first_difference(theirs, ours)
    result.verdict = "unstable" if not stable else "identical" if index is None else "different"
    if index is not None:
        decode = engine.tokenizer.decode
        before = decode(ours[:index])
        first, other = (decode(ids[: index + SHOWN_TOKENS])[len(before) :] for ids in (theirs, ours))
        result.divergence = Divergence(index, before[-CONTEXT_CHARACTERS:], first, other)


def settle_outcomes(results: Sequence[PlanResult]) -> None:
    """Put every speed-up into a word. It must lie outside its own range and outside the noise of the first plan."""
    first = results[0]
    noise = spread(first.tokens_per_second) / 2
    noise = max([noise, *(abs(r.speed["ratio"] - 1) for r in results if r.outcome == "same plan" and r.speed)])
    for result in results[1:]:
        if min(result.completion_tokens, first.completion_tokens) < MIN_COMPARED_TOKENS or result.speed is None:
            result.outcome = "too short"
        elif result.outcome != "same plan" and result.speed["pairs"] < 2:
            result.outcome = "one lap"
        elif result.outcome != "same plan":
            ratio, low, high = (result.speed[name] for name in ("ratio", "low", "high"))
            if low > 1 and ratio > 1 + noise:
                result.outcome = "faster"
            elif high < 1 and ratio < 1 / (1 + noise):
                result.outcome = "slower"


def attribute(results: Sequence[PlanResult]) -> None:
    """Fill `bought_ms` of every plan for which another plan lacks one plugin and is equal otherwise."""
    for plan in results:
        for name in plan.plugins:
            rest = {other: options for other, options in plan.plugins.items() if other != name}
            lacking = next((other for other in results if other.plugins == rest), None)
            if lacking is None or min(plan.completion_tokens, lacking.completion_tokens) < MIN_COMPARED_TOKENS:
                continue
            gains = _gains(plan, lacking)
            plan.bought_ms[name] = {
                "ms": round(median(gains), 3),
                "low": round(min(gains), 3),
                "high": round(max(gains), 3),
                "how": "ablated",
                "against": lacking.label,
            }


def _gains(plan: PlanResult, lacking: PlanResult) -> list[float]:
    """Milliseconds per answer that a plan saves in every lap, for an answer of the length of the plan's own."""
    steps, other_steps = plan.completion_tokens - 1, lacking.completion_tokens - 1
    laps = zip(plan.ttft_ms, plan.decode_ms, lacking.ttft_ms, lacking.decode_ms, strict=True)
    return [
        (other_ttft - ttft) + other_decode / other_steps * steps - decode
        for ttft, decode, other_ttft, other_decode in laps
    ]


def notes_of(results: Sequence[PlanResult], repeats: int) -> list[str]:
    first, notes = results[0], []
    shortest = min(result.completion_tokens for result in results)
    if shortest < MIN_COMPARED_TOKENS:
        notes.append(
            f"too short to compare speed: an answer has {shortest} tokens, at least {MIN_COMPARED_TOKENS} are needed; "
            "ask for a longer answer"
        )
    if repeats < 2:
        notes.append("one repeat has no spread, so no speed-up can be told from noise; measure at least three repeats")
    elif spread(first.tokens_per_second) > BUSY_SPREAD:
        notes.append(
            f"the machine is busy: the speed of {first.label} alone varied by {100 * spread(first.tokens_per_second):.0f} % "
            "between its laps; close other programs, or measure more repeats"
        )
    failed = sorted({name for result in results for name in result.failed})
    notes += [f"{name} failed, so its plan ran without it" for name in failed]
    return notes
