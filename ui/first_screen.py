"""The page without messages: the first steps, questions about the sample to click, an experiment, the way to Compare."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pitlane.storage.types import Document
from pitlane.ui.buttons import button_text

# The bundled model and SmolLM2 answer these with the right value and the right page.
SAMPLE_QUESTIONS = (
    "When is the track open?",
    "What is the address of the club?",
    "What is the phone number of the office?",
)
# SmolLM2 answers this over the sample with 82 tokens, most of them quotes, so that drafts from the prompt are accepted. The bundled
# model has no answer of 32 tokens, so the page offers it nothing.
EXPERIMENT = "Summarize the first page."
COMPARE = (
    '<p class="quiet">Or <button type="button" class="inline" data-do="compare" data-id="">compare plans</button> '
    "on one question, side by side.</p>"
)


def empty_html(documents: Sequence[Document], offer: str = "", experiment: str = "") -> str:
    """The page without messages: the first steps, and three questions about the sample to click. offer: HTML at the end.

    experiment: a question about the sample whose answer is long enough to compare speeds; empty for no such question.
    """
    if documents and not any(document.title == "sample.pdf" for document in documents):
        names = ", ".join(escape(document.title) for document in documents)
        return (
            f'<div class="empty"><h2>Ask about {names}</h2><p>The document is read once and its KV is kept, so every later '
            f"question starts from there. Toggle a plugin between two questions to see what it saves.</p>{COMPARE}{offer}</div>"
        )
    questions = "".join(button_text("try", question, question) for question in SAMPLE_QUESTIONS)
    trial = ""
    if experiment:
        trial = (
            '<p class="quiet">An experiment, with an answer long enough to compare speeds: ask this, turn on the plugin under '
            f'“Try first”, and ask again.</p><div class="questions">{button_text("try", experiment, experiment)}</div>'
        )
    return (
        '<div class="empty"><h2>Ask a document</h2><p>Add a PDF under Documents, or drop one anywhere on this page. '
        "Or ask the sample, a four-page track guide:</p>"
        f'<div class="questions">{questions}</div>'
        '<p class="quiet">Then switch a plugin on or off and ask again: each answer shows what the plugin saved, and whether '
        f"it is still the same, token by token.</p>{trial}{COMPARE}{offer}</div>"
    )
