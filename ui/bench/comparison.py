"""One prompt under several plans: laps, speed-ups with their spread, and whether the answers are the same.

`compare` runs the plans in turn and returns a `Comparison`. Every plan is compared with the first plan. Where an answer may differ
on purpose, or does differ, the distributions of both plans are compared on the first plan's answer (ui/bench/scoring.py).
`Comparison.to_json` (ui/bench/results.py) is the document that the command line prints, the page draws and the store keeps.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from pitlane import PitlaneError, SamplingParams
from pitlane.testing import choice_gap
from pitlane.ui.bench.results import Comparison, PlanResult
from pitlane.ui.bench.scoring import Reading, num_scored, read_along
from pitlane.ui.bench.turns import Advance, Lap, Turns, check_lanes
from pitlane.ui.bench.verdicts import attribute, difference, judge, notes_of, settle_outcomes

if TYPE_CHECKING:
    from pitlane import Engine, Plan, Prompt


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
        judge(result, laps[result.label], laps[first_label], engine, plans[result.label] is plans[first_label])
    notes = []
    try:
        _score(turns, prompt, sampling, results, plans, laps)
    except PitlaneError as error:  # the laps are measured; their report shall not be lost
        notes.append(f"the distributions were not compared: {error}")
    settle_outcomes(results)
    attribute(results)
    advance(turns.total, turns.total)
    return Comparison(
        {name: value for name, value in engine.loader.describe().items() if name != "weight_bytes"},
        time.time(),
        seed,
        sampling.temperature,
        sampling.max_tokens,
        repeats,
        results,
        [*notes_of(results, repeats), *notes],
    )


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
