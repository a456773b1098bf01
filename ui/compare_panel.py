"""The Compare view as HTML: the question, the plans to choose, progress, the table of laps, divergences, exports.

Pure functions of a `Setup` and of reports (`Comparison.to_json`). page.js sends the fields of the form with the event of a button.
All text is escaped here.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from pitlane.ui.bench.chart import to_png
from pitlane.ui.bench.report import OUTCOMES, answer_text, gap_text, is_near_tie, laps_text, scores_text
from pitlane.ui.bench.results import to_csv
from pitlane.ui.buttons import button
from pitlane.ui.chat_flow import badge, dotted
from pitlane.ui.render import milliseconds, short_name, size

LAPS = (3, 5, 9)
MAX_QUESTION = 200_000  # characters, as in the box
Report = Mapping[str, Any]
_TOP = (
    '<div class="compare-top"><h2>Compare plans</h2>'
    f"{button('compare_close', '', 'Back to the conversation', 'dismiss')}</div>"
)


_EVERY = ' <button type="button" class="inline" data-do="compare_every">Every plugin</button>'


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan to choose. key: names it in events. settings: its plugins and options."""

    key: str
    label: str
    hint: str
    settings: Mapping[str, Mapping[str, Any]]
    group: str = "sets"  # or "plugins": the present plan with one plugin more, or one less


@dataclass(slots=True)
class Setup:
    """What the view shows. question: to edit on the first screen, else fixed. facts: seed, temperature, documents.

    chosen: keys of the marked plans. report: of the last run. error: why there is none. was_cancelled: the last run was. history:
    HTML of earlier comparisons.
    """

    question: str
    is_fixed: bool
    facts: tuple[str, ...]
    choices: tuple[Choice, ...]
    chosen: tuple[str, ...]
    laps: int = LAPS[0]
    report: Report | None = None
    error: str = ""
    was_cancelled: bool = False
    history: str = ""
    sources: dict[str, Any] = field(default_factory=dict)  # for the handlers: prompt and sampling


def setup_html(setup: Setup) -> str:
    """The whole view."""
    asked = (
        f'<blockquote class="asked">{escape(setup.question)}</blockquote>'
        if setup.is_fixed
        else f'<textarea name="question" rows="2" maxlength="{MAX_QUESTION}" aria-label="Question">'
        f"{escape(setup.question)}</textarea>"
    )
    facts = f'<p class="facts dots">{dotted(map(escape, setup.facts))}</p>' if setup.facts else ""
    options = "".join(f"<option{' selected' if n == setup.laps else ''}>{n}</option>" for n in LAPS)
    laps = f'<label class="laps">Laps per plan <select name="laps">{options}</select></label>'
    plugins = _choices(setup, "plugins", "The plan that is on now, with one plugin changed", _EVERY)
    plans = f"{_choices(setup, 'sets', 'Plans')}{plugins}"
    if setup.report is not None:
        plans = f"<details><summary>Choose other plans</summary>{plans}</details>"
    return (
        f'<div class="compare">{_TOP}'
        '<p class="quiet">The same prompt and seed, in turn under each plan. The first marked plan is the baseline.</p>'
        f'<form class="compare-setup">{asked}{facts}{plans}'
        f'<div class="go">{laps}<button type="button" class="primary" data-do="compare_run" data-id="">Compare</button></div>'
        f"</form>{_outcome(setup)}</div>"
    )


def problem_html(reason: str) -> str:
    """The view when there is nothing to compare."""
    return f'<div class="compare">{_TOP}<div class="problem" role="alert"><p>{escape(reason)}</p></div></div>'


def _choices(setup: Setup, group: str, title: str, action: str = "") -> str:
    labels = "".join(
        f'<label class="plan-choice" title="{escape(choice.hint)}"><input type="checkbox" name="plan" value="{escape(choice.key)}"'
        f"{' checked' if choice.key in setup.chosen else ''}><span>{escape(choice.label)}"
        f"{f'<small>{escape(choice.hint)}</small>' if group == 'sets' else ''}</span></label>"
        for choice in setup.choices
        if choice.group == group
    )
    return f'<fieldset class="{group}"><legend>{title}{action}</legend><div>{labels}</div></fieldset>' if labels else ""


def progress_html(done: int, total: int, seconds_left: float | None = None) -> str:
    """Progress of a run, with a button that ends it. seconds_left: the expected rest of the run, if it is known."""
    percent = round(100 * done / total) if total else 0
    text = f"Lap <b>{min(done + 1, total)}</b> of {total}" if total else "Loading the weights of the plans"
    if seconds_left is not None and seconds_left >= 1:
        text += f", about {_duration(seconds_left)} left"
    return (
        f'<div class="running" role="status"><span>{text}</span><span class="bar"><i style="width:{percent}%"></i></span>'
        '<button type="button" data-do="compare_stop" data-id="">Cancel</button></div>'
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _outcome(setup: Setup) -> str:
    if setup.error:
        return f'<div class="problem" role="alert"><p>{escape(setup.error)}</p></div>'
    if setup.was_cancelled:
        return '<p class="quiet">Cancelled. Nothing was kept.</p>'
    return report_html(setup.report) + setup.history if setup.report is not None else ""


def report_html(report: Report) -> str:
    """The table of plans, and below it what differs and why figures may mislead."""
    plans = report["plans"]
    fastest = max((plan["tokens_per_second"]["median"] for plan in plans), default=0.0) or 1.0
    lines = "".join(_line(plan, fastest, report["dtype"]) for plan in plans)
    notes = "".join(f"<p>{escape(_sentence(text))}</p>" for text in report["notes"])
    remarks = f'<div class="caution" role="status">{notes}</div>' if notes else ""
    details = "".join(_details(plan, plans[0], report["dtype"]) for plan in plans)
    heads = ("Plan", "Speed", "Answer", "tok/s", "TTFT", "per token", "accepted/step", "weights", "KV")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f'{remarks}<table class="laps-table"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>{details}'
        f"{_exports(report)}"
    )


def _line(plan: Report, fastest: float, dtype: str) -> str:
    figures = [
        ("tok/s", f"{plan['tokens_per_second']['median']:.1f}", _range(plan["tokens_per_second"])),
        (
            "TTFT",
            milliseconds(plan["ttft_ms"]["median"]),
            f"{plan['cached_tokens']} of {plan['prompt_tokens']} tokens cached",
        ),
        ("per token", milliseconds(plan["tpot_ms"]["p50"]), f"95 % within {milliseconds(plan['tpot_ms']['p95'])}"),
        (
            "accepted/step",
            f"{plan['accepted_per_step']:.2f}" if plan["draft_tokens"] else "–",
            f"{plan['accepted_tokens']} of {plan['draft_tokens']} draft tokens",
        ),
        ("weights", size(plan["weight_bytes"]), ""),
        ("KV", size(plan["kv_bytes"]), ""),
    ]
    cells = "".join(f'<td data-name="{name}" title="{escape(hint)}">{text}</td>' for name, text, hint in figures)
    names = ", ".join(plan["plugins"]) or "no plugins"
    share = 100 * plan["tokens_per_second"]["median"] / fastest
    return (
        f'<tr class="{plan["outcome"].replace(" ", "-")}"><th scope="row" title="{escape(names)}">{escape(plan["label"])}'
        f"{badge(plan['exactness'])}</th>"
        f'<td class="speed">{_speed(plan)}<span class="bar"><i style="width:{share:.1f}%"></i></span></td>'
        f'<td class="verdict">{_verdict(plan, dtype)}</td>{cells}</tr>'
    )


def _range(values: Report) -> str:
    return f"{values['min']:.1f} to {values['max']:.1f} over {values['n']} laps"


def _speed(plan: Report) -> str:
    outcome, ratio = plan["outcome"], plan["speed"]
    if outcome == "first":
        return "<b>×1</b><small>baseline</small>"
    if outcome == "too short":
        return f"<b>–</b><small>{OUTCOMES[outcome]}</small>"
    low, high = f"{ratio['low']:.2f}", f"{ratio['high']:.2f}"
    word = {"same plan": "the same plan", "no difference": "noise", "one lap": "one lap"}.get(outcome, "")
    word = f'<small title="{OUTCOMES[outcome]}">{word}</small>' if word else ""
    return f"<b>×{ratio['ratio']:.2f}</b><small>{low} to {high}</small>{word}"


def _verdict(plan: Report, dtype: str) -> str:
    tone = {"identical": "good", "unstable": "idle", "different": "idle"}.get(plan["verdict"], "")
    if plan["verdict"] == "different" and plan["difference"] == "identical" and not is_near_tie(plan, dtype):
        tone = "bad"  # the plugin breaks its promise
    text = "–" if plan["verdict"] == "first" else answer_text(plan)
    return f'<span class="{tone}">{escape(text)}</span>'


def _details(plan: Report, first: Report, dtype: str) -> str:
    texts = [text for text in (gap_text(plan, dtype), scores_text(plan, first), laps_text(plan)) if text]
    both = _divergence(plan, first) if plan["divergence"] else ""
    if not texts and not both:
        return ""
    lines = "".join(f"<p>{escape(_sentence(text, plan))}</p>" for text in texts)
    return f'<section class="detail"><h3>{escape(plan["label"])}</h3>{both}{lines}</section>'


def _sentence(text: str, plan: Report | None = None) -> str:
    """A text with a capital letter and a full stop; the name of a plugin at the beginning stays as it is."""
    is_name = plan is not None and text.partition(" ")[0].rstrip(":") in plan["plugins"]
    return f"{text if is_name else text[:1].upper() + text[1:]}."


def _divergence(plan: Report, first: Report) -> str:
    """Both continuations, behind the text that the answers share."""
    divergence = plan["divergence"]
    shared = divergence["before"].lstrip()
    before = f'<span class="shared">{escape(shared)}</span>' if shared else ""
    sides = "".join(
        f"<div><h4>{escape(label)}</h4><p>{before}{_continuation(text)}</p></div>"
        for label, text in ((first["label"], divergence["first"]), (plan["label"], divergence["other"]))
    )
    return f'<div class="both">{sides}</div>'


def _continuation(text: str) -> str:
    return f"<mark>{escape(text)}</mark>" if text else '<mark class="end">the answer ends here</mark>'


def _exports(report: Report) -> str:
    model = "".join(letter if letter.isalnum() else "-" for letter in short_name(report["model"]))
    files: Sequence[tuple[str, str, bytes]] = (
        ("JSON", "application/json", json.dumps(report, indent=1).encode()),
        ("CSV", "text/csv", to_csv(report).encode()),
        ("PNG", "image/png", to_png(report)),
    )
    links = "".join(
        f'<a download="pitlane-compare-{model}.{name.lower()}" '
        f'href="data:{mime};base64,{b64encode(content).decode()}">{name}</a>'
        for name, mime, content in files
    )
    return f'<p class="exports">Export {links}</p>'
