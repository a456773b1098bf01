"""The documents of the page: files added to the store, their text and token counts, the rows of the document list.

Knows no Gradio, no HTML and no request. `Desk` (ui/answering.py) extends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path

from pitlane import Engine, EngineClosed, Plan, PromptTooLong, load_document
from pitlane.storage.db import Store
from pitlane.storage.errors import NotFound
from pitlane.storage.types import Document, StoredDocument
from pitlane.ui.lists import DocumentRow, counted

SAMPLE = "sample.pdf"


class Library:
    """Documents of one store, with token counts by the tokenizer of one engine."""

    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine: Engine | None = engine
        self.store = store
        self._documents: dict[str, Document] = {}
        self._tokens: dict[str, int] = {}

    @property
    def engine(self) -> Engine:
        """The engine that answers. Raises EngineClosed after `release`."""
        if self._engine is None:
            raise EngineClosed("the model was changed; load the page again")
        return self._engine

    def release(self) -> None:
        """Let the engine go. FastAPI keeps pages that were served before in its caches, and the engine must not stay with them."""
        self._engine = None

    def add_file(self, path: str | Path, title: str | None = None) -> StoredDocument:
        """Read a file into the store. Raises DocumentError with a message of one line."""
        return self.store.documents.add(load_document(path, title=title))

    def add_sample(self) -> StoredDocument:
        """Put the bundled sample into the store."""
        with as_file(files("pitlane.storage.bundled") / SAMPLE) as path:
            return self.add_file(path, SAMPLE)

    def has_sample(self) -> bool:
        """Whether the sample is in the store."""
        return any(row.title == SAMPLE for row in self.store.documents.list())

    def document(self, document_id: str) -> Document:
        """A stored document with its pages."""
        if document_id not in self._documents:
            self._documents[document_id] = self.store.documents.load(document_id)
        return self._documents[document_id]

    def documents(self, ids: Sequence[str]) -> list[Document]:
        """Load documents by id. Removed documents are left out."""
        documents = []
        for document_id in ids:
            with suppress(NotFound):
                documents.append(self.document(document_id))
        return documents

    def num_tokens(self, document_id: str) -> int:
        """Tokens of a document in a prompt."""
        if document_id not in self._tokens:
            self._tokens[document_id] = len(self.engine.tokenizer.encode(self.document(document_id).text, False))
        return self._tokens[document_id]

    def rows(self, attached: Sequence[str], reading: Mapping[str, float] | None = None) -> list[DocumentRow]:
        """The document list of a tab. Only documents that are or were attached have a token count."""
        for document_id in attached:
            with suppress(NotFound):
                self.num_tokens(document_id)
        stored, prefixes = self.store.documents.list(), self.store.prefixes.list()
        return counted(stored, attached, self._tokens.get, prefixes, reading or {})

    def forget(self, document_id: str) -> None:
        """Remove a document with its saved KV."""
        self.store.documents.remove(document_id)
        self._documents.pop(document_id, None)

    def check_fits(self, document_ids: Sequence[str], plan: Plan) -> None:
        """Raise PromptTooLong, with both numbers, if the documents alone leave no room for a question.

        Under a plan that drops tokens, the engine decides.
        """
        if plan.hook("trim_cache"):
            return
        total, context = sum(map(self.num_tokens, document_ids)), self.engine.loader.context
        if total >= context:
            raise PromptTooLong(
                f"the attached documents have {total} tokens and the context of {self.engine.loader.source.name} holds "
                f"{context} with question and answer; take a document out, use a shorter document, or start with another --model"
                f"{self.engine.loader.way_past_context}"
            )
