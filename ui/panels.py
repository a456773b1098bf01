"""The page's lists and the thread as HTML: conversations, documents, messages, the empty page.

Pure functions of stored rows. page.js turns clicks on elements with `data-do` into events: data-do is the name of the event,
data-id its target. All text from users, files and models is escaped.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from pitlane.storage.types import Document, Message
from pitlane.ui.buttons import button, button_text
from pitlane.ui.chat_flow import CUT, dotted, number, reading_html, stats_html
from pitlane.ui.effects import Roles
from pitlane.ui.first_screen import empty_html
from pitlane.ui.markup import markdown_html, plain_html
from pitlane.ui.reading import page_read, page_text
from pitlane.ui.refusals import refusal_html

if TYPE_CHECKING:
    from pitlane import RecipeProgress, Result, Segment, TextDelta


@dataclass(slots=True)
class Live:
    """An unfinished answer. done, total, cached: tokens of the prompt. Then its text, its tokens and their speed.

    accepted: half-open ranges of its tokens that were accepted draft tokens. segments: the documents in the prompt.
    recipe: returns the recipe that is being built for its plugins.
    first_token: the time of the first token, on the clock of `time.perf_counter`; 0 before it.
    """

    done: int = 0
    total: int = 0
    cached: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    first_token: float = 0.0
    tokens_per_second: float | None = None
    loading: bool = False
    accepted: list[tuple[int, int]] = field(default_factory=list)
    result: Result | None = None
    recipe: Callable[[], RecipeProgress | None] = lambda: None
    segments: Sequence[Segment] = ()

    def add(self, delta: TextDelta, now: float) -> None:
        """Add the text and the tokens of a step. now: the time of `time.perf_counter`."""
        self.first_token = self.first_token or now
        self.text += delta.text
        self.token_ids += delta.token_ids
        num_new = len(delta.token_ids)
        if num_new > 1:  # the last token of a step is the model's own, the tokens before it were drafted
            self.accepted.append((self.num_tokens, self.num_tokens + num_new - 1))
        self.num_tokens += num_new
        elapsed = now - self.first_token
        self.tokens_per_second = (self.num_tokens - 1) / elapsed if elapsed > 0.2 else None


@dataclass(slots=True, eq=False)
class Waiting:
    """A question that waits until its conversation's answer is complete. key: names it in events.

    is_asked: it left the line for an answer. A question that leaves the line in another way returns to the box.
    """

    session: str
    text: str
    key: str = field(default_factory=lambda: secrets.token_hex(4))
    is_taken_back: bool = False
    is_asked: bool = False


def thread_html(
    messages: Sequence[Message],
    documents: Sequence[Document],
    roles: Roles,
    conversation_id: str | None,
    answering: bool = False,
    offer: str = "",
    model: str = "",
    experiment: str = "",
) -> str:
    """All finished messages; without any, the empty page. offer: HTML of the empty page about another model.

    model: the model that answers now, and can go on with its own cut answer. experiment: a question of the empty page with a long
    answer.
    """
    if not messages and not answering:
        return empty_html(documents, offer, experiment)
    models = {message.stats.get("model") for message in messages if message.stats}
    followers = [*(message.role for message in messages[1:]), "assistant" if answering else ""]
    pieces = [
        _message(message, documents, roles, not follower, len(models) > 1, model)
        + ("" if follower == "assistant" else refusal_html(message, documents, not follower))
        for message, follower in zip(messages, followers, strict=False)
    ]
    return f'<div class="thread" data-conversation="{conversation_id or ""}">{"".join(pieces)}</div>'


def _message(
    message: Message,
    documents: Sequence[Document],
    roles: Roles,
    last: bool,
    names_model: bool = False,
    model: str = "",
) -> str:
    source = f'data-source="{escape(message.text)}"'
    if message.role == "user":
        tools = button("copy", message.id, "Copy") + button("edit", message.id, "Edit and ask again")
        return (
            f'<article class="message user" data-id="{message.id}" {source}><div class="body">{plain_html(message.text)}</div>'
            f'{versions_html(message, "question")}<div class="tools">{tools}</div></article>'
        )
    tools = button("copy", message.id, "Copy")
    if last:
        tools += button("retry", message.id, "Ask again, with the plugins that are on now")
    if message.stats:
        tools += button("compare", message.id, "Compare plans on this question, with this seed")
    go_on = button_text("go_on", message.id, "Continue") if last and can_go_on(message, model) else ""
    tools = f'{go_on}{versions_html(message, "answer")}<span class="tools">{tools}</span>'
    stats = stats_html(message.stats, roles, tools, names_model, message.text) if message.stats else tools
    body = (
        markdown_html(message.text, documents) if message.text.strip() else '<p class="quiet">The answer is empty.</p>'
    )
    return (
        f'<article class="message answer" data-id="{message.id}" {source}><div class="body">{body}</div>'
        f"{stats}</article>"
    )


def can_go_on(message: Message, model: str) -> bool:
    """Whether an answer was cut and its tokens are those of this model."""
    stats = message.stats or {}
    return bool(message.token_ids) and stats.get("finish_reason") in CUT and stats.get("model") == model


def versions_html(message: Message, kind: str) -> str:
    """`2/3` with arrows to the versions before and after; empty for the only version."""
    versions = message.versions
    if message.id not in versions:
        return ""
    place = versions.index(message.id)
    arrows = [
        f'<button type="button" data-do="version" data-id="{versions[target] if 0 <= target < len(versions) else ""}" '
        f'aria-label="{label} version of this {kind}" title="{label} version"'
        f"{'' if 0 <= target < len(versions) else ' disabled'}>{sign}</button>"
        for target, label, sign in ((place - 1, "Earlier", "‹"), (place + 1, "Later", "›"))
    ]
    return f'<span class="versions">{arrows[0]}<span>{place + 1}/{len(versions)}</span>{arrows[1]}</span>'


def waiting_html(questions: Sequence[Waiting]) -> str:
    """Questions that wait for the end of an answer, each with a button that takes it back."""
    rows = "".join(
        f'<article class="message user waiting"><div class="body">{plain_html(question.text)}</div>'
        f"<small>waits its turn</small>{button('take_back', question.key, 'Take it back', 'dismiss')}</article>"
        for question in questions
    )
    return f'<div class="thread">{rows}</div>' if rows else ""


def live_html(live: Live, documents: Sequence[Document], key: str = "") -> str:
    """The unfinished answer, or the progress of loading and prefill before it. key: by which page.js asks for what is new."""
    inner = progress_html(live, documents)
    if not inner:
        body = markdown_html(live.text, documents, is_live=True)
        inner = f'<div class="body writing">{body}</div><footer class="stats">{facts_html(live)}</footer>'
    name = f' data-live="{escape(key)}"' if key else ""
    return f'<div class="thread"><article class="message answer live" aria-live="polite"{name}>{inner}</article></div>'


def progress_html(live: Live, documents: Sequence[Document]) -> str:
    """The progress of an answer before its first token; empty afterwards."""
    recipe = live.recipe() if live.loading else None
    if recipe is not None:
        return recipe_html(recipe)
    if live.loading:
        return '<div class="reading" role="status"><span>Loading the weights for this set of plugins</span></div>'
    if live.num_tokens:
        return ""
    place = page_text(page_read(documents, live.segments, live.done))
    return reading_html(live.done, live.total, live.cached, place)


def recipe_html(recipe: RecipeProgress) -> str:
    """The progress of a recipe, with a button that cancels it."""
    percent = 100 * recipe.done / max(1, recipe.num_layers)
    place = f"layer {min(recipe.done + 1, recipe.num_layers)} of {recipe.num_layers}"
    label = "Cancelling" if recipe.is_cancelled else f"{escape(recipe.plugin)} measures the model"
    button = "" if recipe.is_cancelled else button_text("cancel_recipe", "", "Cancel")
    return (
        f'<div class="reading" role="status"><span>{label} <b>{place}</b></span><span class="bar">'
        f'<i style="width:{percent:.1f}%"></i></span><small>Once per model; later loads take the recipe from disk.</small>'
        f'<div class="ways">{button}</div></div>'
    )


def facts_html(live: Live) -> str:
    """The line below an unfinished answer: its tokens and their speed."""
    facts = [f"<b>{number(live.num_tokens)}</b> tokens"]
    facts += [f"<b>{live.tokens_per_second:.1f}</b> tok/s"] if live.tokens_per_second else []
    return f'<p class="line dots">{dotted(facts)}</p>'


def last_stats(messages: Sequence[Message]) -> Mapping[str, Any] | None:
    """Stats of the latest answer that has stats."""
    return next((message.stats for message in reversed(messages) if message.stats), None)
