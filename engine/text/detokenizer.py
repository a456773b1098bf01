"""Convert token ids to text during generation: whole characters only, cut before a stop string.

The text of a token depends on the tokens before it (spaces, bytes of one character). So each step decodes a short tail
of the answer: a few context tokens and the pending tokens after them. The context's text was returned earlier. vLLM and TGI
do the same. An answer never ends with U+FFFD: we drop an incomplete character at the end.

`tokenizers.DecodeStream` (0.23) decodes such a tail too, but cannot replace this class. It returns nothing while the text
ends with U+FFFD. So it reports a stop string too late if an incomplete character follows. Bytes that are not UTF-8 make every
step slower than the last. At the end of an answer, its pending text is lost.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from pitlane.engine.text.stop_string import StopString

MAX_PENDING = 8  # pending tokens of an incomplete character; a character has at most four bytes
INVALID = "\ufffd"


class Decodes(Protocol):
    """The part of a tokenizer that a detokenizer uses."""

    def decode(self, token_ids: SequenceOf[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """The text of one answer.

    stopped: the answer has reached a stop string. num_tokens: number of tokens taken. It includes the token that completed the
    stop string. specials: pattern of the special tokens. An answer hides special tokens, but a stop string may contain them.
    text: all text returned by `push` and `flush`.
    """

    def __init__(self, tokenizer: Decodes, stop: SequenceOf[str] = (), specials: re.Pattern[str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        self.num_tokens = 0
        self._stop_strings = [StopString(text) for text in self.stop]
        self._specials = specials if specials and any(map(specials.search, self.stop)) else None
        self._text = bytearray()  # UTF-8; a list of pieces would take 64 bytes and more per token of a long answer
        self._tail: list[int] = []  # context tokens, then pending tokens
        self._num_context = 0
        self._num_decoded = 0  # characters of the tail's text already released
        self._held = ""  # decoded text that may begin a stop string
        self._incomplete = ""  # replacement characters at the end, held until more text follows

    @property
    def text(self) -> str:
        return self._text.decode("utf-8", "surrogatepass")

    def push(self, token_ids: SequenceOf[int]) -> str:
        """Take new tokens and return the text that is now certain. After a stop string, take no more tokens."""
        pieces = []
        for token_id in token_ids:
            if self.stopped:
                break
            self._tail.append(token_id)
            self.num_tokens += 1
            pieces.append(self._release(self._decode_pending()))
        text = "".join(pieces)
        self._text += text.encode("utf-8", "surrogatepass")
        return text

    def flush(self) -> str:
        """End the answer: return the text held back so far, without an incomplete character."""
        if self.stopped:
            return ""
        text = self._release(self._decode(self._tail)[self._num_decoded :])
        if not self.stopped:
            text += self._visible(self._held)
        self._tail, self._num_context, self._num_decoded, self._held = [], 0, 0, ""
        self._text += text.encode("utf-8", "surrogatepass")
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, self._specials is None) if token_ids else ""

    def _decode_pending(self) -> str:
        """Text of the pending tokens up to the last whole character."""
        text = self._decode(self._tail)
        if len(text) > self._num_decoded and not text.endswith(INVALID):
            return self._advance(text)
        if len(self._tail) - self._num_context > MAX_PENDING:
            return self._shorten_tail(text)
        num_whole = max(len(text.rstrip(INVALID)), self._num_decoded)
        piece, self._num_decoded = text[self._num_decoded : num_whole], num_whole
        return piece

    def _advance(self, text: str) -> str:
        """Drop the context; the pending tokens become the new context."""
        piece = text[self._num_decoded :]
        self._tail = self._tail[self._num_context :]
        self._num_context, self._num_decoded = len(self._tail), len(self._decode(self._tail))
        return piece

    def _shorten_tail(self, text: str) -> str:
        """Shorten a tail of invalid UTF-8, so that the work per token stays bounded.

        Cut where decode(head) + decode(rest) equals decode(head + rest).
        """
        for cut in range(len(self._tail) - 1, self._num_context, -1):
            head, rest = self._decode(self._tail[:cut]), self._decode(self._tail[cut:])
            if rest and head + rest == text:  # the rest keeps the last character: it may be incomplete
                piece = head[self._num_decoded :]
                self._tail, self._num_context = self._tail[cut:], 0
                self._num_decoded = max(self._num_decoded - len(head), 0)
                return piece
        return self._advance(text)

    def _release(self, text: str) -> str:
        """Search text for stop strings: cut at the first complete match, hold back the beginning of a possible match."""
        text, num_searched = self._held + text, len(self._held)
        for end, character in enumerate(text[num_searched:], num_searched + 1):
            matches = [stop.num_matched for stop in self._stop_strings if stop.completed_by(character)]
            if matches:
                self.stopped, self._held = True, ""
                return self._visible(text[: self._outside_special(text, end - max(matches))])
        num_held = max((stop.num_matched for stop in self._stop_strings), default=0)
        cut = self._outside_special(text, len(text) - num_held) if num_held else len(text)
        self._held = text[cut:]
        return self._visible(text[:cut])

    def _outside_special(self, text: str, cut: int) -> int:
        """The index `cut`, or the start of a special token that it would cut in two: a half is no longer recognised."""
        matches = self._specials.finditer(text) if self._specials else ()
        return next((match.start() for match in matches if match.start() < cut < match.end()), cut)

    def _visible(self, text: str) -> str:
        """The text without special tokens. Replacement characters at its end wait until more text follows."""
        if self._specials:
            text = self._specials.sub("", text)
        text = self._incomplete + text
        whole = text.rstrip(INVALID)
        self._incomplete = text[len(whole) :]
        return whole
