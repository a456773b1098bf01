"""The stats of a request: one record, the same in `--json`, on the page and in the database. Times are milliseconds.

`plugin_ms` is the time of a plugin's hooks. `bought_ms` is an estimate of the time that a plugin saved. A drafter saves the time
of a plain step for each accepted token, less the extra time of steps with drafts. A prefix hit saves the prefill time of its
tokens. An estimate that was made under more load would be too high. So the request's own times are upper bounds: an accepted
token saves at most a decode step of the request (the median or the mean, whichever is shorter), and a cached token saves at most
the time of a computed prompt token.
"""

from __future__ import annotations

from statistics import fmean, median_low
from typing import Any

from pitlane.engine.run.lane import Lane
from pitlane.engine.sequence import Sequence


def request_stats(seq: Sequence, lane: Lane | None, kv_bytes: int) -> dict[str, Any]:
    """Return the stats of a finished sequence, without `Loader.describe`. lane: None if the sequence ended before its lane opened.

    kv_bytes: bytes of the blocks that the sequence held.
    """
    timing = seq.timing
    finished = timing.finished or timing.submitted
    admitted = timing.admitted or finished
    first = timing.first_token or finished
    gaps = [1e3 * gap for gap in timing.gaps]
    decode = finished - first
    count = seq.num_completion_tokens
    return {
        "plugins": seq.plan.settings,
        "exactness": seq.plan.exactness,
        "batch_invariant": lane is not None and lane.built.is_batch_invariant,
        "seed": seq.request.seed,
        "prompt_tokens": seq.request.num_prompt_tokens,
        "cached_tokens": seq.kv.num_cached_tokens,
        "completion_tokens": count,
        "queue_ms": _ms(admitted - timing.submitted),
        "prefill_ms": _ms(first - admitted),
        "ttft_ms": _ms(first - timing.submitted),
        "decode_ms": _ms(decode),
        "tpot_ms": {"p50": _percentile(gaps, 0.5), "p95": _percentile(gaps, 0.95)},
        "tokens_per_second": round((count - 1) / decode, 2) if count > 1 and decode > 0 else None,
        "steps": timing.num_steps,
        "draft_tokens": timing.num_draft_tokens,
        "accepted_tokens": timing.num_accepted_tokens,
        "preemptions": seq.num_preemptions,
        "plugin_ms": {name: _ms(seconds) for name, seconds in sorted(timing.plugin_seconds.items())},
        "bought_ms": _bought(seq, lane),
        "paused": _paused(seq),
        "failed": dict(seq.failed),
        "notes": dict(seq.notes),
        "kv_bytes": kv_bytes,
    } | ({"weight_bytes": lane.weight_bytes, "kv_bytes_per_token": lane.kv_bytes_per_token} if lane is not None else {})


def _bought(seq: Sequence, lane: Lane | None) -> dict[str, dict[str, Any]]:
    bought: dict[str, dict[str, Any]] = {}
    timing, drafter = seq.timing, seq.plan.drafter
    if drafter is not None:
        saved = timing.plain_step_seconds - timing.draft_extra_seconds
        saved = min(saved, timing.num_accepted_tokens * _own_step(seq))
        bought[drafter.name] = {"ms": _ms(saved), "how": "modelled"}
    for hook in seq.plan.hook("match_prefix"):
        rates = [rate for rate in (lane and lane.pacing.seconds_per_prompt_token, _own_rate(seq)) if rate]
        tokens = seq.kv.num_cached_tokens if hook.plugin.name == seq.kv.prefix_plugin else 0
        bought[hook.plugin.name] = {"ms": _ms(tokens * min(rates, default=0.0)), "how": "modelled"}
    return bought


def _paused(seq: Sequence) -> dict[str, str]:
    """Why the drafter was paused when the request ended."""
    drafter, outlook = seq.plan.drafter, seq.outlook
    return {drafter.name: outlook.reason} if drafter and outlook and outlook.reason else {}


def _own_step(seq: Sequence) -> float:
    """Seconds of a decode step: the median or the mean, whichever is shorter."""
    steps = [gap for gap in seq.timing.gaps if gap]
    return min(median_low(steps), fmean(steps)) if steps else 0.0


def _own_rate(seq: Sequence) -> float:
    """Prefill seconds per computed prompt token of this request."""
    computed = seq.request.num_prompt_tokens - seq.kv.num_cached_tokens
    first, admitted = seq.timing.first_token, seq.timing.admitted
    return (first - admitted) / computed if first and admitted and computed else 0.0


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _percentile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None
