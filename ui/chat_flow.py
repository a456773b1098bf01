"""The stats of an answer as HTML for the page: the stats line, the lap bar, the comparison, the context meter.

Pure functions of the stats record (engine/stats.py) and of token ids; knows no Gradio, no engine and no store. All text is escaped
here. ui/effects.py says what a plugin did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pitlane import EXACTNESS
from pitlane.testing import first_difference
from pitlane.ui.bench.summary import MIN_COMPARED_TOKENS
from pitlane.ui.effects import SMALL_MS, Roles, Stats, cost_ms, drafter_of, reason_html, replayed_tokens, work
from pitlane.ui.render import milliseconds, short_name, size
from pitlane.ui.waterfall import accepted_html, reuse_html, times, waterfall_html

UP_TO_TIES = "except where two tokens are nearly equally likely: a draft changes the order of sums in its rows"
NEAR_TIE = (
    "Identical plugins give the same tokens where arithmetic is exact enough (float64). In shorter types a forward over several "
    "tokens rounds differently from one over a single token, which can tip a choice between two nearly equal tokens."
)
INTERRUPTED = "interrupted"  # the finish reason of an answer whose process was killed
# Finish reasons other than the model's own end.
CUT = {"length": "cut at the token limit", "aborted": "stopped", INTERRUPTED: "interrupted, because the server ended"}
COMPARED_KEYS = ("tokens_per_second", "ttft_ms", "completion_tokens", "cached_tokens")


def number(value: float) -> str:
    """An integer with thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")


def dotted(parts: Iterable[str]) -> str:
    """Parts of a line with dots between them; page.css hides the dot at the beginning of a line."""
    return " ".join(f'<span><i class="dot">·</i> {part}</span>' for part in parts)


def badge(exactness: str, up_to_ties: bool = False, bound: str = "", detail: str = "") -> str:
    """The exactness class as a small label with its meaning as tooltip.

    bound: a figure to show beside the class. detail: what the plugin says about its bound, behind the meaning.
    """
    meaning, label = EXACTNESS.get(exactness, ""), exactness  # type: ignore[call-overload]
    if up_to_ties:
        meaning, label = f"{meaning}, {UP_TO_TIES}", f"{exactness} up to ties"
    title = f"{meaning}. {detail}" if detail else meaning
    figure = f" <i>{escape(bound)}</i>" if bound else ""
    return f'<span class="badge {escape(exactness)}" title="{escape(title)}">{escape(label)}{figure}</span>'


def is_up_to_ties(stats: Stats, roles: Roles) -> bool:
    """Whether drafts may tip near-ties: below float64, where the result of a row depends on the other rows of its batch."""
    depends = not stats.get("batch_invariant", True) and stats.get("dtype") != "float64"
    return depends and stats["exactness"] == "identical" and drafter_of(stats, roles) is not None


def stats_html(stats: Stats, roles: Roles, tools: str = "", names_model: bool = False, text: str = "") -> str:
    """Everything below an answer: lap bar, one line, the comparison with the answer before. The line unfolds to all details.

    tools: HTML of buttons. names_model: whether the name of the model is shown, because the conversation has answers of several
    models. text: of the answer, to tint its accepted draft tokens.
    """
    model = str(stats.get("model") or "") if names_model else ""
    by = f'<span class="by" title="{escape(model)}">{escape(short_name(model))}</span>' if model else ""
    exactness = badge(stats["exactness"], is_up_to_ties(stats, roles))
    line = f'<span class="line dots">{dotted(head_parts(stats))}</span>'
    return (
        f'<footer class="stats">{lap_html(stats)}<div class="plan"><details class="unfold"><summary>{line}</summary>'
        f"{details_html(stats, roles, text)}</details>{by}{exactness}{_ending(stats)}{tools}</div>"
        f"{compared_html(stats)}</footer>"
    )


def details_html(stats: Stats, roles: Roles, text: str = "") -> str:
    """What the line unfolds to: the waterfall, the effect of each plugin, the plan, the accepted draft tokens in the text."""
    chips = "".join(f'<span class="chip">{escape(name)}</span>' for name in stats["plugins"]) or (
        '<span class="chip none">no plugins</span>'
    )
    accepted, shown = accepted_html(text, stats.get("accepted_text") or ()), set(head_parts(stats))
    effects = dotted(part for part in stat_parts(stats, roles) if part not in shown)
    tinted = f"<details><summary>Accepted draft tokens in the text</summary>{accepted}</details>" if accepted else ""
    return (
        f'<div class="details">{waterfall_html(stats, roles)}<p class="dots">{effects}</p>'
        f'{reuse_html(stats)}<p class="chips">{chips}</p>{tinted}</div>'
    )


def head_parts(stats: Stats) -> list[str]:
    """The folded line: tokens of the prompt, speed, gain of all plugins, and whatever went wrong."""
    parts = [f"<b>{number(stats['prompt_tokens'])}</b> prompt"]
    if stats["cached_tokens"]:
        parts.append(f"<b>{number(stats['cached_tokens'])}</b> from cache")
    parts.append(f"TTFT <b>{milliseconds(stats['ttft_ms'])}</b>")
    if stats["tokens_per_second"]:
        parts.append(f"<b>{stats['tokens_per_second']:.1f}</b> tok/s")
    gain = bought_ms(stats)
    if gain >= SMALL_MS:
        parts.append(f"plugins saved ~{milliseconds(gain)}")
    return parts + _troubles(stats)


def bought_ms(stats: Stats) -> float:
    """Time that the plugins of an answer saved, less the time of their own work."""
    return sum(max(0.0, float(gain["ms"]) - cost_ms(stats, name)) for name, gain in stats["bought_ms"].items())


def _troubles(stats: Stats) -> list[str]:
    """Paused and failed plugins, with the reasons."""
    parts = [
        f'<em class="idle">{escape(name)} paused</em>: {reason_html(why)}' for name, why in stats["paused"].items()
    ]
    parts += [f'<em class="bad">{escape(name)} failed</em>: {escape(why)}' for name, why in stats["failed"].items()]
    return parts


def stat_parts(stats: Stats, roles: Roles) -> list[str]:
    """The parts of the stats line: tokens, times, effects of plugins."""
    parts = [f"<b>{number(stats['prompt_tokens'])}</b> prompt"]
    if stats["cached_tokens"]:
        parts.append(f"<b>{number(stats['cached_tokens'])}</b> from cache")
    parts.append(f"TTFT <b>{milliseconds(stats['ttft_ms'])}</b>")
    if stats["tokens_per_second"]:
        parts.append(f"<b>{stats['tokens_per_second']:.1f}</b> tok/s")
    drafter = drafter_of(stats, roles)
    for name in stats["plugins"]:
        words = work(stats, name, drafter)
        if roles.get(name) == "kv_store" and "kv_bytes_per_token" in stats:
            words = [f"<b>{size(stats['kv_bytes_per_token'])}</b> of KV per token", *words]
        if words:
            parts.append(f"<em>{escape(name)}</em> {', '.join(words)}")
    parts += [f"read whole again without <em>{escape(name)}</em>" for name in stats.get("read_again", ())]
    if stats.get("continued_after"):
        parts.append(f"continued after <b>{number(stats['continued_after'])}</b> tokens")
    if stats.get("seed") is not None:
        parts.append(f"seed {stats['seed']}")
    return parts + _troubles(stats)


def _ending(stats: Stats) -> str:
    ending = CUT.get(str(stats.get("finish_reason")))
    return f'<span class="ending">{ending}</span>' if ending else ""


def lap_html(stats: Stats) -> str:
    """The time of an answer as a bar: waiting, reading, writing; behind them, hatched, the time that plugins saved."""
    load, queue, read, write = times(stats)
    spans = (
        ("queue", load, "loaded the weights"),
        ("queue", queue, "waited"),
        ("read", read, "read the prompt"),
        ("write", write, "wrote the answer"),
        ("saved", bought_ms(stats), "saved by plugins (modelled)"),
    )
    total = sum(ms for _, ms, _ in spans) or 1.0
    pieces = "".join(
        f'<i class="{kind}" style="width:{100 * ms / total:.2f}%" title="{label}: {milliseconds(ms)}"></i>'
        for kind, ms, label in spans
        if ms > 0
    )
    return f'<div class="lap" role="img" aria-label="time of this answer">{pieces}</div>'


def compare(before_ids: Sequence[int], before: Stats, after_ids: Sequence[int], after: Stats) -> dict[str, Any]:
    """Compare an answer with the answer that it replaces: first differing token (None: no difference), figures, plugins.

    An answer that was stopped or cut at its limit does not differ from a longer answer that begins with the same tokens.
    """
    first = first_difference(before_ids, after_ids)
    shorter = before if len(before_ids) < len(after_ids) else after
    is_cut = first == min(len(before_ids), len(after_ids)) and shorter.get("finish_reason") in CUT
    return {
        "first_difference": None if is_cut else first,
        "num_same": first if is_cut else None,
        "before": {key: before.get(key) for key in COMPARED_KEYS} | {"replayed_tokens": replayed_tokens(before)},
        "plugins": list(before["plugins"]),
        "same_settings": before["plugins"] == after["plugins"],
        "same_temperature": before.get("temperature") == after.get("temperature"),
        "same_seed": before.get("seed") == after.get("seed") or before.get("temperature") == 0,
    }


def compared_html(stats: Stats) -> str:
    """The comparison with the answer that this answer replaced; empty if it replaced none."""
    compared = stats.get("compared")
    if not compared:
        return ""
    first = compared["first_difference"]
    if first is None:
        num_same = compared.get("num_same")
        cut = "" if num_same is None else f" as far as the shorter answer goes, {num_same}"
        parts = [f'<b class="good">same tokens as before</b>{cut}']
    else:
        change = _other_sampling(compared)
        parts = [f"{change}first difference at token <b>{first + 1}</b>"]
        if not change and stats["exactness"] == "identical" and stats.get("dtype") != "float64":
            parts.append(
                f'<span class="why" title="{NEAR_TIE}">a near-tie in {escape(str(stats.get("dtype")))}?</span>'
            )
    line = dotted([_changes(compared, stats["plugins"]), *parts, *_compared_times(compared, stats)])
    return f'<div class="compared"><p class="dots">{line}</p></div>'


def _other_sampling(compared: Mapping[str, Any]) -> str:
    """What differs in the sampling of both answers, as the head of a sentence. Answers of earlier versions name no temperature."""
    if not compared.get("same_temperature", True):
        return "another temperature, "
    return "" if compared["same_seed"] else "another seed, "


def _compared_times(compared: Mapping[str, Any], stats: Stats) -> list[str]:
    """Speed and TTFT of both answers; with a ratio only if the change of plugins can explain it."""
    before, replayed = compared["before"], replayed_tokens(stats)
    old, new = before["tokens_per_second"], stats["tokens_per_second"]
    num_tokens = min(stats["completion_tokens"], before.get("completion_tokens") or stats["completion_tokens"])
    parts = []
    if replayed:
        parts.append(f"<b>{replayed} of {stats['accepted_tokens']}</b> accepted tokens replayed from earlier answers")
    elif before.get("replayed_tokens"):
        parts.append(f"the answer before replayed <b>{before['replayed_tokens']}</b> tokens of earlier answers")
    if num_tokens < MIN_COMPARED_TOKENS:
        parts.append(f"too short to compare speed: {num_tokens} tokens, at least {MIN_COMPARED_TOKENS} are needed")
    elif old and new:
        speeds = f"{old:.0f} → {new:.0f} tok/s"
        if parts:
            parts.append(f"{speeds}, which says nothing about new text")
        elif _is_same(compared, stats["plugins"]):
            parts.append(f"{speeds}: the difference is noise")
        else:
            parts.append(f"<b>×{new / old:.2f}</b> tok/s, {old:.0f} → {new:.0f}")
    if before["ttft_ms"] is not None and not _is_same(compared, stats["plugins"]):
        had, has = before.get("cached_tokens", stats["cached_tokens"]), stats["cached_tokens"]
        reason = f" with {number(has)} tokens from cache instead of {number(had)}" if had != has else ""
        parts.append(f"TTFT {milliseconds(before['ttft_ms'])} → <b>{milliseconds(stats['ttft_ms'])}</b>{reason}")
    return parts


def _is_same(compared: Mapping[str, Any], plugins: Mapping[str, Any]) -> bool:
    """Whether both answers had the same plugins and options. Answers of earlier versions have only names of plugins."""
    return bool(compared.get("same_settings", set(compared["plugins"]) == set(plugins)))


def _changes(compared: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The plugins that were added since the answer before, and the plugins that were left out."""
    before = compared["plugins"]
    added, left_out = (", ".join(sorted(set(a) - set(b))) for a, b in ((after, before), (before, after)))
    parts = [f"{word} <em>{escape(names)}</em>" for word, names in (("with", added), ("without", left_out)) if names]
    return " and ".join(parts) or ("with the same plugins" if _is_same(compared, after) else "with other options")


def meter_html(used: int, document: int, context: int, dropped: int = 0) -> str:
    """The used part of the context as a bar, with the documents in another colour. dropped: tokens out of the model's sight."""
    seen = max(0, used - dropped)
    scale = 100 * seen / max(1, used) / context
    share, chat = (min(100.0, scale * part) for part in (document, max(0, used - document)))
    level = "full" if seen >= context else "high" if seen > 0.85 * context else ""
    rest = f", {number(dropped)} dropped" if dropped else ""
    title = f"{number(document)} tokens of documents, {number(max(0, used - document))} of conversation"
    return (
        f'<div class="meter {level}" title="{title}"><span class="bar"><i class="doc" style="width:{share:.2f}%"></i>'
        f'<i class="chat" style="width:{min(chat, 100 - share):.2f}%"></i></span>'
        f"<span><b>{number(seen)}</b> of {number(context)} tokens{rest}</span></div>"
    )


def reading_html(done: int, total: int, cached: int, place: str = "") -> str:
    """Progress of the prefill. place: the page of a document that is read, in words."""
    percent = round(100 * done / total) if total else 0
    detail = f"{number(cached)} from cache" if cached else f"{number(total)} tokens" if total else ""
    detail = f"{place} · {detail}" if place else detail
    width = f'<i class="had" style="width:{100 * cached / total:.1f}%"></i>' if cached and total else ""
    return (
        f'<div class="reading" role="status"><span>Reading the prompt <b>{percent} %</b></span>'
        f'<span class="bar">{width}<i style="width:{max(0.0, percent - (100 * cached / total if total else 0)):.1f}%"></i>'
        f"</span><small>{detail}</small></div>"
    )
