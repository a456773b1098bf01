"""A document that was asked about before: from the saved prefix in a new process, from memory within one."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from typing import Any

from click.testing import CliRunner

from pitlane import SamplingParams, load_document
from pitlane.ui.cli import main

SAMPLE = str(files("pitlane.storage.bundled") / "sample.pdf")
QUESTION = "When is the track open?"


RUN = ["run", "--doc", SAMPLE, "--json", "--max-tokens", "24", QUESTION]


def ask() -> dict[str, Any]:
    """One `pitlane run` in this process."""
    result = CliRunner().invoke(main, RUN)
    assert result.exit_code == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def ask_in_a_process() -> dict[str, Any]:
    command = [sys.executable, "-c", "from pitlane.ui.cli import main; main()", *RUN]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_a_second_process_reads_the_saved_prefix(make_engine: Any) -> None:
    tokenizer = make_engine("bundled", dtype="float32").tokenizer
    prompt = tokenizer.render_chat([{"role": "user", "content": QUESTION}], [load_document(SAMPLE)])
    first, second = ask(), ask_in_a_process()
    assert second["token_ids"] == first["token_ids"]
    assert first["stats"]["prompt_tokens"] == len(prompt.token_ids)
    assert first["stats"]["cached_tokens"] == 0
    assert second["stats"]["cached_tokens"] == prompt.segments[0].end
    assert second["stats"]["ttft_ms"] < first["stats"]["ttft_ms"] / 2


def test_a_second_question_hits_memory(make_engine: Any) -> None:
    engine = make_engine("bundled", dtype="float32", plugins=["prefix_cache"])
    document = load_document(SAMPLE)
    found = []
    for question in (QUESTION, "Who holds the lap record?"):
        prompt = engine.tokenizer.render_chat([{"role": "user", "content": question}], [document])
        found.append(engine.generate(prompt, SamplingParams(max_tokens=24)).stats)
    assert found[0]["cached_tokens"] == 0
    assert found[1]["cached_tokens"] >= prompt.segments[0].end
    assert found[1]["ttft_ms"] < found[0]["ttft_ms"] / 2
