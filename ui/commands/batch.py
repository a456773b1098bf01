"""`pitlane run --batch`: an engine, progress and a summary around the two files of ui/batch_file.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pitlane import BadOption
from pitlane.ui.batch_file import Answers, Item, answer_all, read_items, sampling_of
from pitlane.ui.document_plugins import default_note
from pitlane.ui.render import Advance, note, print_json, progress
from pitlane.ui.session import Chat, EngineOptions, add_documents

if TYPE_CHECKING:
    from pitlane import SamplingParams, Stream

INTERRUPTED = 130
SOME_FAILED = 1
CHANGES_ANSWERS = ("model", "plugins", "plugin_options", "dtype")  # options of the engine


@dataclass(slots=True)
class BatchRun:
    """One run over a file of prompts. doc: files or stored documents; template: system prompt, thinking, raw."""

    options: EngineOptions
    sampling: SamplingParams
    doc: tuple[str, ...]
    template: tuple[str | None, bool | None, bool]
    completion_tokens: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)

    def run(self, prompts: Path, out: Path, as_json: bool) -> int:
        """Answer all prompts that have no answer yet, and return the exit code."""
        if out.exists() and out.samefile(prompts):
            raise BadOption(f"{out} holds the prompts; give another --out")
        documents = add_documents(self.doc, self.options.plugins_dir)
        hashes = [document.content_hash for document, _ in documents]
        engine_options = [getattr(self.options, name) for name in CHANGES_ANSWERS]
        items = read_items(prompts, (self.sampling, self.template, hashes, engine_options))
        started = perf_counter()
        with Answers(out, items) as answers, progress("Answering") as advance:
            num_present = len(items) - len(answers.todo)
            try:
                if answers.todo:
                    self._answer(len(items), documents, answers, advance)
            except KeyboardInterrupt:
                note(f"stopped; the same command goes on after the answers in {out}")
                return INTERRUPTED
            answers.put_in_order(items)
        self._report(len(items), num_present, out, perf_counter() - started, as_json)
        return SOME_FAILED if self.failed else 0

    def _answer(self, num_items: int, documents: list[Any], answers: Answers, advance: Advance) -> None:
        done = num_items - len(answers.todo)
        is_raw = self.template[2]
        with self.options.build(documents=bool(documents) and not is_raw) as engine:
            note(engine.loader.describe_memory())
            if documents and default_note(engine):
                note(default_note(engine))
            advance(done, num_items)

            def submit(item: Item) -> Stream:
                chat = Chat(engine.tokenizer, *self.template)
                for document in documents:
                    chat.add(*document)
                return engine.submit(chat.ask(item.prompt), sampling_of(item, self.sampling))

            for number, (item, answer) in enumerate(answer_all(answers.todo, submit), done + 1):
                answers.write(item, answer)
                self._count(item, answer)
                advance(number, num_items)

    def _count(self, item: Item, answer: dict[str, Any]) -> None:
        if "error" in answer:
            self.failed.append({"line": item.line, "error": answer["error"]})
            note(f"line {item.line}: {answer['error']}")
        for sample in answer.get("samples") or [answer]:
            self.completion_tokens += len(sample.get("token_ids", ()))

    def _report(self, num_prompts: int, num_present: int, out: Path, seconds: float, as_json: bool) -> None:
        if as_json:
            print_json(
                {
                    "out": str(out),
                    "prompts": num_prompts,
                    "found": num_present,
                    "failed": self.failed,
                    "completion_tokens": self.completion_tokens,
                    "seconds": round(seconds, 3),
                }
            )
            return
        parts = [f"{num_prompts - len(self.failed)} answers in {out}"]
        parts += [f"{num_present} of them were there before"] if num_present else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{self.completion_tokens} tokens in {seconds:.1f} s"] if self.completion_tokens else []
        note(" · ".join(parts))
