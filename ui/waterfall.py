"""Where the time of an answer went, as HTML that unfolds below it: a row per stage, and the accepted draft tokens in the text.

Pure functions of the stats record (engine/stats.py). The engine measures three stages that follow each other: waiting, reading the
prompt, writing. The page measures the load of weights before them (ui/answering.py). `plugin_ms` is the time of a plugin's hooks in
the whole answer. The hooks of a drafter run while the answer is written, so the writing stage is divided into its drafter and the
rest: forwards, sampling and scheduling. The hooks of other plugins run in both stages, and have rows of their own without a place
in time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from pitlane.ui.effects import SMALL_MS, Roles, Stats, cost_ms, drafter_of
from pitlane.ui.render import milliseconds

REUSE_SLACK = 64  # tokens: a cache reuses whole blocks
MIN_EQUAL = 8  # prompts that only share the marks of the template tell nothing
MAX_SPANS = 400  # accepted runs of an answer that are kept with its stats


class Stage(NamedTuple):
    """A row. start, ms: place in time (start None: spread over the answer). level 1: a part of the row above."""

    label: str
    start: float | None
    ms: float
    detail: str = ""
    kind: str = ""
    level: int = 0


def stages(stats: Stats, roles: Roles) -> list[Stage]:
    """The rows of an answer."""
    load, queue, read, write = times(stats)
    computed = stats["prompt_tokens"] - stats["cached_tokens"]
    rate = f", {1e3 * computed / read:,.0f} tok/s" if read >= 1 and computed else ""
    rows = [Stage("loaded the weights", 0.0, load, kind="queue")] if load >= SMALL_MS else []
    rows += [Stage("waited", load, queue, kind="queue")] if queue >= SMALL_MS else []
    queue += load
    rows.append(Stage("read the prompt", queue, read, kind="read"))
    if stats["cached_tokens"]:
        rows.append(Stage("from cache", queue, 0.0, f"{stats['cached_tokens']:,} tokens", "read", 1))
    rows.append(Stage("computed", queue, read, f"{computed:,} tokens{rate}", "read", 1))
    rows.append(Stage("wrote the answer", queue + read, write, _per_token(stats), "write"))
    drafter = drafter_of(stats, roles)
    drafting = cost_ms(stats, drafter) if drafter else 0.0
    if drafter and drafting >= SMALL_MS:
        rest = max(0.0, write - drafting)
        rows.append(Stage("forwards, sampling, scheduling", queue + read, rest, "", "write", 1))
        drafts = f"{stats['accepted_tokens']} of {stats['draft_tokens']} draft tokens accepted"
        rows.append(Stage(drafter, queue + read + rest, drafting, drafts, "hook", 1))
    hooks = [(name, cost_ms(stats, name)) for name in stats["plugin_ms"] if name != drafter]
    rows += [Stage(name, None, ms, "hooks, in both stages", "hook") for name, ms in hooks if ms >= SMALL_MS]
    return rows


def times(stats: Stats) -> tuple[float, float, float, float]:
    """Milliseconds of the load of weights (0 if none were loaded), of waiting, of reading the prompt, and of writing."""
    queue = stats.get("waited_ms", stats["queue_ms"])
    return float(stats.get("load_ms", 0.0)), float(queue), float(stats["prefill_ms"]), float(stats["decode_ms"])


def _per_token(stats: Stats) -> str:
    tokens, tpot = stats["completion_tokens"], stats.get("tpot_ms") or {}
    words = f"{tokens:,} token{'' if tokens == 1 else 's'}"
    if tokens > 1:
        words += f", {milliseconds(float(stats['decode_ms']) / (tokens - 1))} each"
    return words + (f"; 95 % within {milliseconds(tpot['p95'])}" if tpot.get("p95") else "")


def waterfall_html(stats: Stats, roles: Roles) -> str:
    """The rows as a table of bars."""
    rows = stages(stats, roles)
    total = sum(times(stats)) or 1.0
    lines = []
    for row in rows:
        place = 100 * (row.start or 0.0) / total
        width = min(100 * row.ms / total, 100 - place)
        spread = " spread" if row.start is None else ""
        bar = f'<i class="{row.kind}{spread}" style="margin-left:{place:.2f}%;width:{width:.2f}%"></i>'
        name = f"<em>{escape(row.label)}</em>" if row.kind == "hook" else escape(row.label)
        level = ' class="part"' if row.level else ""
        lines.append(
            f'<tr{level}><th scope="row">{name}</th><td class="bars">{bar}</td><td>{milliseconds(row.ms)}</td>'
            f"<td>{escape(row.detail)}</td></tr>"
        )
    return f'<table class="waterfall" aria-label="time of this answer by stage">{"".join(lines)}</table>'


def reuse_html(stats: Stats) -> str:
    """Where this prompt leaves an earlier prompt, as text: KV is reused up to the first token that differs. Empty if unknown.

    `reuse` in the stats comes from the page (`first_difference_of`): it knows the prompts of its own questions alone.
    """
    reuse = stats.get("reuse")
    if not reuse:
        return ""
    words = (
        f"Equal to an earlier prompt for {reuse['same']:,} tokens, then <q>{escape(reuse['now'])}</q> instead of "
        f"<q>{escape(reuse['before'])}</q>."
    )
    if stats["cached_tokens"] + REUSE_SLACK < reuse["same"]:
        words += f" Only {stats['cached_tokens']:,} of them came from cache: the set of plugins differs, or their KV was removed."
    return f'<p class="reuse">{words}</p>'


def first_difference_of(now: Sequence[int], earlier: Iterable[Sequence[int]]) -> tuple[int, Sequence[int]] | None:
    """The earlier prompt that is equal for the longest, and the number of equal tokens. None if a prompt only goes on with it."""
    best: tuple[int, Sequence[int]] | None = None
    for before in earlier:
        same = next((i for i, (a, b) in enumerate(zip(now, before, strict=False)) if a != b), None)
        if same is None:
            return None
        if best is None or same > best[0]:
            best = same, before
    return best if best is not None and best[0] >= MIN_EQUAL else None


def accepted_html(text: str, spans: Sequence[Sequence[int]]) -> str:
    """The answer as plain text with its accepted draft tokens tinted. spans: half-open ranges of characters."""
    pieces, end = [], 0
    for start, stop in spans:
        pieces.append(f"{escape(text[end:start])}<mark>{escape(text[start:stop])}</mark>")
        end = stop
    return f'<p class="accepted">{"".join(pieces)}{escape(text[end:])}</p>' if spans else ""
