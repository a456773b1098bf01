"""A conversation whose answers name a plugin that is no longer installed: it opens, is compared, and goes on."""

from __future__ import annotations

import re
from typing import Any

from tests.ui.page_harness import OTHER_TAB, TAB, event, last, new_tab, values

GONE = {"stamp": {"mark": "!"}}


def test_a_conversation_outlives_the_plugin_of_its_answers(page: Any) -> None:
    ui, handlers = page.handlers.ui, page.handlers
    changes = last(handlers.ask(TAB, "Hello", new_tab(), *values(page)))
    key = changes[ui.tab]["conversation"]
    stats = dict(page.store.conversations.get(key).messages[-1].stats)
    stats["plugins"] = stats["plugins"] | GONE
    page.store.conversations.append(key, "user", "And with a stamp?")
    page.store.conversations.append(key, "assistant", "Stamped!", stats=stats)
    stamped = page.store.conversations.get(key).messages[-1]

    thread = handlers.load(OTHER_TAB, new_tab(), key)[ui.thread]
    assert "Stamped!" in thread and '<span class="chip">stamp</span>' in thread
    view = handlers.compare(OTHER_TAB, event(id=str(stamped.id)), new_tab(key), *values(page))[ui.compare]
    plans = re.findall(r'name="plan" value="([^"]+)"', str(view))
    assert "now" in plans and "answer" not in plans, "a plan with the plugin cannot be made"
    last(handlers.ask(OTHER_TAB, "And now?", new_tab(key), *values(page)))
    answer = page.store.conversations.get(key).messages[-1]
    assert answer.role == "assistant" and answer.refusal is None and "stamp" not in answer.stats["plugins"]
