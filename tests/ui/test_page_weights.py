"""Two tabs of the page, two sets of weights: a toggle in a tab changes the weights of its own answers alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ui.page_harness import OTHER_TAB, TAB, new_tab, values


@pytest.fixture
def model() -> dict[str, Any]:
    return {"model": "bundled", "dtype": "bfloat16"}


def test_a_tab_with_int8_weights_answers_beside_a_tab_with_bfloat16_weights(page: Any) -> None:
    def ask(tab: Any, *plugins: str) -> Any:
        return page.handlers.ask(tab, "What is in the box?", new_tab(), *values(page, plugins, max_tokens=40))

    dense = ask(TAB)
    next(dense)  # the first tab is answered while the second tab loads other weights
    for _ in ask(OTHER_TAB, "int8"):
        pass
    for _ in dense:
        pass
    stats = {}
    for conversation in page.store.conversations.list():
        answer = page.store.conversations.get(conversation.id).messages[-1]
        stats["int8" in answer.stats["plugins"]] = answer.stats
    assert stats[False]["exactness"] == "identical" and stats[True]["exactness"] == "approximate"
    assert 0.5 < stats[True]["weight_bytes"] / stats[False]["weight_bytes"] < 0.51
