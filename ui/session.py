"""Shared by `run`, `chat` and the page: an engine from options, documents from files, prompts from a conversation.

Importing this imports no torch; `EngineOptions.build` does. Knows no terminal and no page.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pitlane import PrefillProgress, TextDelta, load_document
from pitlane.storage.errors import DocumentError, NotFound
from pitlane.storage.types import whole_text
from pitlane.ui.document_plugins import described, document_plugins
from pitlane.ui.plugin_text import ParsedSettings, Replacement, parse_settings
from pitlane.ui.reading import page_read, page_text

if TYPE_CHECKING:
    from pitlane import Engine, PluginRegistry, Prompt, Result, Settings, Stream, Tokenizer
    from pitlane.storage.db import Store
    from pitlane.storage.types import Document, StoredDocument

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of an engine, as a user writes them.

    plugins: the text of `--plugins` (None: the default set, `''`: the bare core). plugin_options: texts `plugin.key=value`.
    context is in tokens, kv_memory in bytes.
    """

    model: str = "bundled"
    plugins: str | None = None
    plugin_options: tuple[str, ...] = ()
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    context: int | None = None
    kv_memory: int | None = None
    plugins_dir: str | None = None

    def build(self, documents: bool = False) -> Engine:
        """Load the plugins, check the plugin set, load the model. Raises PitlaneError for every error that a user can cause.

        documents: all questions are about a document, so the document plan is the default plan. If it does not fit into memory,
        the plan without the document plugins is.
        """
        from pitlane import ModelTooLarge, Planner, PluginRegistry

        registry = PluginRegistry.load(self.plugins_dir)
        if self.plugins is not None or self.plugin_options:  # so that a wrong set is refused before a model is read
            Planner(registry).check(self.settings(registry, registry.default_settings()).settings)
        replaced: set[Replacement] = set()

        def chosen(default: Settings) -> Settings:  # the engine calls it more than once
            settings, replacements = self.settings(registry, default)
            replaced.update(replacements)
            return settings

        try:
            engine = self._engine(registry, chosen, documents)
        except ModelTooLarge as error:
            if not documents:
                raise
            engine = self._engine(registry, chosen, documents=False)
            names = document_plugins(engine, engine.document_plan.settings)
            log.warning("answers go on without %s: %s", described(engine, names), error)
        for replacement in sorted(replaced):
            log.warning("%s", replacement)
        return engine

    def _engine(self, registry: PluginRegistry, plugins: Callable[[Settings], Settings], documents: bool) -> Engine:
        from pitlane import Engine

        return Engine(
            self.model,
            plugins=plugins,
            dtype=self.dtype,
            device=self.device,
            threads=self.threads,
            context=self.context,
            kv_memory=self.kv_memory,
            registry=registry,
            documents=documents,
        )

    def settings(self, registry: PluginRegistry, default: Settings) -> ParsedSettings:
        """The plugin settings of these options. default: settings of the default set."""
        return parse_settings(self.plugins, self.plugin_options, default, registry)


@dataclass(slots=True)
class Chat:
    """Messages and documents of one conversation, in prompt order. They alone decide the prompt.

    thinking: whether a model that can reason does so before it answers (None: the template decides). raw: the prompt is the last
    message, without a chat template. date: for templates that print a date; the first document fixes it, so that its KV stays
    valid.
    """

    tokenizer: Tokenizer
    system: str | None = None
    thinking: bool | None = None
    raw: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    date: datetime.date | None = None

    def ask(self, text: str) -> Prompt:
        """Add a user's message, and return the prompt for its answer."""
        self.messages.append({"role": "user", "content": text})
        return self.prompt()

    def answer(self, text: str) -> None:
        """Add the model's answer."""
        self.messages.append({"role": "assistant", "content": text})

    def prompt(self) -> Prompt:
        """The prompt for the next answer."""
        if self.raw:
            last = self.messages[-1]["content"] if self.messages else ""
            return self.tokenizer.render_raw(last, self.documents)
        return self.tokenizer.render_chat(
            self.messages, self.documents, system=self.system, thinking=self.thinking, date=self.date
        )

    def place(self, prompt: Prompt) -> Callable[[int], str]:
        """A function: number of computed tokens of a prompt -> the page of a document that is read, in words."""
        return lambda done: page_text(page_read(self.documents, prompt.segments, done))

    def add(self, document: Document, stored: StoredDocument) -> None:
        """Add a document after the others. A document with the same content is not added again."""
        if all(document.content_hash != other.content_hash for other in self.documents):
            self.documents.append(document)
            self.date = self.date or datetime.date.fromtimestamp(stored.created)


def add_document(store: Store, file: str, plugins_dir: str | None = None) -> tuple[Document, StoredDocument]:
    """Read a file and store it. Without such a file, find a stored document by id or title.

    Returns the document as it is stored, title included, so that the same bytes always give the same prompt.
    """
    stored = store.documents.add(load_document(file, plugins_dir=plugins_dir)) if _exists(file) else _find(store, file)
    return store.documents.load(stored.id), stored


def add_documents(files: Iterable[str], plugins_dir: str | None = None) -> list[tuple[Document, StoredDocument]]:
    """Call `add_document` for every file, with a store of its own. Without files no store is opened."""
    files = list(files)
    if not files:
        return []
    from pitlane.storage.db import Store

    with Store() as store:
        return [add_document(store, file, plugins_dir) for file in files]


def read_answer(stream: Stream, on_text: Callable[[str], None], on_prefill: Callable[[int, int], None]) -> Result:
    """Follow a request to its end. Ctrl-C aborts it (finish_reason `aborted`, with the text so far); a second Ctrl-C is raised.

    on_prefill gets the numbers of computed tokens and of all tokens of the prompt; its last call comes before any text.
    """
    num_prompt_tokens = 0
    try:
        for event in stream:
            if isinstance(event, TextDelta):
                if num_prompt_tokens:
                    on_prefill(num_prompt_tokens, num_prompt_tokens)
                    num_prompt_tokens = 0
                on_text(event.text)
            elif isinstance(event, PrefillProgress):
                num_prompt_tokens = event.num_prompt_tokens
                on_prefill(event.num_computed_tokens, num_prompt_tokens)
            else:
                return event.result
    except KeyboardInterrupt:
        stream.abort()
        return stream.result()
    raise AssertionError("a stream ends with Finished or an error")


def _exists(file: str) -> bool:
    try:
        return Path(file).expanduser().exists()
    except PermissionError:  # the error of reading it says why
        return True
    except (OSError, RuntimeError):  # a name that is too long, or the home of an unknown user
        return False


def _find(store: Store, name: str) -> StoredDocument:
    name = whole_text(name)
    try:
        stored = store.documents.get(name)
    except NotFound:
        stored = None
    if stored is None or (stored.title != name and not stored.id.startswith(name.casefold())):
        raise DocumentError(
            f"{name}: there is no such file, and no stored document of that id or title; check the path"
        )
    return stored
