"""The report of a comparison in words, shared by the command line and the page. Plain text from `Comparison.to_json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pitlane.ui.render import milliseconds

Plan = Mapping[str, Any]
NEAR_TIE = 0.05  # logits; bfloat16 rounds a logit near 16 by as much
OUTCOMES = {
    "first": "baseline",
    "same plan": "the same plan: the difference is noise",
    "faster": "faster",
    "slower": "slower",
    "no difference": "no difference beyond noise",
    "one lap": "one lap cannot be told from noise",
    "too short": "too short to compare",
}


def ratio_text(ratio: Mapping[str, Any] | None) -> str:
    """`1.84 (1.80 to 1.90)`; `-` if it was not measured."""
    return "-" if ratio is None else f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def speed_text(plan: Plan) -> str:
    """The speed-up of a plan, or why there is none."""
    if plan["outcome"] == "first":
        return "1.00"
    return OUTCOMES["too short"] if plan["outcome"] == "too short" else ratio_text(plan["speed"])


def answer_text(plan: Plan) -> str:
    """Whether the answer is the first plan's answer."""
    verdict, divergence = plan["verdict"], plan["divergence"]
    if verdict in ("first", "identical"):
        return {"first": "-", "identical": "identical"}[verdict]
    if verdict == "unstable":
        return "varies between laps"
    return f"differs from token {divergence['index'] + 1}"


def gap_text(plan: Plan, dtype: str) -> str:
    """How close the choice at the divergence was; empty if it was not measured."""
    gap = _gap(plan)
    if gap is None:
        return ""
    tie = f": a near-tie, which rounding in {dtype} can tip" if is_near_tie(plan, dtype) else ""
    return f"at the first difference, the two tokens were {gap:.3g} logits apart{tie}"


def is_near_tie(plan: Plan, dtype: str) -> bool:
    """Whether rounding explains the divergence of a plan that computes the same function."""
    gap = _gap(plan)
    return gap is not None and gap < NEAR_TIE and dtype != "float64" and plan["difference"] in ("identical", "rounding")


def _gap(plan: Plan) -> float | None:
    gap = plan["divergence"] and plan["divergence"]["logit_gap"]
    return None if gap is None else abs(gap)


def scores_text(plan: Plan, first: Plan) -> str:
    """KL and perplexity against the first plan; empty if they were not measured."""
    scores, base = plan["scores"], first["scores"]
    if scores is None or base is None or plan is first:
        return ""
    return (
        f"KL {scores['kl']:.2g} nats a token (largest {scores['kl_max']:.2g}), perplexity {scores['perplexity']:.4g} instead of "
        f"{base['perplexity']:.4g}, the same likeliest token in {100 * scores['top1']:.0f} % of {scores['num_tokens']}"
    )


def laps_text(plan: Plan) -> str:
    """Time of the plugins' hooks, and time that plugins saved; empty without either."""
    parts = [f"{name} cost {milliseconds(ms)}" for name, ms in plan["plugin_ms"].items() if ms >= 0.1]
    parts += [bought_text(name, gain) for name, gain in plan["bought_ms"].items()]
    parts += [f"{name} paused: {why}" for name, why in plan["paused"].items()]
    return ", ".join(parts)


def bought_text(name: str, gain: Mapping[str, Any]) -> str:
    """The ablated gain of a plugin: its range holds 0 if the gain is no more than noise."""
    if gain["low"] <= 0 <= gain["high"]:
        return f"{name} saved nothing beyond noise"
    verb = "saved" if gain["ms"] > 0 else "lost"
    low, high = sorted((abs(gain["low"]), abs(gain["high"])))
    return f"{name} {verb} {milliseconds(abs(gain['ms']))} ({milliseconds(low)} to {milliseconds(high)})"
