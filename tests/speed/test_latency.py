"""A long prompt neither stalls a running stream nor starves. Needs a quiet machine. The measurement is docs/latency.py."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "latency.py"


@pytest.mark.slow
def test_a_stream_goes_on_while_a_long_prompt_is_admitted() -> None:
    script = runpy.run_path(str(SCRIPT))
    summary = script["summary"](script["measure"]())
    print(json.dumps(summary))
    assert summary["read"]["p95_over_quiet_p50"] <= 2.5
    assert summary["read"]["prompt_slowdown"] <= 2.0
    assert summary["unread"]["p95_over_quiet_p50"] > 5, "without the budget the stream stalls"
