"""`check_plugin`: a drafter drafts in every step of a check, and as much as it pays before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pitlane.engine.plan.registry import PluginRegistry
from pitlane.testing import check_plugin

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_a_drafter_that_does_not_pay_is_checked_all_the_same(make_engine: Any) -> None:
    engine = make_engine(registry=PluginRegistry.load(EXAMPLES))
    check = check_plugin(engine, {"repeat_last": {}}, num_tokens=20)
    assert (check.exactness, check.num_answers, check.broken) == ("identical", 4, [])
    assert check.num_draft_tokens > 4 * 20, "two draft tokens in a step"


def test_the_governor_is_free_again_after_a_check(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(registry=PluginRegistry.load(EXAMPLES))
    governor = engine.lane_of(engine.plan({"repeat_last": {}})).pacing.governor
    lengths: list[int | None] = []

    def fails(*_: Any, **__: Any) -> None:
        lengths.append(governor.fixed)
        raise RuntimeError("interrupted")

    monkeypatch.setattr(engine, "generate", fails)
    with pytest.raises(RuntimeError, match="interrupted"):
        check_plugin(engine, {"repeat_last": {}})
    assert lengths == [16] and governor.fixed is None
