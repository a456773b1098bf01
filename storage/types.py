"""Plain data of the storage room: documents as loaders return them, and rows as the store returns them.

Knows no database, no file and no tensor. Times are Unix seconds. `Document.text` is how a document appears in every
prompt. Saved prefixes depend on each byte of it, so a change here makes all of them useless.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_PAGES = 5_000
MAX_CHARS = 20_000_000

# Names of the marks of chat templates and tokenizers. A name too many is harmless: only a `<` of the text changes.
_MARK_NAMES = (
    r"documents?|s|bos|eos|pad|unk|mask|think|thinking|reasoning|answer|user|assistant|system|(?:start|end)_of_turn"
    r"|(?:begin|end)_of_\w+|(?:im|fim)_\w+|\w*tool\w*|image_?\w*|<SYS>"
)
_NAMED = rf"\s*/?\s*(?:{_MARK_NAMES})(?:\s[^<>\n]{{0,200}})?\s*>"
_BARRED = r"[|｜][^<>\n]{0,100}[|｜]>"
_MARK = re.compile(rf"<(?={_NAMED}|{_BARRED})", re.IGNORECASE)
_OPEN_FRAME = re.compile(r"<(?=\s*/?\s*document\b)", re.IGNORECASE)
_LONE = re.compile("[\\ud800-\\udc7f\\udd00-\\udfff]")  # lone surrogates, except the 128 that stand for a byte
_BRACKET = re.compile(r"\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+)\]|p\. \d+\])")


def neutralise(text: str) -> str:
    """Change marks in a document's text that could end its frame, or look like a special token or a page marker.

    Only the opening character changes (`<` to `‹`, `[` to `［`), so the text keeps its length and stays readable.
    """
    return _BRACKET.sub("［", _OPEN_FRAME.sub("‹", _MARK.sub("‹", text)))


def whole_text(text: str) -> str:
    """Return text without lone surrogates.

    Python in a C locale reads UTF-8 bytes as surrogates: they become letters again, or U+FFFD if the bytes are no UTF-8.
    Other lone surrogates become question marks.
    """
    return _LONE.sub("?", text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def storable(text: str) -> str:
    """Return text that SQLite can store: valid UTF-8 without NUL."""
    return whole_text(text.replace("\0", ""))


def utf16_without_mark(data: bytes) -> str | None:
    """The encoding of UTF-16 data that has no byte order mark; None for other data.

    Recognises Latin text, where most first bytes (big endian) or most second bytes (little endian) are zero.
    """
    sample = data[:4096]
    zeros = sample[::2].count(0), sample[1::2].count(0)
    if len(sample) < 4 or max(zeros) * 10 < len(sample) * 3 or min(zeros) * 50 > len(sample):
        return None
    return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"


@dataclass(frozen=True, slots=True)
class Page:
    """One page: `index` from 0, `label` as printed ("iv"), `text` as extracted."""

    index: int
    label: str
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """The text of a file, as a loader read it. `content_hash` is the SHA-256 of the file's bytes, in hex."""

    title: str
    mime: str
    pages: tuple[Page, ...]
    content_hash: str

    @property
    def text(self) -> str:
        """The document as it appears in a prompt: in a frame, with page markers from 1, always the same bytes."""
        title = neutralise(" ".join(self.title.split())).replace('"', "'")
        pages = "\n\n".join(f"[p. {page.index + 1}]\n{neutralise(page.text)}" for page in self.pages)
        return f'<document title="{title}">\n{pages}\n</document>'

    @property
    def num_chars(self) -> int:
        """Characters of text, without frame and page markers."""
        return sum(len(page.text) for page in self.pages)


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document in the store, without its pages. `id` is the first 12 digits of `content_hash`."""

    id: str
    title: str
    mime: str
    content_hash: str
    num_pages: int
    num_chars: int
    created: float


@dataclass(frozen=True, slots=True)
class SavedPrefix:
    """A row about KV in a safetensors file. `block_hash`: hash of the last block, which depends on all tokens before it."""

    id: int
    fingerprint: str
    block_hash: str
    num_tokens: int
    file: str
    num_bytes: int
    checksum: str
    title: str
    document_hash: str | None
    pinned: bool
    created: float
    last_used: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a question has no answer. ways: remedies, as pairs of a verb and its target (`turn_off`, plugin)."""

    reason: str
    ways: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. token_ids: the tokens that the model saw or produced, if known.

    refusal: why a question has no answer, or why an answer could not be made again. versions: ids of this message and of the
    messages that it could take the place of, oldest first; empty if there is only one version.
    """

    id: int
    conversation_id: str
    role: str
    text: str
    token_ids: tuple[int, ...] | None
    stats: Mapping[str, Any] | None
    created: float
    refusal: Refusal | None = None
    versions: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class UnfinishedAnswer:
    """An answer so far. writer: the process that writes it. token_ids, text and stats: as of a message.

    changed: id of the message that the answer, or its edited question, takes the place of. question: text of the edited question.
    continued: id of the answer that goes on; its tokens come first.
    """

    conversation_id: str
    writer: str
    text: str
    token_ids: tuple[int, ...]
    stats: Mapping[str, Any]
    changed: int | None = None
    question: str | None = None
    continued: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation. `get` fills `messages` and `document_ids`; lists leave them empty. Hidden versions are no part of it."""

    id: str
    title: str
    model: str
    created: float
    updated: float
    num_messages: int
    document_ids: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A search result. message_id: None if the title matched. snippet: the matching text, its words in [brackets]."""

    conversation_id: str
    message_id: int | None
    title: str
    snippet: str


@dataclass(frozen=True, slots=True)
class Run:
    """The stats of one finished request."""

    id: int
    created: float
    stats: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StoredComparison:
    """The report of one comparison, without the words of its answers."""

    id: int
    created: float
    model: str
    report: Mapping[str, Any]
