"""Every drafter drafts well where the answer quotes the prompt: a drafter must not pass other tests by not drafting.

The bundled model answers five questions about its sample PDF, greedily, one request at a time, with drafts of any length.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from pitlane import SamplingParams
from pitlane.engine.text.documents import load_document

QUESTIONS = json.loads((Path(__file__).parents[2] / "plugins" / "sample_questions.json").read_text(encoding="utf-8"))
MIN_ACCEPTED = {"prompt_lookup": 1.2, "speculative": 2.0, "self_speculation": 2.0, "jacobi": 0.1, "lookahead": 0.2}


@pytest.mark.slow
@pytest.mark.usefixtures("always_draft")
def test_accepted_tokens_a_step(make_engine: Any) -> None:
    engine = make_engine("bundled", dtype="float32")
    sample = load_document(str(files("pitlane.storage.bundled") / "sample.pdf"))
    accepted: dict[str, float] = {}
    for name in MIN_ACCEPTED:
        tokens = drafts = 0
        for row in QUESTIONS[:5]:
            prompt = engine.tokenizer.render_chat([{"role": "user", "content": row["question"]}], [sample])
            result = engine.generate(prompt, SamplingParams(max_tokens=32), plan=engine.plan({name: {}}))
            tokens += len(result.token_ids) - 1
            drafts += result.stats["accepted_tokens"]
        accepted[name] = round(drafts / (tokens - drafts), 2)
    print(f"\naccepted draft tokens per other token: {accepted}")
    assert all(accepted[name] >= minimum for name, minimum in MIN_ACCEPTED.items()), accepted
