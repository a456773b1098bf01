"""The questions that the empty page offers: the bundled model answers them right over the sample, with the right page."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from pitlane import SamplingParams, load_document
from pitlane.ui.first_screen import EXPERIMENT, SAMPLE_QUESTIONS, empty_html
from pitlane.ui.session import Chat, EngineOptions
from tests.ui.page_harness import TAB, event, last, new_tab, values

RIGHT = ("10:00 to 21:30 [p. 1]", "27 Quarry Lane [p. 1]", "0441 720 318 [p. 1]")
BUNDLED = Path(str(files("pitlane.storage.bundled")))


@pytest.mark.skipif(not (BUNDLED / "model.safetensors").is_file(), reason="no bundled model here")
def test_the_bundled_model_answers_the_sample_questions() -> None:
    sample = load_document(BUNDLED / "sample.pdf", title="sample.pdf")
    with EngineOptions(plugins="").build() as engine:
        for question, right in zip(SAMPLE_QUESTIONS, RIGHT, strict=True):
            chat = Chat(engine.tokenizer, documents=[sample])
            answer = engine.submit(chat.ask(question), SamplingParams(max_tokens=40), plan=engine.default_plan).result()
            assert right in answer.text


def test_the_experiment_is_asked_over_the_sample(page: Any) -> None:
    offered = f'data-do="try" data-id="{EXPERIMENT}"'
    assert offered in empty_html((), experiment=EXPERIMENT) and offered not in empty_html(())
    changes = last(page.handlers.try_sample(TAB, event(id=EXPERIMENT), new_tab(), *values(page, max_tokens=8)))
    conversation = page.store.conversations.get(changes[page.handlers.ui.tab]["conversation"])
    assert conversation.messages[0].text == EXPERIMENT
    assert conversation.document_ids == (page.desk.add_sample().id,)
