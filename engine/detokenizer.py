"""Token ids to text as they come: whole characters only, cut before a stop string.

Decodes a short tail, not the whole answer: the text of a token depends on the ones before it (spaces, bytes of one
character), so a few already printed tokens are decoded along (as vLLM and TGI do).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

MAX_PENDING = 8  # tokens held back for an incomplete character, which has at most four bytes
INVALID = "\ufffd"


class Decodes(Protocol):
    """What a detokenizer needs of a tokenizer."""

    def decode(self, token_ids: SequenceOf[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """One answer's text. stopped: a stop string was met. num_tokens: tokens taken, up to the one that completed it.

    text: all that `push` and `flush` have returned.
    """

    def __init__(self, tokenizer: Decodes, stop: SequenceOf[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        self.num_tokens = 0
        self._pieces: list[str] = []
        self._tail: list[int] = []  # [printed context, pending]
        self._num_printed = 0  # tokens of the tail that are printed
        self._held = ""  # decoded, but may be the head of a stop string

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
        """Return what was held back, incomplete characters included; the end."""
        if self.stopped:
            return ""
        rest = self._decode(self._tail)[len(self._decode(self._tail[: self._num_printed])) :]
        self._tail, self._num_printed = [], 0
        text = self._release(rest) + ("" if self.stopped else self._held)
        self._held = ""
        self._pieces.append(text)
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids) if token_ids else ""

    def _decode_pending(self) -> str:
        """Text of the pending tokens once it ends in a whole character."""
        printed = self._decode(self._tail[: self._num_printed])
        text = self._decode(self._tail)
        num_pending = len(self._tail) - self._num_printed
        if len(text) > len(printed) and not text.endswith(INVALID):
            return self._advance(text[len(printed) :], len(self._tail))
        if num_pending <= MAX_PENDING:
            return ""
        return self._give_up(printed, text)

    def _advance(self, text: str, num_printed: int) -> str:
        """Drop the old context; what was pending up to `num_printed` becomes the new one."""
        self._tail = self._tail[self._num_printed :]
        self._num_printed = num_printed - self._num_printed
        return text

    def _give_up(self, printed: str, text: str) -> str:
        """Bytes that are no text: cut where decoding apart gives the same, so that work per token stays bounded."""
        for cut in range(len(self._tail) - 1, self._num_printed, -1):
            head, rest = self._decode(self._tail[:cut]), self._decode(self._tail[cut:])
            if rest and head + rest == text:  # so the last character, which may be incomplete, is in the rest
                self._tail, self._num_printed = self._tail[cut:], 0
                return head[len(printed) :]
        return self._advance(text[len(printed) :], len(self._tail))

    def _release(self, text: str) -> str:
        """Pass text through the stop strings: cut at the first, hold back what may become one."""
        if not text:
            return ""
        text = self._held + text
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
