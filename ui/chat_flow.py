"""What an answer's stats say, as HTML for the page: the stats line, the lap bar, the context meter, what a plugin did.

Pure functions of the stats record (engine/stats.py) and of token ids; knows no Gradio, no engine and no store. All text
is escaped here. `roles` maps plugin names to their roles, which says whose the draft tokens are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Literal

from pitlane.engine.plugin import EXACTNESS
from pitlane.testing import first_difference
from pitlane.ui.render import milliseconds

Stats = Mapping[str, Any]
Roles = Mapping[str, str | None]
NEAR_TIE = (
    "Identical plugins give the same tokens where arithmetic is exact enough (float64). In shorter types a forward over several "
    "tokens rounds differently from one over a single token, which can tip a choice between two nearly equal tokens."
)
CUT = {"length": "cut at the token limit", "aborted": "stopped"}  # ends that are not the answer's own
SMALL_MS = 0.1  # what is below is noise of the clock


def number(value: float) -> str:
    """An integer with thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")


def dotted(parts: Iterable[str]) -> str:
    """Pieces of a line with dots between them; page.css hides a dot that would begin a line."""
    return " ".join(f'<span><i class="dot">·</i> {part}</span>' for part in parts)


def badge(exactness: str) -> str:
    """The exactness class as a small label with its meaning as tooltip."""
    meaning = EXACTNESS.get(exactness, "")  # type: ignore[call-overload]
    return f'<span class="badge {escape(exactness)}" title="{escape(meaning)}">{escape(exactness)}</span>'


def drafter_of(stats: Stats, roles: Roles) -> str | None:
    """The plugin of this answer that drafts."""
    return next((name for name in stats["plugins"] if roles.get(name) == "drafter"), None)


def stats_html(stats: Stats, roles: Roles, tools: str = "") -> str:
    """All that stands under an answer: lap bar, stats line, plan chips, comparison with the answer before. tools: buttons."""
    line = dotted(stat_parts(stats, roles))
    chips = "".join(f'<span class="chip">{escape(name)}</span>' for name in stats["plugins"]) or (
        '<span class="chip none">no plugins</span>'
    )
    return (
        f'<footer class="stats">{lap_html(stats)}<p class="line dots">{line}</p>'
        f'<p class="plan">{chips}{badge(stats["exactness"])}{_ending(stats)}{tools}</p>{compared_html(stats)}</footer>'
    )


def stat_parts(stats: Stats, roles: Roles) -> list[str]:
    """The stats line in pieces: tokens, times, what each plugin did."""
    parts = [f"<b>{number(stats['prompt_tokens'])}</b> prompt"]
    if stats["cached_tokens"]:
        parts.append(f"<b>{number(stats['cached_tokens'])}</b> from cache")
    parts.append(f"TTFT <b>{milliseconds(stats['ttft_ms'])}</b>")
    if stats["tokens_per_second"]:
        parts.append(f"<b>{stats['tokens_per_second']:.1f}</b> tok/s")
    drafter = drafter_of(stats, roles)
    for name in stats["plugins"]:
        words = _work(stats, name, drafter)
        if words:
            parts.append(f"<em>{escape(name)}</em> {', '.join(words)}")
    if stats.get("seed") is not None:
        parts.append(f"seed {stats['seed']}")
    for word in ("paused", "failed"):
        parts += [f'<em class="bad">{escape(name)} {word}</em> {escape(why)}' for name, why in stats[word].items()]
    return parts


def _work(stats: Stats, name: str, drafter: str | None) -> list[str]:
    words = []
    if name == drafter and stats["draft_tokens"]:
        words.append(f"<b>{stats['accepted_tokens']}/{stats['draft_tokens']}</b> accepted")
    cost, gain = stats["plugin_ms"].get(name, 0.0), _bought(stats, name)
    if cost >= SMALL_MS:
        words.append(f"cost {milliseconds(cost)}")
    if gain is not None and abs(gain) >= SMALL_MS:
        words.append(f"bought {_about(stats, name)}{milliseconds(gain)}" if gain > 0 else f"lost {milliseconds(-gain)}")
    return words


def _bought(stats: Stats, name: str) -> float | None:
    found = stats["bought_ms"].get(name)
    return None if found is None else float(found["ms"])


def _about(stats: Stats, name: str) -> str:
    """`~` where the gain is modelled, nothing where it was measured by a paired run."""
    return "~" if stats["bought_ms"].get(name, {}).get("how") == "modelled" else ""


def _ending(stats: Stats) -> str:
    said = CUT.get(str(stats.get("finish_reason")))
    return f'<span class="ending">{said}</span>' if said else ""


def lap_html(stats: Stats) -> str:
    """The answer's time as a bar: waiting, reading, writing, and hatched behind it what the plugins bought."""
    bought = sum(max(0.0, float(gain["ms"])) for gain in stats["bought_ms"].values())
    spans = (
        ("queue", stats["queue_ms"], "waited"),
        ("read", stats["prefill_ms"], "read the prompt"),
        ("write", stats["decode_ms"], "wrote the answer"),
        ("saved", bought, "bought by plugins (modelled)"),
    )
    total = sum(ms for _, ms, _ in spans) or 1.0
    pieces = "".join(
        f'<i class="{kind}" style="width:{100 * ms / total:.2f}%" title="{what}: {milliseconds(ms)}"></i>'
        for kind, ms, what in spans
        if ms > 0
    )
    return f'<div class="lap" role="img" aria-label="time of this answer">{pieces}</div>'


def compare(before_ids: Sequence[int], before: Stats, after_ids: Sequence[int], after: Stats) -> dict[str, Any]:
    """How an answer differs from the one it replaces: first differing token (None: none), speed, plugins of before.

    An answer that was stopped, or cut at its limit, differs in no token from one that goes on behind it.
    """
    first = first_difference(before_ids, after_ids)
    shorter = before if len(before_ids) < len(after_ids) else after
    is_cut = first == min(len(before_ids), len(after_ids)) and shorter.get("finish_reason") in CUT
    return {
        "first_difference": None if is_cut else first,
        "num_same": first if is_cut else None,
        "before": {key: before.get(key) for key in ("tokens_per_second", "ttft_ms")},
        "plugins": list(before["plugins"]),
        "same_seed": before.get("seed") == after.get("seed") or before.get("temperature") == 0,
    }


def compared_html(stats: Stats) -> str:
    """The comparison with the answer that was retried, if there was one."""
    compared = stats.get("compared")
    if not compared:
        return ""
    first, before = compared["first_difference"], compared["before"]
    if first is None:
        cut = f" as far as the shorter one goes, {compared['num_same']}" if compared.get("num_same") is not None else ""
        parts = [f'<b class="good">same tokens as before</b>{cut}']
    else:
        seed = "" if compared["same_seed"] else "another seed, "
        parts = [f"{seed}first difference at token <b>{first + 1}</b>"]
        if compared["same_seed"] and stats["exactness"] == "identical" and stats.get("dtype") != "float64":
            parts.append(
                f'<span class="why" title="{NEAR_TIE}">a near-tie in {escape(str(stats.get("dtype")))}?</span>'
            )
    old, new = before["tokens_per_second"], stats["tokens_per_second"]
    if old and new:
        parts.append(f"<b>×{new / old:.2f}</b> tok/s, {old:.0f} → {new:.0f}")
    if before["ttft_ms"] is not None:
        parts.append(f"TTFT {milliseconds(before['ttft_ms'])} → <b>{milliseconds(stats['ttft_ms'])}</b>")
    line = dotted([_changes(compared["plugins"], stats["plugins"]), *parts])
    return f'<div class="compared"><p class="dots">{line}</p></div>'


def _changes(before: Iterable[str], after: Iterable[str]) -> str:
    """Which plugins an answer had beside those of the one before, and which it did without."""
    added, left_out = (", ".join(sorted(set(a) - set(b))) for a, b in ((after, before), (before, after)))
    said = [f"{word} <em>{escape(names)}</em>" for word, names in (("with", added), ("without", left_out)) if names]
    return " and ".join(said) or "with the same plugins"


def effect(name: str, stats: Stats | None, roles: Roles) -> tuple[Literal["", "good", "bad", "idle"], str]:
    """What a plugin did in the last answer, for its card: a tone and a line of text."""
    if stats is None or name not in stats["plugins"]:
        return "", ""
    for word in ("failed", "paused"):
        if name in stats[word]:
            return "bad", f"{word}: {stats[word][name]}"
    gain, cost = _bought(stats, name), stats["plugin_ms"].get(name, 0.0)
    if name == drafter_of(stats, roles) and not stats["draft_tokens"]:
        return "idle", "not used in the last answer: no match"
    if gain is not None and abs(gain) >= SMALL_MS:
        if gain > 0:
            return "good", f"bought {_about(stats, name)}{milliseconds(gain)} in the last answer"
        return "bad", f"lost {milliseconds(-gain)} in the last answer"
    if gain is not None:
        return "idle", f"bought nothing in the last answer, cost {milliseconds(cost)}"
    spent = f"cost {milliseconds(cost)}; " if cost >= SMALL_MS else ""
    return "idle", f"{spent}its gain shows when you ask again without it"


def meter_html(used: int, document: int, context: int) -> str:
    """Tokens used of the context, the documents' share in another tone."""
    share, rest = (min(100.0, 100 * part / context) for part in (document, max(0, used - document)))
    level = "full" if used >= context else "high" if used > 0.85 * context else ""
    title = f"{number(document)} tokens of documents, {number(max(0, used - document))} of conversation"
    return (
        f'<div class="meter {level}" title="{title}"><span class="bar"><i class="doc" style="width:{share:.2f}%"></i>'
        f'<i class="chat" style="width:{min(rest, 100 - share):.2f}%"></i></span>'
        f"<span><b>{number(used)}</b> of {number(context)} tokens</span></div>"
    )


def reading_html(done: int, total: int, cached: int) -> str:
    """The prompt's progress before the first token."""
    percent = round(100 * done / total) if total else 0
    known = f"{number(cached)} from cache" if cached else f"{number(total)} tokens" if total else ""
    width = f'<i class="had" style="width:{100 * cached / total:.1f}%"></i>' if cached and total else ""
    return (
        f'<div class="reading" role="status"><span>Reading the prompt <b>{percent} %</b></span>'
        f'<span class="bar">{width}<i style="width:{max(0.0, percent - (100 * cached / total if total else 0)):.1f}%"></i>'
        f"</span><small>{known}</small></div>"
    )
