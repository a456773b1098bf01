"""A long prompt does not stall a running stream, and is not starved. Needs a quiet machine; the measurement is docs/latency.py."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "latency.py"


@pytest.mark.slow
def test_a_stream_goes_on_while_a_long_prompt_is_admitted() -> None:
    script = runpy.run_path(str(SCRIPT))
    found = script["summary"](script["measure"]())
    print(json.dumps(found))
    assert found["read"]["p95_over_quiet_p50"] <= 2.5
    assert found["read"]["prompt_slowdown"] <= 2.0
    assert found["unread"]["p95_over_quiet_p50"] > 5, "it is the budget that does it"
