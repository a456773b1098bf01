"""Token ids to text as they come: whole characters only, cut before a stop string.

An answer never ends with a replacement character: a character that is incomplete at the end is left out. Decodes a
short tail, not the whole answer: the text of a token depends on the ones before it (spaces, bytes of one character), so
a few tokens whose text is known are decoded along (as vLLM and TGI do).
"""

from __future__ import annotations

import re
from collections.abc import Sequence as SequenceOf
from typing import Protocol

MAX_PENDING = 8  # tokens held back for an incomplete character, which has at most four bytes
INVALID = "\ufffd"


class Decodes(Protocol):
    """What a detokenizer needs of a tokenizer."""

    def decode(self, token_ids: SequenceOf[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """One answer's text. stopped: a stop string was met. num_tokens: tokens taken, up to the one that completed it.

    specials: matches the special tokens' texts. They are not part of an answer, but a stop string may contain them.
    text: all that `push` and `flush` have returned.
    """

    def __init__(self, tokenizer: Decodes, stop: SequenceOf[str] = (), specials: re.Pattern[str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        self.num_tokens = 0
        self._specials = specials if specials and any(map(specials.search, self.stop)) else None
        self._pieces: list[str] = []
        self._tail: list[int] = []  # [context, pending]
        self._num_context = 0  # tokens of the tail whose text is decoded for the sake of the pending ones
        self._num_decoded = 0  # characters of the tail's text that were passed on
        self._held = ""  # decoded, but may be the head of a stop string
        self._incomplete = ""  # replacement characters, which may be the end of the answer

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, token_ids: SequenceOf[int]) -> str:
        """Take new tokens and return the text that is now certain. After a stop string, nothing is taken."""
        pieces = []
        for token_id in token_ids:
            if self.stopped:
                break
            self._tail.append(token_id)
            self.num_tokens += 1
            pieces.append(self._release(self._decode_pending()))
        self._pieces += pieces
        return "".join(pieces)

    def flush(self) -> str:
        """Return what was held back, without a character that is incomplete; the end."""
        if self.stopped:
            return ""
        text = self._release(self._decode(self._tail)[self._num_decoded :])
        if not self.stopped:
            text += self._visible(self._held)
        self._tail, self._num_context, self._num_decoded, self._held = [], 0, 0, ""
        self._pieces.append(text)
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, self._specials is None) if token_ids else ""

    def _decode_pending(self) -> str:
        """Text of the pending tokens up to the last whole character."""
        text = self._decode(self._tail)
        if len(text) > self._num_decoded and not text.endswith(INVALID):
            return self._advance(text)
        if len(self._tail) - self._num_context > MAX_PENDING:
            return self._give_up(text)
        num_whole = max(len(text.rstrip(INVALID)), self._num_decoded)
        piece, self._num_decoded = text[self._num_decoded : num_whole], num_whole
        return piece

    def _advance(self, text: str) -> str:
        """Drop the old context; what was pending becomes the new one."""
        piece = text[self._num_decoded :]
        self._tail = self._tail[self._num_context :]
        self._num_context, self._num_decoded = len(self._tail), len(self._decode(self._tail))
        return piece

    def _give_up(self, text: str) -> str:
        """Bytes that are no text: cut where decoding apart gives the same, so that work per token stays bounded."""
        for cut in range(len(self._tail) - 1, self._num_context, -1):
            head, rest = self._decode(self._tail[:cut]), self._decode(self._tail[cut:])
            if rest and head + rest == text:  # so the last character, which may be incomplete, is in the rest
                piece = head[self._num_decoded :]
                self._tail, self._num_context = self._tail[cut:], 0
                self._num_decoded = max(self._num_decoded - len(head), 0)
                return piece
        return self._advance(text)

    def _release(self, text: str) -> str:
        """Pass text through the stop strings: cut at the first, hold back what may become one."""
        if not text:
            return ""
        text = self._held + text
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return self._visible(text[: min(found)])
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return self._visible(text[: len(text) - keep])

    def _visible(self, text: str) -> str:
        """The text without special tokens, and without the replacement characters at its end unless more follows."""
        if self._specials:
            text = self._specials.sub("", text)
        text = self._incomplete + text
        whole = text.rstrip(INVALID)
        self._incomplete = text[len(whole) :]
        return whole


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
