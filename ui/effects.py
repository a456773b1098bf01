"""The effect of a plugin in an answer, as HTML for the stats line and for the plugin's card.

Pure functions of the stats record (engine/stats.py). All text is escaped here. `roles` maps names of plugins to their roles: draft
tokens belong to the plugin whose role is `drafter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Literal

from pitlane.ui.render import milliseconds

Stats = Mapping[str, Any]
Roles = Mapping[str, str | None]
SMALL_MS = 0.1  # a shorter time is noise of the clock
SLOW_SHARE = 0.1  # a plugin is called slow if its net cost exceeds this share of the answer's time


def drafter_of(stats: Stats, roles: Roles) -> str | None:
    """The drafter of this answer."""
    return next((name for name in stats["plugins"] if roles.get(name) == "drafter"), None)


Tone = Literal["", "good", "bad", "idle"]


def effect(name: str, stats: Stats | None, roles: Roles, measured: str = "") -> tuple[Tone, str]:
    """The effect of a plugin, for its card: a tone and a line of HTML.

    measured: the gain that a comparison measured, in words. It takes the place of a gain modelled from the last answer; failures,
    pauses and drafts that did not come are still told.
    """
    tone, line = _effect_in(stats, name, roles) if stats is not None else ("", "")
    if not measured or (stats is not None and (name in stats["failed"] or name in stats["paused"])):
        return tone, line
    words = f'<span class="measured">{escape(measured)}</span>'
    if line.startswith(("slow:", "no match")):
        return tone, f"{line}<br>{words}"
    return ("good" if measured.startswith("saved") and "nothing" not in measured else "idle"), words


def effect_html(name: str, stats: Stats | None, roles: Roles, measured: str = "") -> str:
    """The effect as the line of the card. A plugin that answered, and was neither paused nor failed, is called active."""
    tone, line = effect(name, stats, roles, measured)
    is_active = stats is not None and name in stats["plugins"] and name not in stats["paused"]
    state = '<b class="state">active</b> ' if line and is_active else ""
    return f'<p class="{tone}">{state}{line}</p>'


def _effect_in(stats: Stats, name: str, roles: Roles) -> tuple[Tone, str]:
    """The effect of a plugin in an answer."""
    if name in stats["failed"]:  # a failed plugin is not in `plugins`
        return "bad", f"failed in the last answer: {escape(stats['failed'][name])}"
    if name not in stats["plugins"]:
        return "", ""
    lost, gain, cost = _lost(stats, name), _bought(stats, name), cost_ms(stats, name)
    if name in stats["paused"]:
        loss = f", {lost}" if lost else ""
        return "idle", f"paused in the last answer: {reason_html(stats['paused'][name])}{loss}"
    has_no_draft = name == drafter_of(stats, roles) and not stats["draft_tokens"]
    if cost - (gain or 0.0) > SLOW_SHARE * (stats["prefill_ms"] + stats["decode_ms"]):
        detail = f", {lost}" if lost else ", without a draft" if has_no_draft else ""
        return "bad", f"slow: its own work took {milliseconds(cost)} of the last answer{detail}"
    if has_no_draft:
        return "idle", "no match in the last answer, so nothing was drafted"
    if gain is None:
        spent = f"cost {milliseconds(cost)}; " if cost >= SMALL_MS else ""
        return "idle", f"{spent}its gain shows when you ask again without it"
    if lost or gain < SMALL_MS:
        return ("bad", f"{lost} in the last answer") if lost else ("idle", "saved nothing in the last answer")
    return "good", f"saved {_about(stats, name)}{milliseconds(gain)} in the last answer"


def reason_html(reason: str) -> str:
    """A reason as text, with the figures in its brackets as a tooltip."""
    words, _, figures = reason.partition(" (")
    return (
        f'<span class="why" title="{escape(figures.removesuffix(")"))}">{escape(words)}</span>'
        if figures
        else escape(reason)
    )


def work(stats: Stats, name: str, drafter: str | None) -> list[str]:
    """The effect of a plugin in words for the stats line: accepted drafts, its own time, time that it saved or lost."""
    words = []
    if name == drafter and stats["draft_tokens"]:
        words.append(f"<b>{stats['accepted_tokens']}/{stats['draft_tokens']}</b> accepted")
        replayed = replayed_tokens(stats)
        words += [f"<b>{replayed}</b> of them replayed from earlier answers"] if replayed else []
    dropped = dropped_tokens(stats, name)
    if dropped:
        words.append(f'<span class="why" title="{dropped[1]}">dropped <b>{dropped[0]:,}</b> tokens</span>')
    lost, gain, cost = _lost(stats, name), _bought(stats, name), cost_ms(stats, name)
    if lost:
        return [*words, lost]
    if cost >= SMALL_MS:
        words.append(f"cost {milliseconds(cost)}")
    if gain is not None and gain >= SMALL_MS:
        words.append(f"saved {_about(stats, name)}{milliseconds(gain)}")
    return words


def cost_ms(stats: Stats, name: str) -> float:
    """Time of a plugin's hooks."""
    return float(stats["plugin_ms"].get(name, 0.0))


def _bought(stats: Stats, name: str) -> float | None:
    bought = stats["bought_ms"].get(name)
    return None if bought is None else float(bought["ms"])


def _lost(stats: Stats, name: str) -> str:
    """The time that a plugin lost, its own time included. Empty if it saved time, or if its gain is unknown."""
    gain, cost = _bought(stats, name), cost_ms(stats, name)
    if gain is None or abs(gain) < SMALL_MS or cost - gain < SMALL_MS:
        return ""
    saved = f"saved {milliseconds(gain)}" if gain > 0 else f"took {milliseconds(-gain)} more than they saved"
    subject = "its drafts" if stats["draft_tokens"] else "it"
    reason = f"its own work took {milliseconds(cost)}, {subject} {saved}"
    return f'<span class="why" title="{reason}">lost {_about(stats, name)}{milliseconds(cost - gain)}</span>'


def replayed_tokens(stats: Stats) -> int:
    """Accepted tokens that a drafter copied from earlier answers."""
    counts = [notes.get("replayed_tokens") for notes in stats.get("notes", {}).values()]
    return sum(count for count in counts if isinstance(count, int))


def droppers_of(stats: Stats) -> list[str]:
    """Names of the plugins that dropped tokens in an answer."""
    return [name for name, notes in stats.get("notes", {}).items() if notes.get("dropped_tokens")]


def num_dropped(stats: Stats) -> int:
    """Tokens that the model no longer saw at the end of an answer."""
    return max((notes.get("dropped_tokens", 0) for notes in stats.get("notes", {}).values()), default=0)


def dropped_tokens(stats: Stats, name: str) -> tuple[int, str] | None:
    """Number of tokens that a plugin dropped from the model's sight, and in words their place at the end of the answer."""
    notes = stats.get("notes", {}).get(name, {})
    if not notes.get("dropped_tokens"):
        return None
    total = stats["prompt_tokens"] + stats["completion_tokens"]
    if "dropped" not in notes:
        return notes["dropped_tokens"], f"the model no longer sees {notes['dropped_tokens']:,} of {total:,} tokens"
    first, stop = notes["dropped"]
    return notes["dropped_tokens"], f"the model no longer sees tokens {first + 1:,} to {stop:,} of {total:,}"


def _about(stats: Stats, name: str) -> str:
    """`~` before a modelled gain, nothing before a gain measured by a paired run."""
    return "~" if stats["bought_ms"].get(name, {}).get("how") == "modelled" else ""
