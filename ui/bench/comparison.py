"""One prompt under several plans: laps, speed-ups with their spread, and whether the answers are the same.

`compare` runs the plans in turn and returns a `Comparison`. Every plan is compared with the first plan. Where an answer may differ
on purpose, or does differ, the distributions of both plans are compared on the first plan's answer (ui/bench/scoring.py).
`Comparison.to_json` is the document that the command line prints, the page draws and the store keeps.
"""

from __future__ import annotations

import csv
import io
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pitlane import EXACTNESS, PitlaneError, SamplingParams
from pitlane.testing import choice_gap, first_difference
from pitlane.ui.bench.scoring import Reading, Scores, num_scored, read_along
from pitlane.ui.bench.summary import MIN_COMPARED_TOKENS, paired, summary
from pitlane.ui.bench.turns import Advance, Lap, Turns, check_lanes

if TYPE_CHECKING:
    from pitlane import Engine, Plan, Prompt

# A first plan whose own speed varies by more than this share of its median was measured on a busy machine. A choice, not a
# measurement: laps of a quiet machine vary by some percent.
BUSY_SPREAD = 0.15
SHOWN_TOKENS, CONTEXT_CHARACTERS = 24, 80  # of the texts around a divergence
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


def compare(
    engine: Engine,
    plans: Mapping[str, Plan],
    prompt: Prompt,
    sampling: SamplingParams,
    repeats: int,
    advance: Advance = lambda done, total: None,
    started: list[Turns] | None = None,
) -> Comparison:
    """Run the plans in turn and compare them with the first. Without a seed, all plans get the same random seed.

    Documents of the prompt are read before every lap, outside the measurement, by the plans that keep KV. started: gets the
    `Turns`, so that another thread can cancel. Raises Cancelled, BadOption, or the PitlaneError of a request.
    """
    check_lanes(engine, plans)
    seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
    sampling = replace(sampling, seed=seed, n=1)
    end = max((segment.end for segment in prompt.segments), default=0)
    known = [prompt.token_ids[:end]] if 0 < end < len(prompt.token_ids) else []
    # Without segments the prefix cache keeps KV in memory only: a lap writes no file.
    bare, salt = replace(prompt, segments=()), f"compare {secrets.token_hex(4)} "
    turns = Turns(engine, plans, [bare], sampling, repeats, advance, known=known, salt=salt)
    turns.num_extra = len(plans)  # every plan may be scored
    if started is not None:
        started.append(turns)
    laps = turns.run()
    results = [_measured(label, plan, laps[label]) for label, plan in plans.items()]
    first_label = next(iter(plans))
    for result in results[1:]:
        result.difference = difference(plans[result.label], plans[first_label])
        _judge(result, laps[result.label], laps[first_label], engine, plans[result.label] is plans[first_label])
    notes = []
    try:
        _score(turns, prompt, sampling, results, plans, laps)
    except PitlaneError as error:  # the laps are measured; their report shall not be lost
        notes.append(f"the distributions were not compared: {error}")
    _settle_outcomes(results)
    _attribute(results)
    advance(turns.total, turns.total)
    return Comparison(
        {name: value for name, value in engine.loader.describe().items() if name != "weight_bytes"},
        time.time(),
        seed,
        sampling.temperature,
        sampling.max_tokens,
        repeats,
        results,
        [*_notes(results, repeats), *notes],
    )


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


# ---- measurements


def _measured(label: str, plan: Plan, laps: Sequence[Lap]) -> PlanResult:
    last = laps[-1].results[0]
    stats = [lap.results[0].stats for lap in laps]
    names = sorted({name for one_lap in stats for name in one_lap["plugin_ms"]})
    num_steps = max(1, sum(lap.num_steps for lap in laps))
    num_accepted = sum(lap.total("accepted_tokens") for lap in laps)
    return PlanResult(
        label=label,
        plugins=plan.settings,
        exactness=plan.exactness,
        difference="identical",
        text=last.text,
        finish_reason=last.finish_reason,
        prompt_tokens=last.stats["prompt_tokens"],
        cached_tokens=last.stats["cached_tokens"],
        completion_tokens=len(last.token_ids),
        tokens_per_second=[lap.tokens_per_second for lap in laps],
        ttft_ms=[lap.ttft_ms for lap in laps],
        decode_ms=[lap.decode_ms for lap in laps],
        tpot_ms={name: _median(one_lap["tpot_ms"][name] for one_lap in stats) for name in ("p50", "p95")},
        tokens_per_step=round(sum(lap.num_tokens for lap in laps) / num_steps, 3),
        draft_tokens=sum(lap.total("draft_tokens") for lap in laps),
        accepted_tokens=num_accepted,
        accepted_per_step=round(num_accepted / num_steps, 3),
        weight_bytes=last.stats.get("weight_bytes", 0),
        kv_bytes=last.stats["kv_bytes"],
        plugin_ms={name: _median(one_lap["plugin_ms"].get(name, 0.0) for one_lap in stats) or 0.0 for name in names},
        paused=last.stats["paused"],
        failed=last.stats["failed"],
    )


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return round(median(known), 3) if known else None


def _judge(result: PlanResult, laps: list[Lap], first_laps: list[Lap], engine: Engine, is_same: bool) -> None:
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


def _settle_outcomes(results: Sequence[PlanResult]) -> None:
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


def _attribute(results: Sequence[PlanResult]) -> None:
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


def _notes(results: Sequence[PlanResult], repeats: int) -> list[str]:
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


# ---- distributions


def _score(
    turns: Turns,
    prompt: Prompt,
    sampling: SamplingParams,
    results: Sequence[PlanResult],
    plans: Mapping[str, Plan],
    laps: Mapping[str, Sequence[Lap]],
) -> None:
    """Compare distributions where a plan may differ on purpose; measure the gap at every divergence."""
    first = results[0]
    others = [r for r in results[1:] if r.difference in ("approximate", "steering") or r.divergence is not None]
    answer = laps[first.label][-1].token_ids[0]
    count = num_scored(len(answer), turns.engine.loader.vocab_size)
    if not others or not count:
        return
    turns.step()
    reading = read_along(turns, prompt, answer[:count], plans[first.label], None, f"{turns.salt}first")
    first.scores = reading.scores()
    for result in others:
        if result.difference in ("approximate", "steering"):
            turns.step()
            other = read_along(
                turns, prompt, answer[:count], plans[result.label], reading, f"{turns.salt}{result.label}"
            )
            result.scores = other.scores()
        if result.divergence is not None:
            theirs = laps[result.label][-1].token_ids[0]
            gap = _gap(result.divergence.index, answer, theirs, reading, sampling, len(prompt.token_ids))
            result.divergence = replace(result.divergence, logit_gap=gap)


def _gap(
    index: int, answer: Sequence[int], other: Sequence[int], reading: Reading, sampling: SamplingParams, start: int
) -> float | None:
    if index >= min(len(answer), len(other), len(reading.kept)):
        return None
    pair, logprobs = (answer[index], other[index]), reading.kept[index]
    gap = float(logprobs[pair[0]] - logprobs[pair[1]])
    return round(choice_gap(gap, pair, sampling, sampling.seed or 0, start + index), 6)
