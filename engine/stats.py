"""The stats of a request: one flat record, the same in `--json`, on the page and in the database.

`plugin_ms` is what a plugin's hooks cost; `bought_ms` what it saved. Here it is modelled from the run itself: a drafter
saves its accepted tokens times the time of a plain step, less the extra time of steps with drafts; a prefix hit saves its
tokens times the prefill time per token. Estimates made on a busier machine would claim too much, so this request's own
times bound both: an accepted token saves at most one of its decode steps (the median or the mean, whichever is shorter),
a cached token at most the time of a prompt token that it computed. Times are milliseconds.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, median_low
from typing import Any

from pitlane.engine.run.lane import Lane
from pitlane.engine.types import Sequence


def request_stats(seq: Sequence, lane: Lane, model: dict[str, Any]) -> dict[str, Any]:
    """Stats of a finished sequence; `model` holds what the engine knows: model, device, dtype, weight_bytes."""
    timing = seq.timing
    finished = timing.finished or timing.submitted
    admitted = timing.admitted or finished
    first = timing.first_token or finished
    gaps = [1e3 * (b - a) for a, b in pairwise(timing.token_times)]
    decode = finished - first
    count = seq.num_completion_tokens
    return model | {
        "plugins": seq.plan.settings,
        "exactness": seq.plan.exactness(),
        "seed": seq.seed,
        "prompt_tokens": seq.num_prompt_tokens,
        "cached_tokens": seq.num_cached_tokens,
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
        "kv_bytes": sum(store.num_bytes for store in lane.stores) * _blocks(seq) // lane.pool.num_blocks,
    }


def _bought(seq: Sequence, lane: Lane) -> dict[str, dict[str, Any]]:
    bought: dict[str, dict[str, Any]] = {}
    for plugin in seq.plan.plugins:
        if plugin.role == "drafter":
            timing = seq.timing
            saved = timing.plain_step_seconds - timing.draft_extra_seconds
            saved = min(saved, timing.num_accepted_tokens * _own_step(seq))
            bought[plugin.name] = {"ms": _ms(saved), "how": "modelled"}
    holder = next((hook.plugin.name for hook in seq.plan.hooks.get("match_prefix", ())), None)
    if holder is not None:
        rates = [rate for rate in (lane.clock.per_prompt_token, _own_rate(seq)) if rate]
        bought[holder] = {"ms": _ms(seq.num_cached_tokens * min(rates, default=0.0)), "how": "modelled"}
    return bought


def _paused(seq: Sequence) -> dict[str, str]:
    """Why the governor left the drafter alone when the request ended."""
    drafter, drafting = seq.plan.drafter, seq.drafting
    return {drafter.name: drafting.reason} if drafter and drafting and drafting.reason else {}


def _own_step(seq: Sequence) -> float:
    """Seconds of a decode step of this request; the tokens of one step have one time."""
    steps = [after - before for before, after in pairwise(dict.fromkeys(seq.timing.token_times))]
    return min(median_low(steps), fmean(steps)) if steps else 0.0


def _own_rate(seq: Sequence) -> float:
    """Seconds per prompt token that this request itself computed."""
    computed = seq.num_prompt_tokens - seq.num_cached_tokens
    first, admitted = seq.timing.first_token, seq.timing.admitted
    return (first - admitted) / computed if first and admitted and computed else 0.0


def _blocks(seq: Sequence) -> int:
    return max((len(table) for table in seq.block_tables), default=0)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _percentile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None
