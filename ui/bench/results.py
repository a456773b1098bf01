"""The results of a comparison as data: a `Comparison` of `PlanResult`s, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from pitlane.ui.bench.scoring import Scores
from pitlane.ui.bench.summary import summary

Outcome: TypeAlias = Literal["first", "same plan", "faster", "slower", "no difference", "one lap", "too short"]
Verdict: TypeAlias = Literal["first", "identical", "different", "unstable"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token that differs from the first plan's answer. index: from 0, in the answer.

    before: the text up to it. first, other: the continuations of the first plan and of this plan; empty if the answer ends there.
    logit_gap: how far the first plan's token was ahead under the first plan, in logits, noise of the sampling included; None if
    an answer ends there, or if it was not measured.
    """

    index: int
    before: str
    first: str
    other: str
    logit_gap: float | None = None


@dataclass(slots=True)
class PlanResult:
    """The measurements of one plan. A list has a number per lap; times are milliseconds.

    exactness: of the plan. difference: the least exact class of the plugins that only one of this plan and the first plan has.
    speed, ttft: how many times as fast as the first plan, by tokens per second and by time to first token. outcome: `speed` in a
    word. verdict: `unstable` if laps of this plan or of the first plan differ among themselves. bought_ms: time that a plugin
    saved, against the plan of this comparison that lacks only this plugin.
    """

    label: str
    plugins: dict[str, dict[str, Any]]
    exactness: str
    difference: str
    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    tokens_per_second: list[float]
    ttft_ms: list[float]
    decode_ms: list[float]
    tpot_ms: dict[str, float | None]
    tokens_per_step: float
    draft_tokens: int
    accepted_tokens: int
    accepted_per_step: float
    weight_bytes: int
    kv_bytes: int
    plugin_ms: dict[str, float]
    paused: dict[str, str]
    failed: dict[str, str]
    outcome: Outcome = "first"
    verdict: Verdict = "first"
    speed: dict[str, Any] | None = None
    ttft: dict[str, Any] | None = None
    divergence: Divergence | None = None
    scores: Scores | None = None
    bought_ms: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        for name in ("tokens_per_second", "ttft_ms", "decode_ms"):
            values = getattr(self, name)
            document[name] = summary(values) | {"laps": [round(value, 3) for value in values]}
        return document


@dataclass(slots=True)
class Comparison:
    """One prompt under several plans. facts: model, device and dtype. notes: why figures may mislead, for people."""

    facts: dict[str, Any]
    created: float
    seed: int
    temperature: float
    max_tokens: int
    repeats: int
    plans: list[PlanResult]
    notes: list[str]

    def to_json(self, texts: bool = True) -> dict[str, Any]:
        """The report. texts: with the answers and the texts around divergences; without, no word of the answers is in it."""
        plans = [plan.to_json() for plan in self.plans]
        if not texts:
            for plan in plans:
                del plan["text"]
                plan["divergence"] = plan["divergence"] and {
                    name: plan["divergence"][name] for name in ("index", "logit_gap")
                }
        own = ("created", "seed", "temperature", "max_tokens", "repeats", "notes")
        return self.facts | {name: getattr(self, name) for name in own} | {"plans": plans}


def to_csv(report: Mapping[str, Any]) -> str:
    """A report of `Comparison.to_json` as CSV: a line per plan."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(_CSV), lineterminator="\n")
    writer.writeheader()
    for plan in report["plans"]:
        writer.writerow({name: _cell(report, plan, path) for name, path in _CSV.items()})
    return out.getvalue()


_CSV = {  # column: path in the plan's document, or in the report
    **{name: name for name in ("model", "device", "dtype", "seed", "temperature", "label")},
    "plugins": "plugins",
    "exactness": "exactness",
    "verdict": "verdict",
    "outcome": "outcome",
    **{f"speed_{name}": f"speed.{name}" for name in ("ratio", "low", "high")},
    **{f"ttft_{name}": f"ttft.{name}" for name in ("ratio", "low", "high")},
    **{f"tokens_per_second_{name}": f"tokens_per_second.{name}" for name in ("median", "min", "max")},
    "ttft_ms": "ttft_ms.median",
    "tpot_ms_p50": "tpot_ms.p50",
    "tpot_ms_p95": "tpot_ms.p95",
    **{f"{name}_tokens": f"{name}_tokens" for name in ("prompt", "cached", "completion", "draft", "accepted")},
    "accepted_per_step": "accepted_per_step",
    "weight_bytes": "weight_bytes",
    "kv_bytes": "kv_bytes",
    "first_difference": "divergence.index",
    "logit_gap": "divergence.logit_gap",
    "kl": "scores.kl",
    "perplexity": "scores.perplexity",
    "plugin_ms": "plugin_ms",
}


def _cell(report: Mapping[str, Any], plan: Mapping[str, Any], path: str) -> Any:
    name, *rest = path.split(".")
    value = plan[name] if name in plan else report[name]
    for part in rest:
        value = None if value is None else value[part]
    if name == "plugins":
        return " ".join(value)
    if isinstance(value, dict):
        return " ".join(f"{key}={number}" for key, number in value.items())
    return value
