"""Ask the hand-written questions with and without the adapter: `python -m document_adapter.evaluate QUESTIONS --adapter FOLDER`.

QUESTIONS is a folder of documents with `questions.json` (see `bundled_model/evaluation/handwritten.py`). Pitlane itself answers,
greedily, within 48 tokens; each question begins a chat of its own. Prints a table for each side.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundled_model.evaluation import handwritten
from bundled_model.evaluation.__main__ import show_table
from bundled_model.evaluation.answering import Message
from bundled_model.evaluation.measures import has_loop
from pitlane import Engine, SamplingParams

MAX_TOKENS = 48


class Answers:
    """Answers of an engine under a plan. loops: answers that repeat themselves."""

    def __init__(self, engine: Engine, plugins: dict[str, dict[str, Any]]) -> None:
        self.engine, self.plan, self.loops = engine, engine.plan(plugins), 0

    def answer(self, chats: Sequence[Sequence[Message]]) -> list[str]:
        """Answer each chat greedily."""
        answers = []
        for messages in chats:
            prompt = list(self.engine.tokenizer.render_chat(list(messages)).token_ids)
            result = self.engine.generate(prompt, SamplingParams(max_tokens=MAX_TOKENS), plan=self.plan)
            self.loops += has_loop(result.token_ids)
            answers.append(result.text.strip())
        return answers


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m document_adapter.evaluate", description=__doc__)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", type=Path, help="folder of the adapter; without it the model alone is asked")
    parser.add_argument("--only", action="store_true", help="leave out the model alone")
    parser.add_argument("--show", action="store_true", help="print questions and answers")
    arguments = parser.parse_args()
    questions = handwritten.read_questions(arguments.questions)
    with Engine(arguments.model) as engine:
        own = engine.default_plan.settings
        sides = {} if arguments.only else {"the model alone": own}
        if arguments.adapter:
            sides["with the adapter"] = own | {"lora": {"adapter": str(arguments.adapter)}}
        for name, plugins in sides.items():
            answers = Answers(engine, plugins)
            show_table(name, handwritten.measure(answers, arguments.questions, questions, arguments.show))
            print(f"answers that repeat themselves: {answers.loops}")


if __name__ == "__main__":
    main()
