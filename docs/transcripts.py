"""Answers of SmolLM2 with and without the adapter for documents: python docs/transcripts.py > docs/transcripts.md.

The 20 ordinary questions of docs/smollm2.md with the default sampling and seed 1, up to 120 tokens, then questions about the sample
PDF, greedy. The answers belong to the CPU: another rounding tips near-ties.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from pitlane import Document, Engine, Plan, SamplingParams, load_document

HERE = Path(__file__).parent
ORDINARY = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=1, max_tokens=120)
OVER_DOCUMENT = SamplingParams(max_tokens=48)
ABOUT_THE_SAMPLE = [
    "When does the workshop open?",
    "What is the phone number of the office?",
    "Where is the club?",
    "When is the track open?",
    "Who won the race in 1987?",
]
HEAD = """# Transcripts of SmolLM2 with and without the adapter

Written by `docs/transcripts.py`. First 20 ordinary questions without a document: the adapter is off there by default, and is
turned on here to show that the model still talks. Sampled at temperature 0.7, top-p 0.9, repetition penalty 1.1, seed 1, at most
120 tokens (… marks a cut). Then five questions about the sample PDF, greedy; the document does not say who won in 1987.

SmolLM2-135M is a small model. Its facts are often wrong, with and without the adapter.
"""


def ask(engine: Engine, plans: dict[str, Plan], questions: list[str], document: Document | None) -> None:
    """Print every question with the answer of each plan. The answers are computed side by side."""
    sampling = ORDINARY if document is None else OVER_DOCUMENT
    streams = {}
    for question in questions:
        documents = [] if document is None else [document]
        prompt = engine.tokenizer.render_chat([{"role": "user", "content": question}], documents)
        for name, plan in plans.items():
            streams[question, name] = engine.submit(prompt, sampling, plan=plan)
    for number, question in enumerate(questions, 1):
        print(f"\n**{number}. {question}**")
        for name in plans:
            result = streams[question, name].result()
            cut = " …" if result.finish_reason == "length" else ""
            print(f"\n*{name}:* {' '.join(result.text.split())}{cut}")


def main() -> None:
    text = (HERE / "smollm2.md").read_text(encoding="utf-8")
    ordinary = re.findall(r"(?m)^\d+\. (.+)$", text.split("The questions:")[1])[:20]
    sample = load_document(str(files("pitlane.storage.bundled") / "sample.pdf"))
    print(HEAD)
    with Engine("smollm2") as engine:
        own = engine.default_plan.settings
        plans = {"without": engine.plan(own), "with the adapter": engine.plan(own | {"lora": {"adapter": "documents"}})}
        print("## Ordinary questions")
        ask(engine, plans, ordinary, None)
        print("\n## Questions about the sample PDF")
        ask(engine, plans, ABOUT_THE_SAMPLE, sample)


if __name__ == "__main__":
    main()
